"""The layers of w4a16_linear.py for a few rows, bound by reading the 4 bit weights once.

    y[m, n] = sum over groups g of scale[g, n] * (sum over k in g of (nibble[k, n] - zero[g, n]) * x[m, k])     sums in fp32

(nibble - zero) is exact in 16 bits and goes into the matrix instruction as it is; the scale comes after it. With ZERO_AFTER so does the
zero: the instruction multiplies by 128 + nibble, and (128 + zero) times the sum of x, by an instruction with ones, is taken away in fp32.

The warps of a program share a strip's inputs, not its outputs: nothing is shared in the loop, so no warp waits for another, and only
their sums meet in shared memory. Weights and x go from memory into the registers of mma.m16n8k16 (rows of x are its 8 columns):

    strips     | step 0: warps 0 1 2 .. W-1 | step 1: warps 0 1 2 .. | ...        a warp's share: 16 S outputs x 64 R inputs
    program    takes tile after tile of 16 S outputs, two steps a turn; a turn ends with the loads for the next, of the next tile too

On sm_90 a program asks for its first two steps of weights before it waits for the kernel before it: they depend on nothing.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbotriton.backend.ops.operands import W4A16Tiles

from .launch import has_pdl, launch_options, num_sms
from .tuning import w4a16_skinny_config
from .w4a16_words import widen

__all__ = ["linear"]

MAX_ROWS = 8  # columns of the matrix instruction


@triton.jit
def _load_share(words_ptr, params_ptr, tile, k_step, end, N, K, GROUP_SIZE: tl.constexpr, S: tl.constexpr, R: tl.constexpr):
    """(words [32 W, S R, 4], params [32 W, 2 S]) of a tile's strips at each warp's step; zeros from step `end` on.

    k_step: [32 W], of a thread's warp
    """
    lane = tl.arange(0, k_step.shape[0]) % 32
    part = tl.arange(0, S * R)
    inputs = k_step * (128 * R) + lane * 4  # int32 words of 32 lanes for 64 inputs
    strips = (tile * S + part // R).to(tl.int64) * (2 * K) + part % R * 128
    ptrs = words_ptr + inputs[:, None, None] + strips[None, :, None] + tl.arange(0, 4)[None, None, :]
    words = tl.load(ptrs, mask=(k_step < end)[:, None, None], other=0)
    halves = tile * (16 * S) + tl.arange(0, 2 * S) * 8
    group = k_step * (64 * R) // GROUP_SIZE
    ptrs = params_ptr + (group * N + lane // 4)[:, None] + halves[None, :]
    return words, tl.load(ptrs, mask=(k_step < end)[:, None], other=0)


@triton.jit
def _load_x(pairs_ptr, row_starts, k_step, end, R: tl.constexpr):
    """Pairs of inputs [32 W, 8 R], int32, as the matrix instruction's lanes hold them; row_starts, k_step: [32 W]."""
    lane = tl.arange(0, k_step.shape[0]) % 32
    starts = row_starts + k_step * (32 * R) + lane % 4
    return tl.load(pairs_ptr + starts[:, None] + (tl.arange(0, 8 * R) * 4)[None, :], mask=(k_step < end)[:, None], other=0)


@triton.jit
def _multiply(
    acc, words, params, pairs, dtype: tl.constexpr, S: tl.constexpr, R: tl.constexpr, ZERO_AFTER: tl.constexpr, ASM: tl.constexpr
):
    """acc + a step's products: [32 W, 2 S, 2], fp32: lane 4 g + t has outputs g, 8 + g, ... and rows 2 t, 2 t + 1."""
    W: tl.constexpr = words.shape[0] // 32
    even = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    odd = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    x = tl.reshape(tl.join(even, odd), (W, 8, 4, 2 * R, 2, 2, 2))  # W row t k32 k16 k8 k1
    # inputs in the order in which triton 3.6 has operands made from 32 bit words: k32 k8 t k16 k1. Any order gives the same sums, but
    # another costs shuffles, as this one does in 3.9
    columns = tl.reshape(tl.permute(x, (0, 3, 5, 2, 4, 6, 1)), (W, 64 * R, 8))
    low, high = tl.split(tl.reshape(params, (32 * W, S, 2)))
    low = tl.reshape(tl.broadcast_to(low[:, :, None], (32 * W, S, R)), (32 * W, S * R))
    high = tl.reshape(tl.broadcast_to(high[:, :, None], (32 * W, S, R)), (32 * W, S * R))
    numbers = widen(words, low, high, dtype, "offset" if ZERO_AFTER else "steps", ASM)
    numbers = tl.reshape(numbers, (W, 8, 4, S, R, 2, 2, 2, 2, 2))  # W g t S R k32 k1 k16 k8 m8
    weight = tl.reshape(tl.permute(numbers, (0, 3, 9, 1, 4, 5, 8, 2, 7, 6)), (W, 16 * S, 64 * R))
    part = tl.dot(weight, columns)  # [W, 16 S, 8]
    part = tl.permute(tl.reshape(part, (W, 2 * S, 8, 4, 2)), (0, 2, 3, 1, 4))
    part = tl.reshape(part, (32 * W, 2 * S, 2))
    if ZERO_AFTER:
        sums = tl.dot(tl.full((W, 16, 64 * R), 1.0, dtype), columns)  # the sum of x in each of 16 outputs
        sums = tl.permute(tl.reshape(sums, (W, 1, 2, 8, 4, 2)), (0, 3, 4, 1, 2, 5))
        sums = tl.broadcast_to(tl.reshape(sums, (32 * W, 1, 2, 2)), (32 * W, S, 2, 2))
        part += _number(params, dtype)[:, :, None] * tl.reshape(sums, (32 * W, 2 * S, 2))
    return acc + part * _number(params >> 16, dtype)[:, :, None]


@triton.jit
def _number(bits, dtype: tl.constexpr):
    """The number of `dtype` in the low 16 bits, in fp32."""
    return (bits & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _w4a16_skinny_kernel(
    pairs_ptr,
    words_ptr,
    params_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    N,
    K,
    stride_pairs_row,
    GROUP_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ZERO_AFTER: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    first = tl.program_id(0)
    num_tiles = N // (16 * S)
    num_k_steps = K // (64 * R)
    num_pairs = tl.cdiv(num_k_steps, 2 * W)  # of steps, for each warp
    thread = tl.arange(0, 32 * W)
    warp = thread // 32
    # the instruction's columns past the last row repeat it, and are not stored
    row_starts = tl.minimum(thread % 32 // 4, num_rows - 1) * stride_pairs_row
    words_0, params_0 = _load_share(words_ptr, params_ptr, first, warp, num_k_steps, N, K, GROUP_SIZE, S, R)
    words_1, params_1 = _load_share(words_ptr, params_ptr, first, W + warp, num_k_steps, N, K, GROUP_SIZE, S, R)
    if PDL:
        gdc_wait()
    x_0 = _load_x(pairs_ptr, row_starts, warp, num_k_steps, R)
    x_1 = _load_x(pairs_ptr, row_starts, W + warp, num_k_steps, R)
    for tile in tl.range(first, num_tiles, tl.num_programs(0), num_stages=1):
        acc = tl.zeros((32 * W, 2 * S, 2), tl.float32)
        for pair in tl.range(num_pairs, num_stages=1):
            is_last = pair == num_pairs - 1  # then the next tile's first pair, if there is one
            next_tile = tl.where(is_last, tile + tl.num_programs(0), tile)
            k_step = tl.where(is_last, 0, pair + 1) * (2 * W) + warp
            end = tl.where(next_tile < num_tiles, num_k_steps, 0)
            acc = _multiply(acc, words_0, params_0, x_0, dtype, S, R, ZERO_AFTER, ASM)
            words_0, params_0 = _load_share(words_ptr, params_ptr, next_tile, k_step, end, N, K, GROUP_SIZE, S, R)
            x_0 = _load_x(pairs_ptr, row_starts, k_step, end, R)
            acc = _multiply(acc, words_1, params_1, x_1, dtype, S, R, ZERO_AFTER, ASM)
            words_1, params_1 = _load_share(words_ptr, params_ptr, next_tile, W + k_step, end, N, K, GROUP_SIZE, S, R)
            x_1 = _load_x(pairs_ptr, row_starts, W + k_step, end, R)
        y = tl.sum(tl.reshape(acc, (W, 32, 2 * S, 2)), axis=0)
        y = tl.permute(tl.reshape(y, (8, 4, S, 2, 2)), (2, 3, 0, 1, 4))  # S m8 g t row
        offs_m = tl.arange(0, 8)
        mask_m = offs_m < num_rows
        if GATED:  # outputs 0..7 of a strip are gates, 8..15 the ups of the same columns
            offs_n = tile * (8 * S) + tl.arange(0, 8 * S)
            gate, up = tl.split(tl.reshape(tl.permute(y, (0, 2, 3, 4, 1)), (8 * S, 8, 2)))
            if HAS_BIAS:
                gate += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
                up += tl.load(bias_ptr + N // 2 + offs_n).to(tl.float32)[:, None]
            gate = gate.to(dtype).to(tl.float32)
            y = gate / (1.0 + tl.exp(-gate)) * up.to(dtype).to(tl.float32)
            y_rows_ptr = y_ptr + offs_m[None, :] * (N // 2) + offs_n[:, None]
        else:
            offs_n = tile * (16 * S) + tl.arange(0, 16 * S)
            y = tl.reshape(y, (16 * S, 8))
            if HAS_BIAS:
                y += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
            y_rows_ptr = y_ptr + offs_m[None, :] * N + offs_n[:, None]
        tl.store(y_rows_ptr, y.to(dtype), mask=mask_m[None, :])


def linear(x: torch.Tensor, weight: W4A16Tiles) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [1 to 8 rows, in_features], the weight's dtype, contiguous inside a row; copied if its rows do not begin at multiples of 4 bytes

    Returns [num_rows, out_features], new, contiguous, in x's dtype; of a gated weight silu(gate) * up: [num_rows, out_features / 2].
    """
    num_rows, k = x.shape
    assert 1 <= num_rows <= MAX_ROWS, f"{num_rows} rows are outside [1, {MAX_ROWS}]"
    n = weight.out_features
    y = torch.empty((num_rows, n // 2 if weight.gated else n), dtype=x.dtype, device=x.device)
    if x.stride(0) % 2 or x.data_ptr() % 4:
        x = x.clone(memory_format=torch.contiguous_format)
    pairs = x.view(torch.int32)
    config = w4a16_skinny_config(weight.group_size, x.dtype is torch.bfloat16)
    num_tiles = n // (16 * config.strips)
    num_programs = min(num_tiles, config.programs_per_sm * num_sms(x.device))
    _w4a16_skinny_kernel[(num_programs,)](
        pairs,
        weight.words,
        weight.params,
        weight.bias,
        y,
        num_rows,
        n,
        k,
        pairs.stride(0),
        GROUP_SIZE=weight.group_size,
        HAS_BIAS=weight.bias is not None,
        GATED=weight.gated,
        ZERO_AFTER=config.zero_after,
        W=config.num_warps,
        S=config.strips,
        R=config.block_k // 64,
        ASM=x.is_cuda,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return y
