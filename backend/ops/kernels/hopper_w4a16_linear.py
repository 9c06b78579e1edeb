"""y = x W + b over 4 bit weights, as `w4a16_linear`, for Hopper: a warp that only fetches, and two groups of four warps of which one widens
weights while the matrix unit multiplies those of the other. Written in Gluon, where a group waits for nothing that the other does.

    fetching   | x, words, params of step 0 | of step 1 | ...  TMA into a ring of NUM_STAGES steps of 64 HALVES inputs, on into more tiles
    a group    y^T[64 S, BLOCK_M] += W[64 S, 64] x^T[64, BLOCK_M], HALVES times     W goes from words to registers, S strips of 16 outputs
                                                                                    a warp

    group 0    | widen 0 | products 0 | widen 1 | products 1 | ...         A product whose left operand lies in registers is handed over
    group 1              | widen 0 | products 0 | widen 1 | products 1     when the one before it begins, and its warps stand still until
                                                                           then: a group by itself would widen beside hardly more than one

The two products of a tile of 160 or 192 rows, 128 and HIGH more, multiply the same registers of weights.

A stage has two barriers: `full`, which its bytes complete, and `free`, at which the groups arrive when their products have read x. Step
number n of a program, over all its tiles, lies in stage n % NUM_STAGES. One copy brings the words of both groups, another their params.

How programs share the tiles, hopper_shares.py says. Or each has a part of a tile's inputs, and leaves the sum of all to a norm (SplitSums).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbotriton.backend.ops.operands import SplitSums, W4A16Tiles

from .fast_launch import Tiles, launch
from .hopper_math import rounded, sigmoid
from .hopper_shares import (
    PATIENCE,
    chunk_of,
    find_parts,
    leave_part,
    load_tile,
    my_part,
    my_share,
    my_tiles,
    sum_of_parts,
)
from .hopper_tuning import HopperTiles
from .hopper_w4a16_words import NUM_GROUPS, WARPS, params_of, weights_of, words_of
from .launch import has_pdl, launch_options
from .split_sum import NUM_COUNTERS, workspace
from .tuning import MAX_PARTS, ceil_div

__all__ = ["linear", "split_linear"]

COMPUTE_REGISTERS = gl.constexpr(232)  # a thread; a program is launched with 3 x 128 threads of 168
FETCH_REGISTERS = gl.constexpr(40)
ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)  # of x
WORDS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@gluon.constexpr_function
def _num_params(group_size, halves):
    """Of an output in a step: one for each of its groups of inputs there."""
    return 2 if halves == 2 and group_size == 64 else 1


@gluon.jit
def _fetch_weights(words_desc, params_desc, column, step, stage, rings, GROUP_SIZE: gl.constexpr, HALVES: gl.constexpr):
    """Words and params of a step of the tile whose outputs begin at `column`."""
    _x_tiles, _high_tiles, words_tiles, params_tiles, full, _free = rings
    load_tile(words_desc, [column // 16, step * 128 * HALVES], full.index(stage), words_tiles.index(stage))
    load_tile(params_desc, [step * 64 * HALVES // GROUP_SIZE, column], full.index(stage), params_tiles.index(stage))


@gluon.jit
def _fetch(
    x_desc, high_desc, words_desc, params_desc, work, rings,
    GROUP_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, HIGH: gl.constexpr, BLOCK_N: gl.constexpr, HALVES: gl.constexpr,
    NUM_STAGES: gl.constexpr, HAS_SHARES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The one warp that brings x, words and params. Weights of the first tile that find room at once are asked for before the wait for the
    kernel before. Nothing is divided in a step: that alone took as long as the groups have for it."""
    PER_TURN: gl.constexpr = 2 // HALVES
    BYTES: gl.constexpr = BLOCK_M * 128 * HALVES + BLOCK_N * (32 * HALVES + 4 * _num_params(GROUP_SIZE, HALVES))
    x_tiles, high_tiles, _words_tiles, _params_tiles, full, free = rings
    num_row_blocks, num_turns, _share, begin, end = work
    first_tile = begin // num_turns
    end_tile = (end + num_turns - 1) // num_turns
    first_step = (begin - first_tile * num_turns) * PER_TURN
    num_early = gl.minimum(gl.minimum(end - first_tile * num_turns, num_turns) * PER_TURN - first_step, NUM_STAGES)
    column = first_tile // num_row_blocks * BLOCK_N
    for number in range(num_early):
        mbarrier.expect(full.index(number), BYTES)
        _fetch_weights(words_desc, params_desc, column, first_step + number, number, rings, GROUP_SIZE, HALVES)
    if PDL:
        gdc_wait()
    number = 0
    for tile in range(first_tile, end_tile, 1 if HAS_SHARES else gl.num_programs(0)):
        column, row = tile // num_row_blocks * BLOCK_N, tile % num_row_blocks * BLOCK_M
        first = gl.maximum(begin - tile * num_turns, 0)
        last = gl.minimum(end - tile * num_turns, num_turns)
        for step in range(first * PER_TURN, last * PER_TURN):
            stage = number % NUM_STAGES
            if number >= num_early:
                mbarrier.wait(free.index(stage), (number // NUM_STAGES & 1) ^ 1)  # the first round passes at once
                mbarrier.expect(full.index(stage), BYTES)
                _fetch_weights(words_desc, params_desc, column, step, stage, rings, GROUP_SIZE, HALVES)
            for half in gl.static_range(HALVES):
                begin_k, place = (step * HALVES + half) * 64, stage * HALVES + half
                load_tile(x_desc, [row, begin_k], full.index(stage), x_tiles.index(place))
                if HIGH:
                    load_tile(high_desc, [row + BLOCK_M - HIGH, begin_k], full.index(stage), high_tiles.index(place))
            number += 1


@gluon.jit
def _multiply(acc, high, words, params, place, rings, HIGH: gl.constexpr, S: gl.constexpr, layout: gl.constexpr):
    """Issues the products of a half step whose rows of x lie at `place`."""
    x_tiles, high_tiles, _words_tiles, _params_tiles, _full, _free = rings
    a = weights_of(words, params, S, x_tiles.dtype, layout)
    acc = warpgroup_mma(a, x_tiles.index(place).permute((1, 0)), acc, is_async=True)
    if HIGH:
        high = warpgroup_mma(a, high_tiles.index(place).permute((1, 0)), high, is_async=True)
    return acc, high


@gluon.jit
def _step(
    acc, high, number, rings,
    GROUP: gl.constexpr, GROUP_SIZE: gl.constexpr, HIGH: gl.constexpr, S: gl.constexpr, HALVES: gl.constexpr,
    NUM_STAGES: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The products of step `number`."""
    PARAMS: gl.constexpr = _num_params(GROUP_SIZE, HALVES)
    _x_tiles, _high_tiles, words_tiles, params_tiles, full, free = rings
    stage = number % NUM_STAGES
    mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)
    first, last = words_of(words_tiles.index(stage), S, HALVES, GROUP)
    params = params_of(params_tiles.index(stage), 0, S, GROUP)
    acc, high = _multiply(acc, high, first, params, HALVES * stage, rings, HIGH, S, layout)
    if HALVES == 2:
        if PARAMS == 2:
            params = params_of(params_tiles.index(stage), 1, S, GROUP)
        acc, high = _multiply(acc, high, last, params, HALVES * stage + 1, rings, HIGH, S, layout)
    if HIGH:
        acc, high = warpgroup_mma_wait(0, [acc, high])
    else:
        acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(free.index(stage), count=1)
    return acc, high


@gluon.jit
def _store(chunk, bias_ptr, y_ptr, begin_n, begin_m, num_rows, N, HAS_BIAS: gl.constexpr, GATED: gl.constexpr, S: gl.constexpr):
    """Sums [64 S, CHUNK] of the outputs from begin_n on as rows of y from begin_m on."""
    CHUNK: gl.constexpr = chunk.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 16])
    OUT: gl.constexpr = (8 if GATED else 16) * WARPS * S
    ROWS: gl.constexpr = gl.BlockedLayout([8, 1], [OUT // 8, 256 // OUT], [1, WARPS], [0, 1])
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    chunk = gl.convert_layout(chunk, LAYOUT, assert_trivial=True)
    if HAS_BIAS:
        offs = begin_n + gl.arange(0, 16 * WARPS * S, layout=gl.SliceLayout(1, LAYOUT))
        if GATED:
            offs = offs // 16 * 8 + offs % 8 + offs // 8 % 2 * (N // 2)
        chunk += gl.load(bias_ptr + offs).to(gl.float32)[:, None]
    num_outputs = N
    if GATED:  # outputs 0..7 of a strip are gates, 8..15 the ups of the same columns
        pairs = gl.permute(gl.reshape(chunk, (WARPS * S, 2, 8, CHUNK)), (0, 2, 3, 1))
        gate, up = gl.split(gl.reshape(pairs, (OUT, CHUNK, 2)))
        gate = rounded(gate, dtype)
        chunk = gate * sigmoid(gate) * rounded(up, dtype)
        num_outputs = N // 2
        begin_n = begin_n // 2
    y = gl.convert_layout(chunk.to(dtype), ROWS)
    offs_n = begin_n + gl.arange(0, OUT, layout=gl.SliceLayout(1, ROWS))
    offs_m = begin_m + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, ROWS))
    y_rows = offs_m.to(gl.int64) * num_outputs
    gl.store(y_ptr + (y_rows[None, :] + offs_n[:, None]), y, mask=(offs_m < num_rows)[None, :])


@gluon.jit
def _compute(
    operands,
    GROUP: gl.constexpr, GROUP_SIZE: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
    BLOCK_M: gl.constexpr, HIGH: gl.constexpr, S: gl.constexpr, HALVES: gl.constexpr, NUM_STAGES: gl.constexpr,
    HAS_SHARES: gl.constexpr, LEAVES_PARTS: gl.constexpr, PATIENCE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 S outputs of each tile, the first, the second, ... so many."""
    OUT: gl.constexpr = 16 * WARPS * S
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M - HIGH, 16])
    CHUNK: gl.constexpr = 32 if BLOCK_M > 128 else 16
    CHUNK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 16])
    NUM_CHUNKS: gl.constexpr = BLOCK_M // CHUNK
    bias_ptr, y_ptr, parts_ptr, counters_ptr, num_rows, N, work, rings = operands
    num_row_blocks, num_turns, share, begin, end = work
    if HAS_SHARES:
        parts_ptr += GROUP * OUT * BLOCK_M * 2 * gl.num_programs(0)
        counters_ptr += GROUP * num_row_blocks * (N // (NUM_GROUPS * OUT))
    first_tile = begin // num_turns
    end_tile = (end + num_turns - 1) // num_turns
    if PDL:
        gdc_wait()
    number = 0
    seen = begin * 0
    seen_first = seen
    for tile in range(first_tile, end_tile, 1 if HAS_SHARES else gl.num_programs(0)):
        first = gl.maximum(begin - tile * num_turns, 0)
        last = gl.minimum(end - tile * num_turns, num_turns)
        acc = gl.zeros([OUT, BLOCK_M - HIGH], gl.float32, LAYOUT)
        high = acc
        if HIGH:
            high = gl.zeros([OUT, HIGH], gl.float32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HIGH, 16]))
        for _ in range((last - first) * (2 // HALVES)):
            acc, high = _step(acc, high, number, rings, GROUP, GROUP_SIZE, HIGH, S, HALVES, NUM_STAGES, LAYOUT)
            number += 1
        begin_n = (tile // num_row_blocks * NUM_GROUPS + GROUP) * OUT
        begin_m = tile % num_row_blocks * BLOCK_M
        part_ptr = y_ptr
        if LEAVES_PARTS:
            part_ptr += first // share * num_rows * N
        is_stored = True
        if HAS_SHARES:
            is_stored = last - first == num_turns
        if is_stored:
            for index in gl.static_range(NUM_CHUNKS):
                chunk = chunk_of(acc, high, index, CHUNK)
                _store(chunk, bias_ptr, part_ptr, begin_n, begin_m + index * CHUNK, num_rows, N, HAS_BIAS, GATED, S)
        elif HAS_SHARES:
            slot = 2 * (begin // share) + (first == 0).to(gl.int32)
            seen = leave_part(acc, high, parts_ptr, counters_ptr + tile, slot, S, BLOCK_M, CHUNK, WARPS)
            seen_first = gl.where(tile == first_tile, seen, seen_first)
    if HAS_SHARES:
        for tile in range(first_tile, end_tile, gl.maximum(end_tile - 1 - first_tile, 1)):
            if (begin > tile * num_turns) | (end < (tile + 1) * num_turns):
                seen_here = gl.where(tile == first_tile, seen_first, seen)
                chunks, first_slot, head, num_parts = find_parts(counters_ptr, seen_here, tile, work, NUM_CHUNKS, PATIENCE)
                begin_n = (tile // num_row_blocks * NUM_GROUPS + GROUP) * OUT
                begin_m = tile % num_row_blocks * BLOCK_M
                for index in range(NUM_CHUNKS):
                    if chunks >> index & 1 != 0:
                        sums = sum_of_parts(
                            parts_ptr, index, first_slot, head, num_parts, gl.float32, S, BLOCK_M, CHUNK, CHUNK_LAYOUT, WARPS
                        )
                        _store(sums, bias_ptr, y_ptr, begin_n, begin_m + index * CHUNK, num_rows, N, HAS_BIAS, GATED, S)


@gluon.jit(do_not_specialize=["num_rows"])
def _hopper_w4a16_kernel(
    x_desc,
    high_desc,
    words_desc,
    params_desc,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counters_ptr,
    num_rows,
    N,
    K,
    GROUP_SIZE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    HIGH: gl.constexpr,
    S: gl.constexpr,
    HALVES: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    HAS_SHARES: gl.constexpr,
    LEAVES_PARTS: gl.constexpr,
    PATIENCE: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    BLOCK_N: gl.constexpr = NUM_GROUPS * 16 * WARPS * S
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES * HALVES, BLOCK_M - HIGH, 64], x_desc.layout)
    high_tiles = x_tiles
    if HIGH:
        high_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES * HALVES, HIGH, 64], high_desc.layout)
    words_tiles = gl.allocate_shared_memory(gl.int32, [NUM_STAGES, BLOCK_N // 16, 128 * HALVES], words_desc.layout)
    params_tiles = gl.allocate_shared_memory(gl.int32, [NUM_STAGES, _num_params(GROUP_SIZE, HALVES), BLOCK_N], params_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=NUM_GROUPS)
    fence_async_shared()
    num_row_blocks = (num_rows + BLOCK_M - 1) // BLOCK_M
    num_turns = K // 128
    if LEAVES_PARTS:
        share, begin, end = my_part(N // BLOCK_N, num_turns)
    elif HAS_SHARES:
        share, begin, end = my_share(num_row_blocks * (N // BLOCK_N), num_turns)
    else:
        share, begin, end = my_tiles(num_row_blocks * (N // BLOCK_N), num_turns)
    work = (num_row_blocks, num_turns, share, begin, end)
    rings = (x_tiles, high_tiles, words_tiles, params_tiles, full, free)
    operands = (bias_ptr, y_ptr, parts_ptr, counters_ptr, num_rows, N, work, rings)
    # fmt: off
    gl.warp_specialize(
        [
            (_compute, (operands, 0, GROUP_SIZE, HAS_BIAS, GATED, BLOCK_M, HIGH, S, HALVES, NUM_STAGES,
                        HAS_SHARES, LEAVES_PARTS, PATIENCE, PDL)),
            (_compute, (operands, 1, GROUP_SIZE, HAS_BIAS, GATED, BLOCK_M, HIGH, S, HALVES, NUM_STAGES,
                        HAS_SHARES, LEAVES_PARTS, PATIENCE, PDL)),
            (_fetch, (x_desc, high_desc, words_desc, params_desc, work, rings,
                      GROUP_SIZE, BLOCK_M, HIGH, BLOCK_N, HALVES, NUM_STAGES, HAS_SHARES, PDL)),
        ],
        [WARPS, 1],
        [COMPUTE_REGISTERS, FETCH_REGISTERS],
    )
    # fmt: on


def linear(x: torch.Tensor, weight: W4A16Tiles, config: HopperTiles) -> torch.Tensor:
    """Operands and results as `w4a16_linear`'s and `w4a16_gate_up`'s, which assert them.

    x: fp16|bf16, at least one row; in_features a multiple of 128, out_features of config.block_n
    """
    num_rows, k = x.shape
    n = weight.out_features
    y = torch.empty((num_rows, n // 2 if weight.gated else n), dtype=x.dtype, device=x.device)
    num_tiles = ceil_div(num_rows, config.block_m) * (n // config.block_n)
    if config.whole:
        _launch(x, weight, y, config, min(config.num_programs, num_tiles))
        return y
    assert 2 * config.num_programs * config.block_n * config.block_m <= MAX_PARTS, "no room for the parts of so many programs"
    assert NUM_GROUPS.value * num_tiles <= NUM_COUNTERS, "no counters for so many tiles"
    _launch(x, weight, y, config, min(config.num_programs, num_tiles * (k // 128)), has_shares=True)
    return y


def split_linear(x: torch.Tensor, weight: W4A16Tiles, config: HopperTiles, num_parts: int) -> SplitSums:
    """As `linear`, of config.block_m rows or fewer, without a bias or a gate: each program has a part of one tile, one of num_parts, or of
    fewer, so that none is without inputs."""
    assert not weight.gated
    assert weight.bias is None
    num_rows, k = x.shape
    assert num_rows <= config.block_m
    n = weight.out_features
    num_parts = ceil_div(k // 128, ceil_div(k // 128, num_parts))
    parts = torch.empty((num_parts, num_rows, n), dtype=torch.float32, device=x.device)
    _launch(x, weight, parts, config, n // config.block_n * num_parts, leaves_parts=True)
    return SplitSums(parts, x.dtype)


def _launch(
    x: torch.Tensor,
    weight: W4A16Tiles,
    y: torch.Tensor,
    config: HopperTiles,
    num_programs: int,
    *,
    has_shares: bool = False,
    leaves_parts: bool = False,
) -> None:
    """y: [num_rows, columns], or [num_parts, num_rows, columns]."""
    if x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    num_rows, k = x.shape
    n, low, high = weight.out_features, config.low, config.high
    parts, counters = workspace(x.device) if has_shares else (None, None)
    assert num_programs > 0, "a launch of no program would leave y as it is"
    launch(
        _hopper_w4a16_kernel,
        (num_programs,),
        Tiles(x, (low, 64), ROWS),
        Tiles(x, (high or low, 64), ROWS),
        Tiles(weight.words.view(n // 16, 2 * k), (config.block_n // 16, 128 * config.halves), WORDS),
        Tiles(weight.params, (2 if weight.group_size < 64 * config.halves else 1, config.block_n), WORDS),
        weight.bias,
        y,
        parts,
        counters,
        num_rows,
        n,
        k,
        GROUP_SIZE=weight.group_size,
        HAS_BIAS=weight.bias is not None,
        GATED=weight.gated,
        BLOCK_M=config.block_m,
        HIGH=high,
        S=config.strips,
        HALVES=config.halves,
        NUM_STAGES=config.num_stages,
        HAS_SHARES=has_shares,
        LEAVES_PARTS=leaves_parts,
        PATIENCE=PATIENCE,
        num_warps=WARPS.value,
        **launch_options(has_pdl(x.device)),
    )
