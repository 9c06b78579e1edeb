"""Rows as 8 bit numbers with a scale each (arXiv:2211.10438; e4m3: arXiv:2209.05433), alone or fused with what makes them.

    s = max(max |y|, 1e-7) / L;   y8 = y / s as int8, ties to even (L = 127), or as e4m3 (L = 448)

    quantize_rows        y = x
    rms_norm_rows        r = round(x + residual);  y = round(r * rsqrt(mean(r^2) + eps) * weight)       as `rms_norm`
    silu_and_mul_rows    y = round(gate / (1 + exp(-gate)) * up)                                        as `silu_and_mul`

y is rounded to x's dtype first, so what comes out is what the two ops would give one after the other.

Tiling: a program holds a whole row in registers; each element is read once.

Rows of the results are padded to a multiple of 16, which is what matrix instructions and libraries like; what stands there is anything.
"""

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import QuantizedRows, SplitSums, Unadded, parts_of

from .fast_launch import launch
from .fast_math import fast_exp2, fast_inverse
from .launch import has_pdl, launch_options, wait_for_previous
from .split_sum import load_sum
from .tuning import ceil_div, quantize_rows_config

__all__ = ["quantize_rows", "rms_norm_rows", "silu_and_mul_rows"]

ROW_MULTIPLE = 16
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rounded(y, dtype: tl.constexpr, ASM: tl.constexpr):
    """fp32 -> `dtype` -> fp32. Two values a conversion: one at a time they go through the slow unit that exponentials need too."""
    if ASM and dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [y], tl.bfloat16, is_pure=True, pack=2)
    elif ASM and dtype == tl.float16:
        y = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [y], tl.float16, is_pure=True, pack=2)
    return y.to(dtype).to(tl.float32)


@triton.jit
def _store_quantized(y, row, out_ptr, scale_ptr, offs_n, mask, N: tl.constexpr, LARGEST: tl.constexpr, IS_INT8: tl.constexpr):
    """y: [BLOCK_N], fp32, 0 where masked. Multiplies by 1 / s: a division of every value would take longer than all the rest."""
    largest = tl.maximum(tl.max(tl.abs(y), axis=0), 1e-7)
    scale = tl.div_rn(largest, largest * 0 + LARGEST)
    tl.store(scale_ptr + row, scale)
    scaled = y * tl.div_rn(scale * 0 + 1.0, scale)  # at most 2^-22 beyond LARGEST, which rounds to it
    values = scaled
    if IS_INT8:  # 1.5 * 2^23 + v, ties to even: the lowest byte is v
        values = (scaled + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(out_ptr + row * N + offs_n, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    stride_x_row,
    N: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(x_ptr + row * stride_x_row + offs_n, mask=mask, other=0.0).to(tl.float32)
    _store_quantized(x, row, out_ptr, scale_ptr, offs_n, mask, N, LARGEST, IS_INT8)


@triton.jit
def _rms_norm_rows_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    r_ptr,
    eps,
    stride_x_row,
    stride_residual_row,
    N: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask, other=0.0)  # while the kernel before still runs
    wait_for_previous(PDL)
    dtype: tl.constexpr = r_ptr.dtype.element_ty if HAS_RESIDUAL else x_ptr.dtype.element_ty
    r = load_sum(x_ptr + row * stride_x_row + offs_n, mask, tl.num_programs(0).to(tl.int64) * N, NUM_PARTS, dtype)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual_row + offs_n, mask=mask, other=0.0)
        r = (r.to(tl.float32) + residual.to(tl.float32)).to(dtype)  # the rounding of the residual stream
        tl.store(r_ptr + row * N + offs_n, r, mask=mask)
    wide = r.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=0) / N
    y = _rounded(wide * tl.rsqrt(mean_square + eps) * weight.to(tl.float32), dtype, ASM)
    _store_quantized(y, row, out_ptr, scale_ptr, offs_n, mask, N, LARGEST, IS_INT8)


@triton.jit
def _silu_and_mul_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    stride_x_row,
    N: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    gate_ptrs = x_ptr + row * stride_x_row + offs_n
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + N, mask=mask, other=0.0).to(tl.float32)
    # exp overflows to inf below -88, and its inverse is then 0
    y = _rounded(gate * fast_inverse(1.0 + fast_exp2(gate * -LOG2_E, ASM), ASM) * up, x_ptr.dtype.element_ty, ASM)
    _store_quantized(y, row, out_ptr, scale_ptr, offs_n, mask, N, LARGEST, IS_INT8)


def _outputs(
    device: torch.device, num_rows: int, n: int, compute_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, QuantizedRows]:
    """(values, scales, both with the padding, rows without)."""
    padded = ceil_div(num_rows, ROW_MULTIPLE) * ROW_MULTIPLE
    values = torch.empty((padded, n), dtype=dtype, device=device)
    scale = torch.empty((padded,), dtype=torch.float32, device=device)
    return values, scale, QuantizedRows(values, scale, num_rows, compute_dtype)


def _options(n: int, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    config, is_int8 = quantize_rows_config(n), dtype is torch.int8
    options = {
        "LARGEST": 127.0 if is_int8 else 448.0,
        "IS_INT8": is_int8,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
    }
    return options | launch_options(has_pdl(device))


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Launch on the current device and stream. x: [num_rows, n], fp16|bf16|fp32, contiguous inside a row; num_rows may be 0.

    dtype: int8 or float8_e4m3fn. Raises ConfigError when n > 65536.
    """
    num_rows, n = x.shape
    assert x.stride(1) == 1 or n == 1, "x must be contiguous inside a row"
    values, scale, rows = _outputs(x.device, num_rows, n, x.dtype, dtype)
    options = _options(n, dtype, x.device)
    if num_rows:
        launch(_quantize_rows_kernel, (num_rows,), x, values, scale, x.stride(0), N=n, **options)
    return rows


def rms_norm_rows(
    x: Unadded, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, dtype: torch.dtype
) -> tuple[QuantizedRows, torch.Tensor]:
    """As `rms_norm` (kernels/rms_norm.py) with the first result in `dtype`; x: SplitSums, too, beside a residual. Without one the
    second result is x itself."""
    num_rows, hidden = x.shape
    assert residual is not None or not isinstance(x, SplitSums), "sums are split beside a residual only"
    compute_dtype = x.dtype
    x, num_parts = parts_of(x)
    assert x.stride(-1) == 1 or hidden == 1, "x must be contiguous inside a row"
    assert residual is None or residual.stride(1) == 1 or hidden == 1, "residual must be contiguous inside a row"
    values, scale, rows = _outputs(x.device, num_rows, hidden, compute_dtype, dtype)
    r = x if residual is None else torch.empty((num_rows, hidden), dtype=compute_dtype, device=x.device)
    options = _options(hidden, dtype, x.device)
    if num_rows:
        launch(
            _rms_norm_rows_kernel,
            (num_rows,),
            x,
            residual,
            weight,
            values,
            scale,
            None if residual is None else r,
            eps,
            x.stride(-2),
            0 if residual is None else residual.stride(0),
            N=hidden,
            NUM_PARTS=num_parts,
            HAS_RESIDUAL=residual is not None,
            ASM=x.is_cuda,
            **options,
        )
    return rows, r


def silu_and_mul_rows(x: torch.Tensor, dtype: torch.dtype) -> QuantizedRows:
    """As `silu_and_mul` (kernels/silu_and_mul.py) with the result in `dtype`. x: [num_rows, 2 n]."""
    num_rows, columns = x.shape
    n = columns // 2
    assert columns == 2 * n, f"{columns} columns are not two halves"
    assert x.stride(1) == 1, "x must be contiguous inside a row"
    values, scale, rows = _outputs(x.device, num_rows, n, x.dtype, dtype)
    options = _options(n, dtype, x.device)
    if num_rows:
        launch(_silu_and_mul_rows_kernel, (num_rows,), x, values, scale, x.stride(0), N=n, ASM=x.is_cuda, **options)
    return rows
