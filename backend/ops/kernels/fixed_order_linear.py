"""Linear layers whose every sum has one order, whatever the number of rows: y = round(x W + b), for `deterministic = 1`.

An output is ((0 + s_0) + s_1) + ..., s_i being the sum over the i-th of at most 8 chunks of K, which tl.dot makes in steps of BLOCK_K.
Tiles have one size for one row and for thousands (rows past the end are computed and not stored), so each output meets the same
instructions in the same order:

    W rows      +- chunk 0 -+- chunk 1 -+- ...         y^T tile [BLOCK_N, BLOCK_M] = W tile x^T tile
    BLOCK_N     | BLOCK_K   |           |              few tiles: a program a chunk, parts added up in order by the last (split_sum.py)
                +-----------+-----------+- ...         many tiles: a program takes chunk after chunk, and adds in the same order

One compiled kernel does both.
"""

import torch
import triton
import triton.language as tl

from .launch import has_pdl, launch_options, num_sms, wait_for_previous
from .split_sum import NUM_COUNTERS, WORKSPACE_ELEMENTS, sum_of_splits, workspace
from .tuning import ceil_div, fixed_order_linear_config

__all__ = ["linear"]


@triton.jit(do_not_specialize=["num_rows"])
def _fixed_order_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counters_ptr,
    num_rows,
    N,
    K,
    stride_x_row,
    stride_weight_k,
    stride_weight_n,
    HAS_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
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
    # rows past the end repeat the last, and are not stored
    weight_rows_ptr = weight_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[:, None] * stride_weight_n
    x_rows_ptr = x_ptr + tl.minimum(offs_m, num_rows - 1).to(tl.int64)[None, :] * stride_x_row + offs_k[:, None]
    first_chunk = tl.program_id(2)
    is_split = tl.num_programs(2) > 1
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for chunk in range(first_chunk, tl.where(is_split, first_chunk + 1, NUM_CHUNKS)):
        begin = chunk * CHUNK
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in tl.range(begin, tl.minimum(begin + CHUNK, K), BLOCK_K, num_stages=NUM_STAGES):
            mask_k = k + offs_k < K
            x = tl.load(x_rows_ptr + k, mask=mask_k[:, None], other=0.0)
            columns = (k + offs_k).to(tl.int64)[None, :] * stride_weight_k
            weight = tl.load(weight_rows_ptr + columns, mask=mask_k[None, :], other=0.0)
            acc = tl.dot(weight, x, acc=acc, input_precision="ieee")
        total += acc
    is_last = first_chunk == 0
    if is_split:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        total, is_last = sum_of_splits(total, parts_ptr, counters_ptr, tile, first_chunk, NUM_CHUNKS)
    if is_last:
        mask_n = offs_n < N
        if HAS_BIAS:
            total += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        y_rows_ptr = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
        tl.store(y_rows_ptr, total.to(y_ptr.dtype.element_ty), mask=(offs_m < num_rows)[None, :] & mask_n[:, None])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [num_rows, in_features], fp16|bf16|fp32, rows of any stride, contiguous inside a row
    weight: [in_features, out_features], x's dtype, any strides, best contiguous along in_features (the transpose of a stored [out, in])
    bias: [out_features], contiguous, or None

    Returns [num_rows, out_features], new, contiguous, in x's dtype. num_rows may be 0.
    """
    assert x.stride(1) == 1 or x.shape[1] == 1, "x must be contiguous inside a row"
    (num_rows, k), n = x.shape, weight.shape[1]
    y = torch.empty((num_rows, n), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    config = fixed_order_linear_config(k, x.element_size())
    num_chunks = ceil_div(k, config.chunk)
    tiles = (ceil_div(n, config.block_n), ceil_div(num_rows, config.block_m))
    num_tiles = tiles[0] * tiles[1]
    has_room = num_tiles <= NUM_COUNTERS and num_tiles * num_chunks * config.block_n * config.block_m <= WORKSPACE_ELEMENTS
    is_split = num_chunks > 1 and 2 * num_tiles <= 3 * num_sms(x.device) and has_room
    _fixed_order_linear_kernel[(*tiles, num_chunks if is_split else 1)](
        x,
        weight,
        bias,
        y,
        *workspace(x.device),
        num_rows,
        n,
        k,
        x.stride(0),
        *weight.stride(),
        HAS_BIAS=bias is not None,
        CHUNK=config.chunk,
        NUM_CHUNKS=num_chunks,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return y
