"""y = x W + b over int8 weights and rows, as `w8a8_linear`, or silu(gate) * up of such, for Hopper and batches of decodes. In Gluon: a
warp that only fetches, and two groups of four warps that only multiply, and wait for nothing of each other.

    fetching   | x, W of step 0 | of step 1 | ...   TMA into a ring of NUM_STAGES steps of 128 inputs, on into the next tile
    a group    y^T[64 S, BLOCK_M] += W[64 S, 128] x^T[128, BLOCK_M]   int32; a step's products begin while those before them end

A tile is 128 S outputs, of which a group has the first or the second half. S = 1: with up to 256 rows, so that one program reads W: LOW and
HIGH more, two products, since triton knows none of int8 with 256 rows. S = 2: with up to 128; the row blocks of a column are neighbours,
which read W together. A stage has two barriers: `full`, which its bytes complete, and `free`, at which the groups arrive when their
products have read it. Step number n of a program, over all its tiles, lies in stage n % NUM_STAGES.

How programs have the tiles is in hopper_shares.py: whole ones, equal shares of all, or a part of one each, whose sum is left to what reads
it (SplitSums).

A tile with a gate is 64 S gates and their ups, which the copy engine brings eight by eight in turn, so that a gate and its up, outputs r
and r + 8 of a strip of 16, are of one thread, which stores silu(gate) * up.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbotriton.backend.ops.operands import QuantizedRows, SplitSums, W8A8Weight

from .fast_launch import Tiles, launch
from .hopper_math import rounded, sigmoid
from .hopper_shares import PATIENCE, chunk_of, find_parts, leave_part, load_tile, my_part, my_share, my_tiles, sum_of_parts
from .hopper_tuning import HopperTiles
from .launch import has_pdl, launch_options
from .split_sum import NUM_COUNTERS, workspace
from .tuning import MAX_PARTS, ceil_div

__all__ = ["gate_up", "linear", "split_linear"]

NUM_GROUPS = gl.constexpr(2)
WARPS = gl.constexpr(4)  # of a group
COMPUTE_REGISTERS = gl.constexpr(232)  # a thread; a program is launched with 3 x 128 threads of 168
FETCH_REGISTERS = gl.constexpr(40)
MAX_LOW = 128  # rows of a product

BYTES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
GATED_BYTES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=4)


@gluon.jit
def _fetch_weights(weight_desc, column, turn, stage, rings, GATED: gl.constexpr):
    """Of the tile whose outputs begin at `column`."""
    _x_tiles, _high_tiles, weight_tiles, full, _free = rings
    if GATED:
        load_tile(weight_desc, [column // 16, 0, 0, turn * 128], full.index(stage), weight_tiles.index(stage))
    else:
        load_tile(weight_desc, [column, turn * 128], full.index(stage), weight_tiles.index(stage))


@gluon.jit
def _fetch(
    x_desc, high_desc, weight_desc, work, rings,
    GATED: gl.constexpr, BLOCK_M: gl.constexpr, HIGH: gl.constexpr, BLOCK_N: gl.constexpr, NUM_STAGES: gl.constexpr,
    HAS_SHARES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The one warp that brings x and W. W of the first tile that finds room at once is asked for before the wait for the kernel before.
    Nothing is divided in a step: that alone took as long as the products."""
    STAGE_BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * 128
    x_tiles, high_tiles, _weight_tiles, full, free = rings
    num_row_blocks, num_turns, _share, begin, end = work
    first_tile = begin // num_turns
    end_tile = (end + num_turns - 1) // num_turns
    first_turn = begin - first_tile * num_turns
    num_early = gl.minimum(gl.minimum(end - first_tile * num_turns, num_turns) - first_turn, NUM_STAGES)
    first_column = first_tile // num_row_blocks * BLOCK_N
    for number in range(num_early):
        mbarrier.expect(full.index(number), STAGE_BYTES)
        _fetch_weights(weight_desc, first_column, first_turn + number, number, rings, GATED)
    if PDL:
        gdc_wait()
    number = 0
    for tile in range(first_tile, end_tile, 1 if HAS_SHARES else gl.num_programs(0)):
        column, row = tile // num_row_blocks * BLOCK_N, tile % num_row_blocks * BLOCK_M
        first = gl.maximum(begin - tile * num_turns, 0)
        last = gl.minimum(end - tile * num_turns, num_turns)
        for turn in range(first, last):
            stage = number % NUM_STAGES
            if number >= num_early:
                mbarrier.wait(free.index(stage), (number // NUM_STAGES & 1) ^ 1)  # the first round passes at once
                mbarrier.expect(full.index(stage), STAGE_BYTES)
                _fetch_weights(weight_desc, column, turn, stage, rings, GATED)
            load_tile(x_desc, [row, turn * 128], full.index(stage), x_tiles.index(stage))
            if HIGH:
                load_tile(high_desc, [row + BLOCK_M - HIGH, turn * 128], full.index(stage), high_tiles.index(stage))
            number += 1


@gluon.jit
def _step(
    acc, high, number, is_first, rings, GROUP: gl.constexpr, OUT: gl.constexpr, HIGH: gl.constexpr, NUM_STAGES: gl.constexpr
):
    """Issues the products of step `number`; those of the step before, of the same tile unless is_first, have ended."""
    x_tiles, high_tiles, weight_tiles, full, free = rings
    stage = number % NUM_STAGES
    mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)
    weight = weight_tiles.index(stage).reshape([NUM_GROUPS * OUT, 128]).slice(GROUP * OUT, OUT, 0)
    acc = warpgroup_mma(weight, x_tiles.index(stage).permute((1, 0)), acc, is_async=True)
    if HIGH:
        high = warpgroup_mma(weight, high_tiles.index(stage).permute((1, 0)), high, is_async=True)
        acc, high = warpgroup_mma_wait(2, [acc, high])
    else:
        acc = warpgroup_mma_wait(1, [acc])
    mbarrier.arrive(free.index((number + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=is_first == 0)
    return acc, high


@gluon.jit
def _outputs(begin_n, N, OUT: gl.constexpr, GATED: gl.constexpr, layout: gl.constexpr):
    """Of a group whose first is begin_n: columns of x W."""
    outputs = begin_n + gl.arange(0, OUT, layout=gl.SliceLayout(1, layout))
    if GATED:
        outputs = outputs // 16 * 8 + outputs % 8 + outputs // 8 % 2 * (N // 2)
    return outputs


@gluon.jit
def _x_scales(x_scale_ptr, begin_m, num_rows, CHUNK: gl.constexpr, layout: gl.constexpr):
    rows = begin_m + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))
    return gl.load(x_scale_ptr + rows, mask=rows < num_rows, other=0.0)


@gluon.jit
def _store(chunk, x_scale, scale, bias_ptr, y_ptr, begin_n, begin_m, num_rows, N, HAS_BIAS: gl.constexpr, GATED: gl.constexpr):
    """Sums [64 S, CHUNK] of the outputs from begin_n on as rows of y from begin_m on."""
    WIDTH: gl.constexpr = 4 if y_ptr.dtype.element_ty == gl.float32 else 8  # 16 bytes
    OUT: gl.constexpr = chunk.shape[0]
    STORED: gl.constexpr = OUT // 2 if GATED else OUT
    CHUNK: gl.constexpr = chunk.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 32])
    ROWS: gl.constexpr = gl.BlockedLayout([WIDTH, 1], [STORED // WIDTH, 32 * WIDTH // STORED], [1, WARPS], [0, 1])
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    numbers = gl.convert_layout(chunk, LAYOUT, assert_trivial=True).to(gl.float32)
    numbers = numbers * x_scale[None, :] * scale[:, None]
    if HAS_BIAS:
        numbers += gl.load(bias_ptr + _outputs(begin_n, N, OUT, GATED, LAYOUT)).to(gl.float32)[:, None]
    num_columns = N
    if GATED:
        pairs = gl.permute(gl.reshape(numbers, (OUT // 16, 2, 8, CHUNK)), (0, 2, 3, 1))
        gate, up = gl.split(gl.reshape(pairs, (STORED, CHUNK, 2)))
        gate = rounded(gate, dtype)
        numbers = gate * sigmoid(gate) * rounded(up, dtype)
        num_columns = N // 2
        begin_n = begin_n // 2
    y = gl.convert_layout(numbers.to(dtype), ROWS)
    offs_n = begin_n + gl.arange(0, STORED, layout=gl.SliceLayout(1, ROWS))
    offs_m = begin_m + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, ROWS))
    y_rows = offs_m.to(gl.int64) * num_columns
    gl.store(y_ptr + (y_rows[None, :] + offs_n[:, None]), y, mask=(offs_m < num_rows)[None, :])


@gluon.jit
def _compute(
    x_scale_ptr, scale_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr, num_rows, N, work, rings,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr, BLOCK_M: gl.constexpr, HIGH: gl.constexpr, S: gl.constexpr,
    NUM_STAGES: gl.constexpr, HAS_SHARES: gl.constexpr, LEAVES_PARTS: gl.constexpr, PATIENCE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps: the first or the second 64 S outputs of each tile."""
    OUT: gl.constexpr = 16 * WARPS * S
    LOW_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M - HIGH, 32])
    CHUNK: gl.constexpr = 32 // S  # rows that are added up or stored at once
    # A chunk's x scales are asked for before the chunk before it is stored; with more rows they would find no register.
    AHEAD: gl.constexpr = BLOCK_M <= 192
    CHUNK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 32])
    NUM_CHUNKS: gl.constexpr = BLOCK_M // CHUNK
    num_row_blocks, num_turns, share, begin, end = work
    _x_tiles, _high_tiles, _weight_tiles, _full, free = rings
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
        begin_n = (tile // num_row_blocks * NUM_GROUPS + GROUP) * OUT
        begin_m = tile % num_row_blocks * BLOCK_M
        scale = gl.load(scale_ptr + _outputs(begin_n, N, OUT, GATED, CHUNK_LAYOUT))  # on their way while products run
        next_x_scale = _x_scales(x_scale_ptr, begin_m, num_rows, CHUNK, CHUNK_LAYOUT)
        acc = gl.zeros([OUT, BLOCK_M - HIGH], gl.int32, LOW_LAYOUT)
        high = acc
        if HIGH:
            high = gl.zeros([OUT, HIGH], gl.int32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HIGH, 32]))
        for turn in range(first, last):
            acc, high = _step(acc, high, number, (turn == first).to(gl.int32), rings, GROUP, OUT, HIGH, NUM_STAGES)
            number += 1
        if HIGH:
            acc, high = warpgroup_mma_wait(0, [acc, high])
        else:
            acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index((number + NUM_STAGES - 1) % NUM_STAGES), count=1)
        part_ptr = y_ptr
        if LEAVES_PARTS:
            part_ptr += first // share * num_rows * N
        is_stored = True
        if HAS_SHARES:
            is_stored = last - first == num_turns
        if is_stored:
            for index in gl.static_range(NUM_CHUNKS):
                chunk = chunk_of(acc, high, index, CHUNK)
                row, x_scale = begin_m + index * CHUNK, next_x_scale
                if AHEAD:
                    if index + 1 < NUM_CHUNKS:
                        next_x_scale = _x_scales(x_scale_ptr, row + CHUNK, num_rows, CHUNK, CHUNK_LAYOUT)
                elif index > 0:
                    x_scale = _x_scales(x_scale_ptr, row, num_rows, CHUNK, CHUNK_LAYOUT)
                _store(chunk, x_scale, scale, bias_ptr, part_ptr, begin_n, row, num_rows, N, HAS_BIAS, GATED)
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
                scale = gl.load(scale_ptr + _outputs(begin_n, N, OUT, GATED, CHUNK_LAYOUT))
                for index in range(NUM_CHUNKS):
                    if chunks >> index & 1 != 0:
                        sums = sum_of_parts(
                            parts_ptr, index, first_slot, head, num_parts, gl.int32, S, BLOCK_M, CHUNK, CHUNK_LAYOUT, WARPS
                        )
                        row = begin_m + index * CHUNK
                        x_scale = _x_scales(x_scale_ptr, row, num_rows, CHUNK, CHUNK_LAYOUT)
                        _store(sums, x_scale, scale, bias_ptr, y_ptr, begin_n, row, num_rows, N, HAS_BIAS, GATED)


@gluon.jit(do_not_specialize=["num_rows"])
def _hopper_w8a8_kernel(
    x_desc,
    high_desc,
    weight_desc,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counters_ptr,
    num_rows,
    N,
    K,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    HIGH: gl.constexpr,
    S: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    HAS_SHARES: gl.constexpr,
    LEAVES_PARTS: gl.constexpr,
    PATIENCE: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    BLOCK_N: gl.constexpr = NUM_GROUPS * 16 * WARPS * S
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES, BLOCK_M - HIGH, 128], x_desc.layout)
    high_tiles = x_tiles
    if HIGH:
        high_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES, HIGH, 128], high_desc.layout)
    weight_tiles = gl.allocate_shared_memory(
        weight_desc.dtype, [NUM_STAGES, BLOCK_N // 16, 2, 8, 128] if GATED else [NUM_STAGES, BLOCK_N, 128], weight_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=NUM_GROUPS)
    fence_async_shared()
    num_row_blocks = (num_rows + BLOCK_M - 1) // BLOCK_M
    num_turns = K // 128
    num_tiles = num_row_blocks * (N // BLOCK_N)
    if LEAVES_PARTS:
        share, begin, end = my_part(num_tiles, num_turns)
    elif HAS_SHARES:
        share, begin, end = my_share(num_tiles, num_turns)
    else:
        share, begin, end = my_tiles(num_tiles, num_turns)
    work = (num_row_blocks, num_turns, share, begin, end)
    rings = (x_tiles, high_tiles, weight_tiles, full, free)
    # fmt: off
    gl.warp_specialize(
        [
            (_compute, (x_scale_ptr, scale_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr, num_rows, N, work, rings,
                        0, HAS_BIAS, GATED, BLOCK_M, HIGH, S, NUM_STAGES, HAS_SHARES, LEAVES_PARTS, PATIENCE, PDL)),
            (_compute, (x_scale_ptr, scale_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr, num_rows, N, work, rings,
                        1, HAS_BIAS, GATED, BLOCK_M, HIGH, S, NUM_STAGES, HAS_SHARES, LEAVES_PARTS, PATIENCE, PDL)),
            (_fetch, (x_desc, high_desc, weight_desc, work, rings, GATED, BLOCK_M, HIGH, BLOCK_N, NUM_STAGES, HAS_SHARES, PDL)),
        ],
        [WARPS, 1],
        [COMPUTE_REGISTERS, FETCH_REGISTERS],
    )
    # fmt: on


def linear(x: QuantizedRows, weight: W8A8Weight, config: HopperTiles) -> torch.Tensor:
    """Operands and result as `w8a8_linear`'s, which asserts them.

    x: at least one row   weight: contiguous along in_features, a multiple of 128; out_features of config.block_n
    """
    k, n = weight.weight.shape
    y = torch.empty((x.num_rows, n), dtype=x.dtype, device=x.values.device)
    num_tiles = ceil_div(x.num_rows, config.block_m) * (n // config.block_n)
    if config.whole:
        _launch(x, weight, y, config, min(config.num_programs, num_tiles))
        return y
    assert 2 * config.num_programs * config.block_n * config.block_m <= MAX_PARTS, "no room for the parts of so many programs"
    assert NUM_GROUPS.value * num_tiles <= NUM_COUNTERS, "no counters for so many tiles"
    _launch(x, weight, y, config, min(config.num_programs, num_tiles * (k // 128)), has_shares=True)
    return y


def split_linear(x: QuantizedRows, weight: W8A8Weight, config: HopperTiles, num_parts: int) -> SplitSums:
    """As `linear`, without a bias: each program has a part of one tile, one of num_parts or fewer, so that none is without inputs."""
    assert weight.bias is None
    k, n = weight.weight.shape
    num_parts = ceil_div(k // 128, ceil_div(k // 128, num_parts))
    num_tiles = ceil_div(x.num_rows, config.block_m) * (n // config.block_n)
    parts = torch.empty((num_parts, x.num_rows, n), dtype=torch.float32, device=x.values.device)
    _launch(x, weight, parts, config, num_tiles * num_parts, leaves_parts=True)
    return SplitSums(parts, x.dtype)


def gate_up(x: QuantizedRows, weight: W8A8Weight, config: HopperTiles) -> torch.Tensor:
    """As `linear` with a weight of [gate | up] and a config of whole tiles: silu(x gate) * (x up), both rounded to x's dtype before:
    [num_rows, out_features / 2]."""
    n = weight.weight.shape[1]
    assert config.whole, "a gate and its up are of one program"
    y = torch.empty((x.num_rows, n // 2), dtype=x.dtype, device=x.values.device)
    num_tiles = ceil_div(x.num_rows, config.block_m) * (n // config.block_n)
    _launch(x, weight, y, config, min(config.num_programs, num_tiles), gated=True)
    return y


def _launch(
    x: QuantizedRows,
    weight: W8A8Weight,
    y: torch.Tensor,
    config: HopperTiles,
    num_programs: int,
    *,
    gated: bool = False,
    has_shares: bool = False,
    leaves_parts: bool = False,
) -> None:
    """y: [num_rows, columns], or [num_parts, num_rows, out_features]."""
    k, n = weight.weight.shape
    high = config.block_m - min(config.low, MAX_LOW)
    parts, counters = workspace(y.device) if has_shares else (None, None)
    weights = Tiles(weight.weight.t(), (config.block_n, 128), BYTES)
    if gated:  # eight gates, their ups, the next eight, ...
        row = weight.weight.stride(1)
        by_eights = weight.weight.as_strided((n // 16, 2, 8, k), (8 * row, n // 2 * row, row, 1))
        weights = Tiles(by_eights, (config.block_n // 16, 2, 8, 128), GATED_BYTES)
    assert num_programs > 0, "a launch of no program would leave y as it is"
    launch(
        _hopper_w8a8_kernel,
        (num_programs,),
        Tiles(x.values, (config.block_m - high, 128), BYTES),
        Tiles(x.values, (high or config.block_m, 128), BYTES),
        weights,
        x.scale,
        weight.scale,
        weight.bias,
        y,
        None if parts is None else parts.view(torch.int32),
        counters,
        x.num_rows,
        n,
        k,
        HAS_BIAS=weight.bias is not None,
        GATED=gated,
        BLOCK_M=config.block_m,
        HIGH=high,
        S=config.strips,
        NUM_STAGES=config.num_stages,
        HAS_SHARES=has_shares,
        LEAVES_PARTS=leaves_parts,
        PATIENCE=PATIENCE,
        num_warps=WARPS.value,
        **launch_options(has_pdl(y.device)),
    )
