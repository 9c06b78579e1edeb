"""y = x W + b over 4 bit weights (AWQ, arXiv:2306.00978), and silu(gate) * up of W = [gate | up]; the weights alone for many rows.

    W[k, n] = round((nibble[k, n] - zero[g, n]) * scale[g, n]),   g = k // group_size;  the bracket is exact, sums are fp32

W is the left operand of the matrix instruction and goes from its packed words into the instruction's registers, through no shared
memory: `packing.pack_fragments` stores it so that the 16 bytes that a thread loads are its share of four 16 x 16 operand tiles.

    strip of 16 outputs   | 64 inputs: 32 lanes x 4 words | next 64 | ...        W16 strips a program, a warp each
    program               y^T tile [16 W16, BLOCK_M] += W tile [16 W16, 64 R] x^T tile; NUM_SPLITS programs share the inputs
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbotriton.backend.ops.operands import W4A16Tiles

from .launch import has_pdl, launch_options, num_sms, wait_for_previous
from .split_sum import sum_of_splits, workspace
from .tuning import ceil_div, w4a16_linear_config
from .w4a16_words import widen

__all__ = ["dequantize_w4a16", "w4a16_gate_up", "w4a16_linear"]


@triton.jit
def _weights(words, low, high, dtype: tl.constexpr, ASM: tl.constexpr):
    """The weights of a tile: [16 W16, 64 R] in `dtype`.

    words: [R, 32 W16, 4], int32; low, high: [32 W16], int32: scale << 16 | negated offset zero of outputs 0..7 and 8..15 of a strip
    """
    R: tl.constexpr = words.shape[0]
    STRIPS: tl.constexpr = words.shape[1] // 32
    numbers = widen(words, low[None, :], high[None, :], dtype, "weights", ASM)
    numbers = tl.reshape(numbers, (R, STRIPS, 8, 4, 2, 2, 2, 2, 2))  # R strip g t k32 k1 k16 k8 m8
    return tl.reshape(tl.permute(numbers, (1, 8, 2, 0, 4, 6, 7, 3, 5)), (16 * STRIPS, 64 * R))


@triton.jit
def _finished(acc):
    """acc, when the matrix instructions have ended: they read the weights from registers that the next step writes, and triton 3.6 lets
    the last of them run on beyond a step (seen as wrong sums on sm_90). No instruction by itself."""
    return tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["num_rows"])
def _w4a16_linear_kernel(
    x_ptr,
    words_ptr,
    params_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counters_ptr,
    num_rows,
    N,
    K,
    stride_x_row,
    GROUP_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    W16: tl.constexpr,
    R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BLOCK_N: tl.constexpr = 16 * W16
    BLOCK_K: tl.constexpr = 64 * R
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    num_steps = K // BLOCK_K
    steps = tl.cdiv(num_steps, NUM_SPLITS)
    begin = split * steps
    end = tl.minimum(begin + steps, num_steps)
    # rows past the end repeat the last, and are not stored
    x_rows_ptr = x_ptr + tl.minimum(offs_m, num_rows - 1)[None, :] * stride_x_row + tl.arange(0, BLOCK_K)[:, None]
    thread = tl.arange(0, 32 * W16)
    strip = tile * W16 + thread // 32
    lane_ptr = words_ptr + strip.to(tl.int64)[None, :, None] * (2 * K) + (thread % 32)[None, :, None] * 4
    lane_ptr += tl.arange(0, R)[:, None, None] * 128 + tl.arange(0, 4)[None, None, :]
    params_ptr += strip * 16 + thread % 32 // 4
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(begin, end, num_stages=NUM_STAGES):
        words = tl.load(lane_ptr + step * (128 * R))
        x = tl.load(x_rows_ptr + step * BLOCK_K)
        group = step * BLOCK_K // GROUP_SIZE
        low = tl.load(params_ptr + group * N)
        high = tl.load(params_ptr + group * N + 8)
        acc = tl.dot(_weights(words, low, high, dtype, ASM), x, acc=acc)
        if ASM:
            acc = _finished(acc)
    is_last = True
    if NUM_SPLITS > 1:
        counter = tile * tl.num_programs(0) + tl.program_id(0)
        acc, is_last = sum_of_splits(acc, parts_ptr, counters_ptr, counter, split, NUM_SPLITS)
    if is_last:
        mask_m = offs_m < num_rows
        if GATED:  # outputs 0..7 of a strip are gates, 8..15 the ups of the same columns
            offs_n = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            pairs = tl.permute(tl.reshape(acc, (W16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
            gate, up = tl.split(tl.reshape(pairs, (BLOCK_N // 2, BLOCK_M, 2)))
            if HAS_BIAS:
                gate += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
                up += tl.load(bias_ptr + N // 2 + offs_n).to(tl.float32)[:, None]
            gate = gate.to(dtype).to(tl.float32)
            y = gate / (1.0 + tl.exp(-gate)) * up.to(dtype).to(tl.float32)
            y_rows_ptr = y_ptr + offs_m.to(tl.int64)[None, :] * (N // 2) + offs_n[:, None]
            tl.store(y_rows_ptr, y.to(dtype), mask=mask_m[None, :])
        else:
            offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            if HAS_BIAS:
                acc += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
            y_rows_ptr = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
            tl.store(y_rows_ptr, acc.to(dtype), mask=mask_m[None, :])


@triton.jit
def _dequantize_w4a16_kernel(
    words_ptr,
    params_ptr,
    out_ptr,
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    GATED: tl.constexpr,
    W16: tl.constexpr,
    R: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    BLOCK_K: tl.constexpr = 64 * R
    step = tl.program_id(0)
    tile = tl.program_id(1)
    thread = tl.arange(0, 32 * W16)
    strip = tile * W16 + thread // 32
    lane_ptr = words_ptr + strip.to(tl.int64)[None, :, None] * (2 * K) + (thread % 32)[None, :, None] * 4
    lane_ptr += (step * R + tl.arange(0, R))[:, None, None] * 128 + tl.arange(0, 4)[None, None, :]
    params_ptr += step * BLOCK_K // GROUP_SIZE * N + strip * 16 + thread % 32 // 4
    weight = _weights(tl.load(lane_ptr), tl.load(params_ptr), tl.load(params_ptr + 8), out_ptr.dtype.element_ty, ASM)
    place = tile * 16 * W16 + tl.arange(0, 16 * W16)
    column = place
    if GATED:
        column = place // 16 * 8 + place % 8 + place % 16 // 8 * (N // 2)
    offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(out_ptr + column.to(tl.int64)[:, None] * K + offs_k[None, :], weight)


def w4a16_linear(x: torch.Tensor, weight: W4A16Tiles) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [num_rows, in_features], the weight's dtype, rows of any stride, contiguous inside a row

    Returns [num_rows, out_features], new, contiguous, in x's dtype. num_rows may be 0.
    """
    assert not weight.gated, "a gated weight's columns are interleaved: w4a16_gate_up"
    return _linear(x, weight)


def w4a16_gate_up(x: torch.Tensor, weight: W4A16Tiles) -> torch.Tensor:
    """As `w4a16_linear` with columns [gate | up], and silu(gate) * up: [num_rows, out_features / 2]."""
    assert weight.gated, "the columns are not those of gate and up"
    return _linear(x, weight)


def _linear(x: torch.Tensor, weight: W4A16Tiles) -> torch.Tensor:
    num_rows, k = x.shape
    assert x.stride(1) == 1, "x must be contiguous inside a row"
    assert k == weight.in_features, f"x has {k} columns"
    assert x.dtype is weight.dtype, f"the weight was packed for {weight.dtype}"
    n = weight.out_features
    y = torch.empty((num_rows, n // 2 if weight.gated else n), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    config = w4a16_linear_config(num_rows, n, k, weight.group_size, num_sms(x.device))
    parts, counters = workspace(x.device) if config.num_splits > 1 else (None, None)
    grid = (ceil_div(num_rows, config.block_m), n // (16 * config.num_warps), config.num_splits)
    _w4a16_linear_kernel[grid](
        x,
        weight.words,
        weight.params,
        weight.bias,
        y,
        parts,
        counters,
        num_rows,
        n,
        k,
        x.stride(0),
        GROUP_SIZE=weight.group_size,
        HAS_BIAS=weight.bias is not None,
        GATED=weight.gated,
        NUM_SPLITS=config.num_splits,
        BLOCK_M=config.block_m,
        W16=config.num_warps,
        R=config.block_k // 64,
        NUM_STAGES=config.num_stages,
        ASM=x.is_cuda,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return y


def dequantize_w4a16(weight: W4A16Tiles) -> torch.Tensor:
    """[in_features, out_features] in the weight's dtype, new, contiguous along in_features, columns in natural order."""
    n, k = weight.out_features, weight.in_features
    out = torch.empty((n, k), dtype=weight.dtype, device=weight.words.device)
    rounds = 2 if weight.group_size % 128 == 0 else 1
    _dequantize_w4a16_kernel[(k // (64 * rounds), n // 64)](
        weight.words,
        weight.params,
        out,
        n,
        k,
        GROUP_SIZE=weight.group_size,
        GATED=weight.gated,
        W16=4,
        R=rounds,
        ASM=out.is_cuda,
        num_warps=4,
        **launch_options(has_pdl(out.device)),
    )
    return out.t()
