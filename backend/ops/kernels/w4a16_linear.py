"""y = x W + b over 4 bit weights (AWQ, arXiv:2306.00978), and silu(gate) * up of W = [gate | up].

    W[k, n] = round((nibble[k, n] - zero[g, n]) * scale[g, n]),   g = k // group_size;  the bracket is exact, sums are fp32

W is the left operand of the matrix instruction and goes from its packed words into the instruction's registers, through no shared
memory: `packing.pack_fragments` stores it so that the 16 bytes that a thread loads are its share of four 16 x 16 operand tiles.

    strip of 16 outputs   | 64 inputs: 32 lanes x 4 words | next 64 | ...        a strip a warp
    program               y^T tile [16 W, BLOCK_M] += W tile [16 W, 64 R] x^T tile, step after step

NUM_SPLITS programs share the inputs of a tile.

AHEAD steps' weights are in registers or under way: after each product the step that comes AHEAD steps later is asked for in its place, the
first before the wait for the kernel before this one. 0: they come with x through the pipeline in shared memory. With SCALE_AFTER the
matrix instruction multiplies by nibble - zero, and each step's sums by the scale, in fp32: nearer to the formula, whose rounding of
weights is left out, and cheaper up to 32 rows.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbotriton.backend.ops.operands import Unadded, W4A16Tiles

from . import hopper_w4a16_linear
from .fast_launch import Tiles, launch
from .hopper_tuning import hopper_w4a16_config, hopper_w4a16_parts, takes_hopper_w4a16
from .launch import chosen, has_pdl, is_hopper, launch_options, num_sms
from .split_sum import sum_of_splits, workspace
from .tuning import ceil_div, w4a16_linear_config
from .w4a16_words import load_weights, numbers_of

__all__ = ["w4a16_gate_up", "w4a16_linear", "w4a16_split_linear"]


@triton.jit
def _finished(acc):
    """acc, when the matrix instructions have ended: they read the weights from registers that the next step writes, and triton 3.6 lets
    the last of them run on beyond a step (seen as wrong sums on sm_90). No instruction by itself."""
    return tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, is_pure=False, pack=1)


@triton.jit
def _multiply(acc, words, params, x, dtype: tl.constexpr, SCALE_AFTER: tl.constexpr, ASM: tl.constexpr):
    """acc + a step's products: [16 W, BLOCK_M], fp32."""
    if SCALE_AFTER:
        W: tl.constexpr = words.shape[0] // 32
        M8: tl.constexpr = acc.shape[1] // 8
        part = tl.dot(numbers_of(words, params, dtype, "steps", ASM), x)
        if ASM:
            part = _finished(part)
        # a thread's scales are those of the outputs whose sums it has: lane 4 g + t, outputs g and 8 + g, rows 2 t and 2 t + 1 of 8
        scale = (params >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (32 * W, 2, 2 * M8)), (W, 8, 4, 2, M8, 2))
        acc += part * tl.reshape(tl.permute(scale, (0, 3, 1, 4, 2, 5)), acc.shape)
    else:
        acc = tl.dot(numbers_of(words, params, dtype, "weights", ASM), x, acc=acc)
        if ASM:
            acc = _finished(acc)
    return acc


@triton.jit
def _load_x(x_ptr, begin_m, num_rows, step, stride_row, DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """x^T of a step: [BLOCK_K, BLOCK_M]. Rows past the end are zeros, not asked for: all programs would ask for the same bytes of the L2
    cache."""
    if DESCRIPTORS:
        x = x_ptr.load([begin_m, step * BLOCK_K]).T
    else:
        offs_m = begin_m + tl.arange(0, BLOCK_M)
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m[None, :] * stride_row + offs_k[:, None], mask=(offs_m < num_rows)[None, :], other=0.0)
    return x


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
    AHEAD: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    BLOCK_K: tl.constexpr = 64 * R
    TURN: tl.constexpr = AHEAD if AHEAD > 0 else 1  # steps
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)
    num_tiles = tl.num_programs(0) // NUM_SPLITS
    split = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    begin_m = tile % num_row_blocks * BLOCK_M
    strip = tile // num_row_blocks * W
    num_turns = K // (TURN * BLOCK_K)
    turns = tl.cdiv(num_turns, NUM_SPLITS)
    begin = split * turns
    end = tl.minimum(begin + turns, num_turns)
    acc = tl.zeros((16 * W, BLOCK_M), tl.float32)
    ahead = ()
    for step in tl.static_range(AHEAD):
        ahead += load_weights(words_ptr, params_ptr, strip, TURN * begin + step, begin < end, N, K, GROUP_SIZE, W, R)
    if PDL:
        gdc_wait()
    for turn in tl.range(begin, end, num_stages=NUM_STAGES):
        if AHEAD > 0:
            next_turn = ()
            for step in tl.static_range(AHEAD):
                x = _load_x(x_ptr, begin_m, num_rows, TURN * turn + step, stride_x_row, DESCRIPTORS, BLOCK_M, BLOCK_K)
                acc = _multiply(acc, ahead[2 * step], ahead[2 * step + 1], x, dtype, SCALE_AFTER, ASM)
                next_turn += load_weights(
                    words_ptr, params_ptr, strip, TURN * (turn + 1) + step, turn + 1 < end, N, K, GROUP_SIZE, W, R
                )
            ahead = next_turn
        else:
            words, params = load_weights(words_ptr, params_ptr, strip, turn, None, N, K, GROUP_SIZE, W, R)
            x = _load_x(x_ptr, begin_m, num_rows, turn, stride_x_row, DESCRIPTORS, BLOCK_M, BLOCK_K)
            acc = _multiply(acc, words, params, x, dtype, SCALE_AFTER, ASM)
    is_last = True
    if NUM_SPLITS > 1:
        acc, is_last = sum_of_splits(acc, parts_ptr, counters_ptr, tile, split, NUM_SPLITS)
    if is_last:
        _store(acc, bias_ptr, y_ptr, strip * 16, begin_m, num_rows, N, HAS_BIAS, GATED, dtype)


@triton.jit
def _store(acc, bias_ptr, y_ptr, begin_n, begin_m, num_rows, N, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, dtype: tl.constexpr):
    """The sums of a tile, [BLOCK_N, BLOCK_M], as rows of y."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    offs_m = begin_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    if GATED:  # outputs 0..7 of a strip are gates, 8..15 the ups of the same columns
        offs_n = begin_n // 2 + tl.arange(0, BLOCK_N // 2)
        pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
        gate, up = tl.split(tl.reshape(pairs, (BLOCK_N // 2, BLOCK_M, 2)))
        if HAS_BIAS:
            gate += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
            up += tl.load(bias_ptr + N // 2 + offs_n).to(tl.float32)[:, None]
        gate = gate.to(dtype).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * up.to(dtype).to(tl.float32)
        y_rows_ptr = y_ptr + offs_m.to(tl.int64)[None, :] * (N // 2) + offs_n[:, None]
        tl.store(y_rows_ptr, y.to(dtype), mask=mask_m[None, :])
    else:
        offs_n = begin_n + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
        y_rows_ptr = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
        tl.store(y_rows_ptr, acc.to(dtype), mask=mask_m[None, :])


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


def w4a16_split_linear(x: torch.Tensor, weight: W4A16Tiles) -> Unadded:
    """As `w4a16_linear`, before what adds up SplitSums."""
    (num_rows, k), n, device = x.shape, weight.out_features, x.device
    if weight.bias is None and chosen(takes_hopper_w4a16, num_rows, n, k, weight.group_size, is_hopper=is_hopper(device)):
        num_parts = chosen(hopper_w4a16_parts, num_rows, n, k, num_sms(device))
        if num_parts > 1:
            _assert_fits(x, weight)
            config = chosen(hopper_w4a16_config, num_rows, n, num_sms(device))
            return hopper_w4a16_linear.split_linear(x, weight, config, num_parts)
    return w4a16_linear(x, weight)


def _assert_fits(x: torch.Tensor, weight: W4A16Tiles) -> None:
    assert x.stride(1) == 1, "x must be contiguous inside a row"
    assert x.shape[1] == weight.in_features, f"x has {x.shape[1]} columns"
    assert x.dtype is weight.dtype, f"the weight was packed for {weight.dtype}"


def _linear(x: torch.Tensor, weight: W4A16Tiles) -> torch.Tensor:
    _assert_fits(x, weight)
    num_rows, k = x.shape
    n = weight.out_features
    device = x.device
    if chosen(takes_hopper_w4a16, num_rows, n, k, weight.group_size, is_hopper=is_hopper(device)):
        return hopper_w4a16_linear.linear(x, weight, chosen(hopper_w4a16_config, num_rows, n, num_sms(device)))
    y = torch.empty((num_rows, n // 2 if weight.gated else n), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    config = w4a16_linear_config(num_rows, n, k, weight.group_size, num_sms(x.device), has_descriptors=has_pdl(x.device))
    rows = x
    if config.descriptors:
        if x.stride(0) % 8 or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        rows = Tiles(x, (config.block_m, config.block_k))
    parts, counters = workspace(x.device) if config.num_splits > 1 else (None, None)
    num_tiles = ceil_div(num_rows, config.block_m) * (n // config.block_n)
    launch(
        _w4a16_linear_kernel,
        (num_tiles * config.num_splits,),
        rows,
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
        AHEAD=config.ahead,
        SCALE_AFTER=config.scale_after,
        DESCRIPTORS=config.descriptors,
        BLOCK_M=config.block_m,
        W=config.num_warps,
        R=config.block_k // 64,
        NUM_STAGES=config.num_stages,
        ASM=x.is_cuda,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return y
