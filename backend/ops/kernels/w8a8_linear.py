"""y = x W + b with 8 bit activations and weights (SmoothQuant, arXiv:2211.10438; e4m3: arXiv:2209.05433).

    y = (x8 W8) * s_x * scale + b            integer sums are exact, e4m3's are fp32 as the matrix instruction makes them

Integers are added up as such by all that share a sum, so an int8 result does not depend on the number of rows; but
the scaled sums of parts that are left to who reads them (`w8a8_split_linear`) are rounded each.

Tiling: a program owns a tile BLOCK_M x BLOCK_N of y and walks down K; where that leaves multiprocessors idle, NUM_SPLITS programs share
the inputs of a tile (split_sum.py). Programs go by groups of GROUP_M row blocks, so that those which run at once read few columns:

    row blocks    0  | 0 3 6 |  9 ..          program ids, GROUP_M = 3
                  1  | 1 4 7 | 10
                  2  | 2 5 8 | 11

W8 is stored by outputs, as 8 bit matrix instructions read both operands: along K. Rows and columns past the end repeat the last.
With tensor descriptors the copy engine fetches the tiles (sm_90 on), and threads keep no addresses.

int8 with the rows of a batch of decodes is `hopper_w8a8_linear`'s on Hopper. e4m3 with many rows is cuBLAS's, through torch, where it can
be: bf16 results and sizes that are multiples of 16.
"""

from typing import TypeGuard

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import Fp8Weight, QuantizedRows, Unadded, W8A8Weight

from . import hopper_w8a8_linear
from .fast_launch import Tiles, launch
from .hopper_tuning import hopper_w8a8_config, hopper_w8a8_parts, takes_hopper_w8a8
from .launch import chosen, has_pdl, is_hopper, launch_options, num_sms, wait_for_previous
from .quantize_rows import quantize_rows, silu_and_mul_rows
from .split_sum import sum_of_splits, workspace
from .tuning import FP8_FAST_ACCUMULATION, MAX_OWN_FP8_ROWS, ceil_div, w8a8_linear_config

__all__ = ["w8a8_gate_up", "w8a8_linear", "w8a8_split_linear"]


@triton.jit(do_not_specialize=["num_rows"])
def _w8a8_linear_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counters_ptr,
    num_rows,
    N,
    K,
    stride_w_k,
    stride_w_n,
    IS_INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    program = tl.program_id(0)
    split = tl.program_id(1)
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)
    num_in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_row_block = program // num_in_group * GROUP_M
    height = tl.minimum(num_row_blocks - first_row_block, GROUP_M)
    begin_m = (first_row_block + program % num_in_group % height) * BLOCK_M
    begin_n = program % num_in_group // height * BLOCK_N
    offs_m = begin_m + tl.arange(0, BLOCK_M)
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    num_steps = tl.cdiv(K, BLOCK_K)
    steps = tl.cdiv(num_steps, NUM_SPLITS)
    begin = split * steps
    end = tl.minimum(begin + steps, num_steps)
    sum_type: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), sum_type)
    if DESCRIPTORS:
        for step in tl.range(begin, end, num_stages=NUM_STAGES):
            x = x_ptr.load([begin_m, step * BLOCK_K])
            w = weight_ptr.load([begin_n, step * BLOCK_K])
            acc = tl.dot(x, w.T, acc=acc, out_dtype=sum_type)
    else:
        x_rows_ptr = x_ptr + tl.minimum(offs_m, num_rows - 1).to(tl.int64)[:, None] * K + offs_k[None, :]
        w_columns_ptr = weight_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[None, :] * stride_w_n
        for step in tl.range(begin, end, num_stages=NUM_STAGES):
            inputs = step * BLOCK_K + offs_k
            w_ptrs = w_columns_ptr + inputs.to(tl.int64)[:, None] * stride_w_k
            if EVEN_K:
                x = tl.load(x_rows_ptr + step * BLOCK_K)
                w = tl.load(w_ptrs)
            else:
                x = tl.load(x_rows_ptr + step * BLOCK_K, mask=inputs[None, :] < K, other=0.0)
                w = tl.load(w_ptrs, mask=inputs[:, None] < K, other=0.0)
            acc = tl.dot(x, w, acc=acc, out_dtype=sum_type)
    is_last = True
    if NUM_SPLITS > 1:  # of integers: exact, however many share them
        acc, is_last = sum_of_splits(acc, parts_ptr, counters_ptr, program, split, NUM_SPLITS)
    if is_last:
        mask_m = offs_m < num_rows
        mask_n = offs_n < N
        x_scale = tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
        y = acc.to(tl.float32) * x_scale[:, None] * scale[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y_rows_ptr = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(y_rows_ptr, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def w8a8_linear(x: QuantizedRows, weight: W8A8Weight | Fp8Weight) -> torch.Tensor:
    """Launch on the current device and stream; nothing is read back.

    weight: of the values' dtype; any strides, best contiguous along in_features

    Returns [num_rows, out_features], contiguous, in the dtype that x was made from. num_rows may be 0.
    """
    _assert_fits(x, weight)
    n = weight.weight.shape[1]
    if x.num_rows == 0:
        return torch.empty((0, n), dtype=x.dtype, device=x.values.device)
    if isinstance(weight, Fp8Weight) and x.num_rows > MAX_OWN_FP8_ROWS and _is_for_cublas(x, weight):
        return torch._scaled_mm(
            x.values,
            weight.weight,
            scale_a=x.scale[:, None],
            scale_b=weight.scale[None, :],
            bias=weight.bias,
            out_dtype=x.dtype,
            use_fast_accum=FP8_FAST_ACCUMULATION,
        )[: x.num_rows]
    if _is_for_hopper(x, weight):
        return hopper_w8a8_linear.linear(x, weight, chosen(hopper_w8a8_config, x.num_rows, n, num_sms(x.values.device)))
    return _linear(x, weight)


def w8a8_split_linear(x: QuantizedRows, weight: W8A8Weight | Fp8Weight) -> Unadded:
    """As `w8a8_linear`, before what adds up SplitSums."""
    if weight.bias is None and _is_for_hopper(x, weight):
        _assert_fits(x, weight)
        k, n = weight.weight.shape
        sms = num_sms(x.values.device)
        num_parts = chosen(hopper_w8a8_parts, x.num_rows, n, k, sms)
        if num_parts > 1:
            return hopper_w8a8_linear.split_linear(x, weight, chosen(hopper_w8a8_config, x.num_rows, n, sms), num_parts)
    return w8a8_linear(x, weight)


def w8a8_gate_up(x: QuantizedRows, weight: W8A8Weight | Fp8Weight) -> QuantizedRows:
    """Of `w8a8_linear`'s columns [gate | up], round(silu(gate) * up) as 8 bit rows for the layer after: [num_rows, out_features / 2]."""
    if _is_for_hopper(x, weight):
        _assert_fits(x, weight)
        n = weight.weight.shape[1]
        config = chosen(hopper_w8a8_config, x.num_rows, n, num_sms(x.values.device))
        if config.whole:
            return quantize_rows(hopper_w8a8_linear.gate_up(x, weight, config), weight.weight.dtype)
    return silu_and_mul_rows(w8a8_linear(x, weight), weight.weight.dtype)


def _assert_fits(x: QuantizedRows, weight: W8A8Weight | Fp8Weight) -> None:
    assert x.values.shape[1] == weight.weight.shape[0], f"x has {x.values.shape[1]} columns"
    assert x.values.dtype is weight.weight.dtype, f"{x.values.dtype} times {weight.weight.dtype}"


def _is_for_hopper(x: QuantizedRows, weight: W8A8Weight | Fp8Weight) -> TypeGuard[W8A8Weight]:
    k, n = weight.weight.shape
    is_stored_so = isinstance(weight, W8A8Weight) and weight.weight.stride(0) == 1
    return is_stored_so and chosen(takes_hopper_w8a8, x.num_rows, n, k, is_hopper=is_hopper(x.values.device))


def _is_for_cublas(x: QuantizedRows, weight: Fp8Weight) -> bool:
    k, n = weight.weight.shape
    return has_pdl(x.values.device) and x.dtype is torch.bfloat16 and k % 16 == n % 16 == 0 and weight.weight.stride(0) == 1


def _linear(x: QuantizedRows, weight: W8A8Weight | Fp8Weight) -> torch.Tensor:
    k, n = weight.weight.shape
    device = x.values.device
    y = torch.empty((x.num_rows, n), dtype=x.dtype, device=device)
    has_descriptors = has_pdl(device) and k % 16 == 0 and weight.weight.stride(0) == 1
    config = w8a8_linear_config(x.num_rows, n, k, num_sms(device), has_descriptors=has_descriptors)
    x_values, w_values = x.values, weight.weight
    if config.descriptors:
        x_values = Tiles(x_values, (config.block_m, config.block_k))
        w_values = Tiles(weight.weight.t(), (config.block_n, config.block_k))
    parts, counters = workspace(device) if config.num_splits > 1 else (None, None)
    if parts is not None and isinstance(weight, W8A8Weight):
        parts = parts.view(torch.int32)
    launch(
        _w8a8_linear_kernel,
        (ceil_div(n, config.block_n) * ceil_div(x.num_rows, config.block_m), config.num_splits),
        x_values,
        x.scale,
        w_values,
        weight.scale,
        weight.bias,
        y,
        parts,
        counters,
        x.num_rows,
        n,
        k,
        *weight.weight.stride(),
        IS_INT8=weight.weight.dtype is torch.int8,
        HAS_BIAS=weight.bias is not None,
        EVEN_K=k % config.block_k == 0,
        DESCRIPTORS=config.descriptors,
        GROUP_M=config.group_m,
        NUM_SPLITS=config.num_splits,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        **launch_options(has_pdl(device)),
    )
    return y
