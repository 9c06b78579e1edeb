"""y = x W + b over int8 weights and rows, as `w8a8_linear`, for Hopper and batches of decodes. In Gluon: a warp that only fetches, and
three groups of four warps that only multiply, each 64 outputs of a tile of 192 by all of its rows, up to 256.

    fetching   | x, W of step 0 | of step 1 | ...            TMA into a ring of NUM_STAGES steps of 128 inputs, on into the next tile

    group 0    y^T[  0 ..  63, BLOCK_M] += W[  0 ..  63, 128] x^T[128, BLOCK_M]      int32; x of a step is fetched once for all three
    group 1    y^T[ 64 .. 127, BLOCK_M] += W[ 64 .. 127, 128] x^T[128, BLOCK_M]
    group 2    y^T[128 .. 191, BLOCK_M] += W[128 .. 191, 128] x^T[128, BLOCK_M]

What passes through the L2 cache bounds such a product: W once for all rows up to 256, and x once for every 192 outputs. More outputs are
not to be had: a thread has 160 registers, and its sums take 128. They are two products, LOW rows and the others, since triton knows no
int8 product of 256 rows.

A stage has two barriers: `full`, which its bytes complete, and `free`, at which the groups arrive when their products of the step have
ended, which they wait for at once: three groups keep the matrix unit busy by turns, and the next bytes are asked for as early as can be.
Step number n of a program, over all its tiles, lies in stage n % NUM_STAGES.

A program first takes whole tiles, as many as all programs can have; those that remain are shared as hopper_shares.py says, each group with
parts and counters of its own. Outputs past the last are zeros in a tile that is fetched; a group that has only such stores nothing.

    tiles     0 1 2 3 | 4 5 6 7 | 8 9      of 4 programs: two whole tiles each, then equal shares of the turns of tiles 8 and 9
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbotriton.backend.ops.operands import QuantizedRows, W8A8Weight

from .fast_launch import Tiles, launch
from .hopper_shares import PATIENCE, chunk_of, find_parts, leave_part, load_tile, my_share, sum_of_parts
from .hopper_tuning import HOPPER_INT8_BLOCK_N, HopperInt8Tiles
from .launch import has_pdl, launch_options
from .split_sum import NUM_COUNTERS, workspace
from .tuning import MAX_PARTS, ceil_div

__all__ = ["linear"]

NUM_GROUPS = gl.constexpr(3)
GROUP_N = gl.constexpr(64)  # outputs of a group: what the matrix instruction of four warps takes
BLOCK_N = gl.constexpr(HOPPER_INT8_BLOCK_N)
LOW = gl.constexpr(128)
CHUNK = gl.constexpr(32)  # rows that are added up at once
STORED = gl.constexpr(16)  # rows that are stored at once: no more registers are left beside a tile's sums
WARPS = gl.constexpr(4)
COMPUTE_REGISTERS = gl.constexpr(160)  # a thread; a program is launched with 4 x 128 threads of 128
FETCH_REGISTERS = gl.constexpr(32)
BYTES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


@gluon.jit
def _locate(number, work):
    """(tile, turn) of this program's step `number`."""
    _num_row_blocks, num_turns, num_whole, _share, begin, _end = work
    is_whole = number < num_whole * num_turns
    at = gl.where(is_whole, number, begin + number - num_whole * num_turns)
    index = at // num_turns
    tile = gl.where(is_whole, index * gl.num_programs(0) + gl.program_id(0), num_whole * gl.num_programs(0) + index)
    return tile, at % num_turns


@gluon.jit
def _fetch_weight(weight_desc, column, turn, stage, rings, BLOCK_M: gl.constexpr):
    """W of a step, for each group its own. The bytes that complete its stage are those of x too."""
    _x_tiles, _high_tiles, weight_tiles, full, _free = rings
    mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * 128)
    for group in gl.static_range(NUM_GROUPS):
        place = weight_tiles.index(stage * NUM_GROUPS + group)
        load_tile(weight_desc, [column + group * GROUP_N, turn * 128], full.index(stage), place)


@gluon.jit
def _fetch(x_desc, high_desc, weight_desc, work, rings, BLOCK_M: gl.constexpr, NUM_STAGES: gl.constexpr, PDL: gl.constexpr):
    """The one warp that brings x and W. W of the first tile that finds room at once is asked for before the wait for the kernel before.
    Nothing is divided in a step: that alone would take as long as the groups have for it."""
    x_tiles, high_tiles, _weight_tiles, full, free = rings
    num_row_blocks, num_turns, num_whole, _share, begin, end = work
    num_steps = num_whole * num_turns + end - begin
    tile, first = _locate(begin * 0, work)
    num_early = gl.minimum(gl.minimum(num_steps, num_turns - first), NUM_STAGES)
    for number in range(num_early):
        _fetch_weight(weight_desc, tile // num_row_blocks * BLOCK_N, first + number, number, rings, BLOCK_M)
    if PDL:
        gdc_wait()
    number = begin * 0
    while number < num_steps:
        tile, first = _locate(number, work)
        column, row = tile // num_row_blocks * BLOCK_N, tile % num_row_blocks * BLOCK_M
        for turn in range(first, gl.minimum(first + num_steps - number, num_turns)):
            stage = number % NUM_STAGES
            if number >= num_early:
                mbarrier.wait(free.index(stage), (number // NUM_STAGES & 1) ^ 1)  # the first round passes at once
                _fetch_weight(weight_desc, column, turn, stage, rings, BLOCK_M)
            load_tile(x_desc, [row, turn * 128], full.index(stage), x_tiles.index(stage))
            load_tile(high_desc, [row + LOW, turn * 128], full.index(stage), high_tiles.index(stage))
            number += 1


@gluon.jit
def _step(acc, high, number, rings, GROUP: gl.constexpr, NUM_STAGES: gl.constexpr):
    """The products of step `number`."""
    x_tiles, high_tiles, weight_tiles, full, free = rings
    stage = number % NUM_STAGES
    mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)
    weight = weight_tiles.index(stage * NUM_GROUPS + GROUP)
    acc = warpgroup_mma(weight, x_tiles.index(stage).permute((1, 0)), acc, is_async=True)
    high = warpgroup_mma(weight, high_tiles.index(stage).permute((1, 0)), high, is_async=True)
    acc, high = warpgroup_mma_wait(0, [acc, high])
    mbarrier.arrive(free.index(stage), count=1)
    return acc, high


@gluon.jit
def _store(chunk, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, begin_n, begin_m, num_rows, N, HAS_BIAS: gl.constexpr):
    """Sums [64, rows] of the outputs from begin_n on as rows of y from begin_m on. What is a scalar is added up first: the offsets of 16
    chunks, computed before the loop over tiles, would spill."""
    NUM_ROWS: gl.constexpr = chunk.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, NUM_ROWS, 32])
    ROWS: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
    numbers = gl.convert_layout(chunk, LAYOUT, assert_trivial=True).to(gl.float32)
    outputs = gl.arange(0, GROUP_N, layout=gl.SliceLayout(1, LAYOUT))
    rows = gl.arange(0, NUM_ROWS, layout=gl.SliceLayout(0, LAYOUT))
    x_scale = gl.load(x_scale_ptr + begin_m + rows, mask=rows < num_rows - begin_m, other=0.0)
    numbers = numbers * x_scale[None, :] * gl.load(scale_ptr + begin_n + outputs)[:, None]
    if HAS_BIAS:
        numbers += gl.load(bias_ptr + begin_n + outputs).to(gl.float32)[:, None]
    y = gl.convert_layout(numbers.to(y_ptr.dtype.element_ty), ROWS)
    offs_n = gl.arange(0, GROUP_N, layout=gl.SliceLayout(1, ROWS))
    offs_m = gl.arange(0, NUM_ROWS, layout=gl.SliceLayout(0, ROWS))
    corner_ptr = y_ptr + (begin_m.to(gl.int64) * N + begin_n)
    gl.store(corner_ptr + ((offs_m * N)[None, :] + offs_n[:, None]), y, mask=(offs_m < num_rows - begin_m)[None, :])


@gluon.jit
def _compute(
    x_scale_ptr, scale_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr, num_rows, N, work, rings,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, NUM_STAGES: gl.constexpr,
    PATIENCE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps: outputs 64 GROUP to 64 GROUP + 63 of each tile."""
    LOW_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, LOW, 32])
    HIGH_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M - LOW, 32])
    CHUNK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 32])
    NUM_CHUNKS: gl.constexpr = BLOCK_M // CHUNK
    num_row_blocks, num_turns, num_whole, share, begin, end = work
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    parts_ptr += GROUP * GROUP_N * BLOCK_M * 2 * num_programs
    counters_ptr += GROUP * num_programs
    num_steps = num_whole * num_turns + end - begin
    if PDL:
        gdc_wait()
    number = program * 0
    seen = number
    seen_first = number
    while number < num_steps:
        tile, first = _locate(number, work)
        num_here = gl.minimum(num_steps - number, num_turns - first)
        acc = gl.zeros([GROUP_N, LOW], gl.int32, LOW_LAYOUT)
        high = gl.zeros([GROUP_N, BLOCK_M - LOW], gl.int32, HIGH_LAYOUT)
        for _ in range(num_here):
            acc, high = _step(acc, high, number, rings, GROUP, NUM_STAGES)
            number += 1
        begin_n = tile // num_row_blocks * BLOCK_N + GROUP * GROUP_N
        begin_m = tile % num_row_blocks * BLOCK_M
        if begin_n < N:
            if num_here == num_turns:
                for index in gl.static_range(BLOCK_M // STORED):
                    chunk = chunk_of(acc, high, index, STORED)
                    row = begin_m + index * STORED
                    _store(chunk, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, begin_n, row, num_rows, N, HAS_BIAS)
            else:
                slot = 2 * program + (first == 0).to(gl.int32)
                shared = tile - num_whole * num_programs
                seen = leave_part(acc, high, parts_ptr, counters_ptr + shared, slot, 1, BLOCK_M, CHUNK, WARPS)
                seen_first = gl.where(shared * num_turns + first == begin, seen, seen_first)
    shares = (num_row_blocks, num_turns, share, begin, end)
    first_shared, end_shared = begin // num_turns, (end + num_turns - 1) // num_turns
    for shared in range(first_shared, end_shared, gl.maximum(end_shared - 1 - first_shared, 1)):
        tile = num_whole * num_programs + shared
        begin_n = tile // num_row_blocks * BLOCK_N + GROUP * GROUP_N
        begin_m = tile % num_row_blocks * BLOCK_M
        if ((begin > shared * num_turns) | (end < (shared + 1) * num_turns)) & (begin_n < N):
            seen_here = gl.where(shared == first_shared, seen_first, seen)
            chunks, first_slot, sharer, num_parts = find_parts(counters_ptr, seen_here, shared, shares, NUM_CHUNKS, PATIENCE)
            for index in range(NUM_CHUNKS):
                if chunks >> index & 1 != 0:
                    sums = sum_of_parts(
                        parts_ptr, index, first_slot, sharer, num_parts, gl.int32, 1, BLOCK_M, CHUNK, CHUNK_LAYOUT, WARPS
                    )
                    row = begin_m + index * CHUNK
                    _store(sums, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, begin_n, row, num_rows, N, HAS_BIAS)


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
    BLOCK_M: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PATIENCE: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES, LOW, 128], x_desc.layout)
    high_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES, BLOCK_M - LOW, 128], high_desc.layout)
    weight_tiles = gl.allocate_shared_memory(weight_desc.dtype, [NUM_STAGES * NUM_GROUPS, GROUP_N, 128], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=NUM_GROUPS)
    fence_async_shared()
    num_row_blocks = (num_rows + BLOCK_M - 1) // BLOCK_M
    num_turns = K // 128
    num_tiles = num_row_blocks * ((N + BLOCK_N - 1) // BLOCK_N)
    num_whole = num_tiles // gl.num_programs(0)  # tiles of one program
    share, begin, end = my_share(1, num_tiles % gl.num_programs(0), num_turns)
    work = (num_row_blocks, num_turns, num_whole, share, begin, end)
    rings = (x_tiles, high_tiles, weight_tiles, full, free)
    # fmt: off
    gl.warp_specialize(
        [
            (_compute, (x_scale_ptr, scale_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr, num_rows, N, work, rings,
                        0, HAS_BIAS, BLOCK_M, NUM_STAGES, PATIENCE, PDL)),
            (_compute, (x_scale_ptr, scale_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr, num_rows, N, work, rings,
                        1, HAS_BIAS, BLOCK_M, NUM_STAGES, PATIENCE, PDL)),
            (_compute, (x_scale_ptr, scale_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr, num_rows, N, work, rings,
                        2, HAS_BIAS, BLOCK_M, NUM_STAGES, PATIENCE, PDL)),
            (_fetch, (x_desc, high_desc, weight_desc, work, rings, BLOCK_M, NUM_STAGES, PDL)),
        ],
        [WARPS, WARPS, 1],
        [COMPUTE_REGISTERS, COMPUTE_REGISTERS, FETCH_REGISTERS],
    )
    # fmt: on


def linear(x: QuantizedRows, weight: W8A8Weight, config: HopperInt8Tiles) -> torch.Tensor:
    """Operands and result as `w8a8_linear`'s, which asserts them.

    x: at least one row   weight: contiguous along in_features, a multiple of 128; out_features a multiple of 64
    """
    k, n = weight.weight.shape
    device, num_rows = x.values.device, x.num_rows
    num_tiles = ceil_div(num_rows, config.block_m) * ceil_div(n, BLOCK_N.value)
    assert 2 * config.num_programs * BLOCK_N.value * config.block_m <= MAX_PARTS, "no room for the parts of so many programs"
    assert NUM_GROUPS.value * config.num_programs <= NUM_COUNTERS, "no counters for so many programs"
    y = torch.empty((num_rows, n), dtype=x.dtype, device=device)
    parts, counters = workspace(device)
    launch(
        _hopper_w8a8_kernel,
        (min(config.num_programs, num_tiles * (k // 128)),),
        Tiles(x.values, (LOW.value, 128), BYTES),
        Tiles(x.values, (config.block_m - LOW.value, 128), BYTES),
        Tiles(weight.weight.t(), (GROUP_N.value, 128), BYTES),
        x.scale,
        weight.scale,
        weight.bias,
        y,
        parts.view(torch.int32),
        counters,
        num_rows,
        n,
        k,
        HAS_BIAS=weight.bias is not None,
        BLOCK_M=config.block_m,
        NUM_STAGES=config.num_stages,
        PATIENCE=PATIENCE,
        num_warps=WARPS.value,
        **launch_options(has_pdl(device)),
    )
    return y
