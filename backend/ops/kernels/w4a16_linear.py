"""y = x W + b over 4 bit weights (AWQ, arXiv:2306.00978), for the rows of a decode step, and the weights alone for more rows.

    W[k, n] = (nibble[k, n] - zero[g, n]) * scale[g, n],   g = k // group_size
    y[m, n] = sum over g of scale[g, n] * (sum over k in g of x[m, k] (nibble[k, n] - zero[g, n]))      the bracket is exact in x's dtype

A byte holds rows 2i (low half) and 2i + 1 (high half), so a tile of bytes is two tiles of weights, and x is read as its even and its
odd columns. Sums in fp32, y is rounded once.

Tiling: the grid is (column blocks, row blocks); a program walks down K in steps of BLOCK_K inputs, which never cross a group.
"""

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import W4A16Weight

from .launch import has_pdl, launch_options, wait_for_previous
from .tuning import ceil_div, w4a16_linear_config

__all__ = ["dequantize_w4a16", "w4a16_linear"]

DEQUANTIZE_ROWS, DEQUANTIZE_COLUMNS = 32, 128


@triton.jit
def _w4a16_linear_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    stride_x_row,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_pair = tl.arange(0, BLOCK_K // 2)
    mask_n = offs_n < N
    mask_m = offs_m < num_rows
    x_rows_ptr = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x_row
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        pairs = start // 2 + offs_pair
        mask_x = mask_m[:, None] & (pairs < K // 2)[None, :]
        even = tl.load(x_rows_ptr + 2 * pairs[None, :], mask=mask_x, other=0.0)
        odd = tl.load(x_rows_ptr + 2 * pairs[None, :] + 1, mask=mask_x, other=0.0)
        mask_w = (pairs < K // 2)[:, None] & mask_n[None, :]
        packed = tl.load(qweight_ptr + pairs.to(tl.int64)[:, None] * N + offs_n[None, :], mask=mask_w, other=0)
        group = start // GROUP_SIZE
        zero = tl.load(zeros_ptr + group * N + offs_n, mask=mask_n, other=0).to(tl.int16)[None, :]
        scale = tl.load(scales_ptr + group * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        low = ((packed & 15).to(tl.int16) - zero).to(dtype)
        high = ((packed >> 4).to(tl.int16) - zero).to(dtype)
        part = tl.dot(even, low, input_precision=PRECISION)
        part = tl.dot(odd, high, acc=part, input_precision=PRECISION)
        acc += part * scale
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_rows_ptr = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_rows_ptr, acc.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _dequantize_w4a16_kernel(
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pairs = tl.program_id(1).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    mask = (pairs < K // 2)[:, None] & (offs_n < N)[None, :]
    packed = tl.load(qweight_ptr + pairs[:, None] * N + offs_n[None, :], mask=mask, other=0)
    groups = (2 * pairs // GROUP_SIZE)[:, None] * N + offs_n[None, :]  # group_size is even
    zero = tl.load(zeros_ptr + groups, mask=mask, other=0).to(tl.float32)
    scale = tl.load(scales_ptr + groups, mask=mask, other=0.0).to(tl.float32)
    rows_ptr = out_ptr + 2 * pairs[:, None] * N + offs_n[None, :]
    tl.store(rows_ptr, (((packed & 15).to(tl.float32) - zero) * scale).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(rows_ptr + N, (((packed >> 4).to(tl.float32) - zero) * scale).to(out_ptr.dtype.element_ty), mask=mask)


def w4a16_linear(x: torch.Tensor, weight: W4A16Weight) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [num_rows, in_features], fp16|bf16|fp32, rows of any stride, contiguous inside a row
    weight: all parts contiguous; group_size even

    Returns [num_rows, out_features], new, contiguous, in x's dtype. num_rows may be 0.
    """
    num_rows, k = x.shape
    n = weight.scales.shape[1]
    _check(weight)
    assert x.stride(1) == 1, "x must be contiguous inside a row"
    assert k == 2 * weight.qweight.shape[0], f"x has {k} columns"
    y = torch.empty((num_rows, n), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    config = w4a16_linear_config(num_rows, n, weight.group_size, x.element_size())
    _w4a16_linear_kernel[(ceil_div(n, config.block_n), ceil_div(num_rows, config.block_m))](
        x,
        weight.qweight,
        weight.scales,
        weight.zeros,
        weight.bias,
        y,
        num_rows,
        x.stride(0),
        N=n,
        K=k,
        GROUP_SIZE=weight.group_size,
        HAS_BIAS=weight.bias is not None,
        PRECISION="ieee",
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return y


def dequantize_w4a16(weight: W4A16Weight, dtype: torch.dtype) -> torch.Tensor:
    """[in_features, out_features], new, contiguous: every value in fp32, rounded once to `dtype`."""
    _check(weight)
    pairs, n = weight.qweight.shape
    out = torch.empty((2 * pairs, n), dtype=dtype, device=weight.qweight.device)
    _dequantize_w4a16_kernel[(ceil_div(n, DEQUANTIZE_COLUMNS), ceil_div(pairs, DEQUANTIZE_ROWS))](
        weight.qweight,
        weight.scales,
        weight.zeros,
        out,
        N=n,
        K=2 * pairs,
        GROUP_SIZE=weight.group_size,
        BLOCK_PAIRS=DEQUANTIZE_ROWS,
        BLOCK_N=DEQUANTIZE_COLUMNS,
        num_warps=4,
        **launch_options(has_pdl(out.device)),
    )
    return out


def _check(weight: W4A16Weight) -> None:
    assert weight.group_size % 2 == 0, f"group_size {weight.group_size}"
    assert weight.qweight.is_contiguous()
    assert weight.scales.is_contiguous()
    assert weight.zeros.is_contiguous()
