"""y = x W + b with 8 bit activations and weights (SmoothQuant, arXiv:2211.10438; e4m3: arXiv:2209.05433).

    s_x = max(max |x|, 1e-7) / L;   x8 = x / s_x as int8, ties to even (L = 127), or as e4m3 (L = 448)           a kernel over rows
    y = (x8 W8) * s_x * scale + b                                       a kernel over tiles; integer sums are exact, e4m3's are fp32

Tiling of the second: the grid is (column blocks, row blocks); a program walks down K. W8 is best stored by outputs.
"""

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import Fp8Weight, W8A8Weight

from .launch import has_pdl, launch_options, wait_for_previous
from .tuning import ceil_div, next_power_of_2, w8a8_linear_config

__all__ = ["quantize_rows", "w8a8_linear"]


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    stride_x_row,
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    x = tl.load(x_ptr + row * stride_x_row + offs_k, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-7)
    scale = tl.div_rn(largest, largest * 0 + LARGEST)
    tl.store(scale_ptr + row, scale)
    scaled = tl.minimum(tl.maximum(tl.div_rn(x, scale + x * 0), -LARGEST), LARGEST)
    if IS_INT8:
        scaled = (scaled + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
    tl.store(out_ptr + row * K + offs_k, scaled.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _w8a8_linear_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    stride_w_k,
    stride_w_n,
    N: tl.constexpr,
    K: tl.constexpr,
    IS_INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_m = offs_m < num_rows
    x_rows_ptr = x_ptr + offs_m.to(tl.int64)[:, None] * K
    w_columns_ptr = weight_ptr + offs_n.to(tl.int64)[None, :] * stride_w_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if IS_INT8 else tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        inputs = start + offs_k
        mask_k = inputs < K
        x = tl.load(x_rows_ptr + inputs[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w_rows = inputs.to(tl.int64)[:, None] * stride_w_k
        w = tl.load(w_columns_ptr + w_rows, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc=acc, out_dtype=tl.int32 if IS_INT8 else tl.float32)
    x_scale = tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)
    scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    y = acc.to(tl.float32) * x_scale[:, None] * scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_rows_ptr = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_rows_ptr, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [num_rows, n], contiguous inside a row -> (int8 or float8_e4m3fn of that shape, fp32 scales [num_rows]), new, contiguous."""
    num_rows, k = x.shape
    assert x.stride(1) == 1, "x must be contiguous inside a row"
    out = torch.empty((num_rows, k), dtype=dtype, device=x.device)
    scale = torch.empty((num_rows,), dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return out, scale
    is_int8 = dtype is torch.int8
    block_k = next_power_of_2(k)
    _quantize_rows_kernel[(num_rows,)](
        x,
        out,
        scale,
        x.stride(0),
        K=k,
        LARGEST=127.0 if is_int8 else 448.0,
        IS_INT8=is_int8,
        BLOCK_K=block_k,
        num_warps=min(max(block_k // 1024, 1), 16),
        **launch_options(has_pdl(x.device)),
    )
    return out, scale


def w8a8_linear(x: torch.Tensor, weight: W8A8Weight | Fp8Weight) -> torch.Tensor:
    """Two launches on the current device and stream.

    x: [num_rows, in_features], fp16|bf16|fp32, contiguous inside a row      weight: any strides, best contiguous along in_features

    Returns [num_rows, out_features], new, contiguous, in x's dtype. num_rows may be 0.
    """
    num_rows, k = x.shape
    n = weight.weight.shape[1]
    y = torch.empty((num_rows, n), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    quantized, x_scale = quantize_rows(x, weight.weight.dtype)
    config = w8a8_linear_config(num_rows, n)
    _w8a8_linear_kernel[(ceil_div(n, config.block_n), ceil_div(num_rows, config.block_m))](
        quantized,
        x_scale,
        weight.weight,
        weight.scale,
        weight.bias,
        y,
        num_rows,
        *weight.weight.stride(),
        N=n,
        K=k,
        IS_INT8=weight.weight.dtype is torch.int8,
        HAS_BIAS=weight.bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return y
