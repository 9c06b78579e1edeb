"""Linear layers over a batch of decodes for Hopper, as `narrow_linear`'s: silu(gate) * up of x [gate | up], and sums left in parts.

The time is that of reading W once, so bytes of it are to be under way all the time, also while the kernel before this one ends. In Gluon: a
warp that only fetches, and one or two groups of four warps that only multiply.

    fetching    | W0 W1 W2 W3 |  wait for the kernel before  | x0 x1 x2 x3 | W4 x4 | W5 x5 | ...    TMA into a ring of NUM_STAGES steps
    computing                                                | y^T += W0 x0^T | y^T += W1 x1^T | ...        a step's products begin while
                                                                                                            those before them end
    W           [gates and ups, columns, K], or [1, outputs, K]
    a group     S x 64 of its rows: 64 outputs, or 64 gates with their ups (S = 2), which end in the same thread

A program has one tile and one part of its inputs. Of more programs than there are multiprocessors two run on each, and one of the next
kernel begins there when either ends. A gated layer of more than 64 rows is bound by what passes from the L2 cache to the multiprocessors:
the two groups of a tile read the same x. Its tile of 96 rows is one of 64 and HIGH more: two products.

A stage has two barriers: `full`, which its bytes complete, and `free`, at which the groups arrive when their products have read it. Step
number n lies in stage n % NUM_STAGES. Rows, columns and inputs past the end are zeros in a tile, and are not stored.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbotriton.backend.ops.operands import SplitSums, Unadded

from .fast_launch import Tiles, launch
from .hopper_math import rounded, sigmoid
from .hopper_shares import chunk_of, load_tile
from .hopper_tuning import HopperNarrowConfig, hopper_narrow_config
from .launch import has_pdl, launch_options, num_sms
from .tuning import ceil_div

__all__ = ["gate_up", "split_linear"]

WARPS = gl.constexpr(4)  # of a group
CHUNK = gl.constexpr(16)  # rows that are stored at once
FETCH_REGISTERS = gl.constexpr(24)  # a thread; what is left of 2 x 128 threads of LAUNCH_REGISTERS goes to the others
PAIR_REGISTERS = gl.constexpr(232)  # of a second group; a program of two is launched with 3 x 128 threads of 168
#: A thread's at launch, of one group. Two programs then leave room for a norm beside them: with 128, steps are up to 4 % longer (H200:
#: docs/perf-log.md).
LAUNCH_REGISTERS = 96
ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)  # of x
WEIGHTS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


@gluon.jit
def _fetch_weights(weight_desc, column, step, stage, rings, GROUPS: gl.constexpr):
    """W of a step, for each group its own."""
    _x_tiles, _high_tiles, weight_tiles, full, _free = rings
    for group in gl.static_range(GROUPS):
        load_tile(weight_desc, [0, column + group * 64, step * 64], full.index(stage), weight_tiles.index(stage * GROUPS + group))


@gluon.jit
def _fetch_rows(x_desc, high_desc, step, stage, rings, LOW: gl.constexpr, HIGH: gl.constexpr):
    """x of a step."""
    x_tiles, high_tiles, _weight_tiles, full, _free = rings
    load_tile(x_desc, [0, step * 64], full.index(stage), x_tiles.index(stage))
    if HIGH:
        load_tile(high_desc, [LOW, step * 64], full.index(stage), high_tiles.index(stage))


@gluon.jit
def _fetch(
    x_desc, high_desc, weight_desc, column, begin, num_steps, rings,
    BLOCK_M: gl.constexpr, HIGH: gl.constexpr, GROUPS: gl.constexpr, S: gl.constexpr, TOGETHER: gl.constexpr, NUM_STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The one warp that brings W and x. W that finds room at once is asked for before the wait for the kernel before."""
    LOW: gl.constexpr = BLOCK_M - HIGH
    STEP_BYTES: gl.constexpr = (64 * S * GROUPS + BLOCK_M) * 128
    _x_tiles, _high_tiles, _weight_tiles, full, free = rings
    num_early = gl.minimum(num_steps, NUM_STAGES)
    for number in range(num_early):
        mbarrier.expect(full.index(number), STEP_BYTES)
        _fetch_weights(weight_desc, column, begin + number, number, rings, GROUPS)
    if PDL:
        gdc_wait()
    for number in range(num_early):
        _fetch_rows(x_desc, high_desc, begin + number, number, rings, LOW, HIGH)
    for first in range(num_early, num_steps, TOGETHER):
        for number in range(first, gl.minimum(first + TOGETHER, num_steps)):
            stage = number % NUM_STAGES
            mbarrier.wait(free.index(stage), number // NUM_STAGES - 1 & 1)
            mbarrier.expect(full.index(stage), STEP_BYTES)
        for number in range(first, gl.minimum(first + TOGETHER, num_steps)):
            _fetch_weights(weight_desc, column, begin + number, number % NUM_STAGES, rings, GROUPS)
        for number in range(first, gl.minimum(first + TOGETHER, num_steps)):
            _fetch_rows(x_desc, high_desc, begin + number, number % NUM_STAGES, rings, LOW, HIGH)


@gluon.jit
def _store(chunk, bias_ptr, y_ptr, begin_n, begin_m, num_rows, N, adds_bias, HAS_BIAS: gl.constexpr, GATED: gl.constexpr):
    """Sums [64 S, CHUNK] of the columns from begin_n on as rows of y from begin_m on. N: columns of y."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 16])
    COLUMNS: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    chunk = gl.convert_layout(chunk, LAYOUT, assert_trivial=True)
    if HAS_BIAS:
        offs = gl.arange(0, chunk.shape[0], layout=gl.SliceLayout(1, LAYOUT))
        columns = begin_n + offs % 64
        bias = gl.load(bias_ptr + offs // 64 * N + columns, mask=(columns < N) & adds_bias, other=0.0)
        chunk += bias.to(gl.float32)[:, None]
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(chunk, (2, 64, CHUNK)), (1, 2, 0)))
        gate = rounded(gate, dtype)
        chunk = gate * sigmoid(gate) * rounded(up, dtype)
    y = gl.convert_layout(chunk.to(dtype), COLUMNS)
    offs_n = begin_n + gl.arange(0, 64, layout=gl.SliceLayout(1, COLUMNS))
    offs_m = begin_m + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, COLUMNS))
    y_ptrs = y_ptr + (offs_m * N)[None, :] + offs_n[:, None]
    gl.store(y_ptrs, y, mask=(offs_m < num_rows)[None, :] & (offs_n < N)[:, None])


@gluon.jit
def _compute(
    bias_ptr, y_ptr, num_rows, N, column, part, num_steps, rings,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr, BLOCK_M: gl.constexpr, HIGH: gl.constexpr,
    S: gl.constexpr, NUM_STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply, and store this program's part of the sums of 64 columns, or all of 64 gated ones."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M - HIGH, 16])
    x_tiles, high_tiles, weight_tiles, full, free = rings
    if PDL:
        gdc_wait()
    acc = gl.zeros([64 * S, BLOCK_M - HIGH], gl.float32, LAYOUT)
    high = acc
    if HIGH:
        high = gl.zeros([64 * S, HIGH], gl.float32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HIGH, 16]))
    for number in range(num_steps):
        stage = number % NUM_STAGES
        mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)
        weight = weight_tiles.index(stage * GROUPS + GROUP).reshape([64 * S, 64])
        acc = warpgroup_mma(weight, x_tiles.index(stage).permute((1, 0)), acc, is_async=True)
        if HIGH:
            high = warpgroup_mma(weight, high_tiles.index(stage).permute((1, 0)), high, is_async=True)
            acc, high = warpgroup_mma_wait(2, [acc, high])
        else:
            acc = warpgroup_mma_wait(1, [acc])
        mbarrier.arrive(free.index((number + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=number > 0)
    if HIGH:
        acc, high = warpgroup_mma_wait(0, [acc, high])
    else:
        acc = warpgroup_mma_wait(0, [acc])
    y_ptr += part * num_rows * N
    for index in gl.static_range(BLOCK_M // CHUNK):
        chunk = chunk_of(acc, high, index, CHUNK)
        _store(chunk, bias_ptr, y_ptr, column + GROUP * 64, index * CHUNK, num_rows, N, part == 0, HAS_BIAS, GATED)


@gluon.jit(do_not_specialize=["num_rows"])
def _hopper_narrow_kernel(
    x_desc,
    high_desc,
    weight_desc,
    bias_ptr,
    y_ptr,
    num_rows,
    N,
    K,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    HIGH: gl.constexpr,
    GROUPS: gl.constexpr,
    S: gl.constexpr,
    TOGETHER: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """y: [parts, num_rows, N], where GATED of one part. Programs: all tiles of the first part, of the second, ..."""
    if PDL:
        gdc_launch_dependents()
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES, BLOCK_M - HIGH, 64], x_desc.layout)
    high_tiles = x_tiles
    if HIGH:
        high_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES, HIGH, 64], high_desc.layout)
    weight_tiles = gl.allocate_shared_memory(weight_desc.dtype, [NUM_STAGES * GROUPS, S, 64, 64], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=GROUPS)
    fence_async_shared()
    num_tiles = (N + 64 * GROUPS - 1) // (64 * GROUPS)
    column = gl.program_id(0) % num_tiles * (64 * GROUPS)
    part = gl.program_id(0) // num_tiles
    num_parts = gl.num_programs(0) // num_tiles
    num_all = (K + 63) // 64
    share = (num_all + num_parts - 1) // num_parts
    begin = part * share
    num_steps = gl.maximum(gl.minimum(begin + share, num_all) - begin, 0)
    rings = (x_tiles, high_tiles, weight_tiles, full, free)
    # fmt: off
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_compute, (bias_ptr, y_ptr, num_rows, N, column, part, num_steps, rings,
                            0, GROUPS, HAS_BIAS, GATED, BLOCK_M, HIGH, S, NUM_STAGES, PDL)),
                (_fetch, (x_desc, high_desc, weight_desc, column, begin, num_steps, rings,
                          BLOCK_M, HIGH, GROUPS, S, TOGETHER, NUM_STAGES, PDL)),
            ],
            [1],
            [FETCH_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (bias_ptr, y_ptr, num_rows, N, column, part, num_steps, rings,
                            0, GROUPS, HAS_BIAS, GATED, BLOCK_M, HIGH, S, NUM_STAGES, PDL)),
                (_compute, (bias_ptr, y_ptr, num_rows, N, column, part, num_steps, rings,
                            1, GROUPS, HAS_BIAS, GATED, BLOCK_M, HIGH, S, NUM_STAGES, PDL)),
                (_fetch, (x_desc, high_desc, weight_desc, column, begin, num_steps, rings,
                          BLOCK_M, HIGH, GROUPS, S, TOGETHER, NUM_STAGES, PDL)),
            ],
            [WARPS, 1],
            [PAIR_REGISTERS, FETCH_REGISTERS],
        )
    # fmt: on


def split_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Unadded:
    """Launch on the current device and stream.

    x: [num_rows, in_features], fp16|bf16, 1 to 128 rows, contiguous inside a row
    weight: [in_features, out_features], x's dtype, contiguous along in_features (the transpose of a stored [out, in]), columns 16-byte
        aligned; in_features a multiple of 8
    bias: [out_features], contiguous, or None

    Returns [num_rows, out_features] in x's dtype, or, where several programs share a tile's inputs, parts of it that are not yet added up.
    The first has the bias.
    """
    n = weight.shape[1]
    config = hopper_narrow_config(x.shape[0], n, num_sms(x.device), gated=False)
    if config.num_splits == 1:
        y = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
        _launch(x, weight, bias, y, config, gated=False)
        return y
    parts = torch.empty((config.num_splits, x.shape[0], n), dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, parts, config, gated=False)
    return SplitSums(parts, x.dtype)


def gate_up(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `split_linear` with weight [in_features, 2 inter], columns [gate | up]: silu(x gate) * (x up), [num_rows, inter], new, contiguous,
    in x's dtype."""
    inter = weight.shape[1] // 2
    config = hopper_narrow_config(x.shape[0], inter, num_sms(x.device), gated=True)
    y = torch.empty((x.shape[0], inter), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, y, config, gated=True)
    return y


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, config: HopperNarrowConfig, *, gated: bool
) -> None:
    """y: [num_rows, columns], or [num_splits, num_rows, columns] for the parts of a sum."""
    if x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    (num_rows, k), n = x.shape, y.shape[-1]
    assert 0 < num_rows <= config.block_m
    assert config.num_stages > config.together, "the last step is freed by the one after it"
    assert y.numel() < 1 << 31
    strips = 2 if gated else 1
    row = weight.stride(1)
    registers = {"maxnreg": LAUNCH_REGISTERS} if config.groups == 1 else {}
    launch(
        _hopper_narrow_kernel,
        (ceil_div(n, 64 * config.groups) * config.num_splits,),
        Tiles(x, (config.low, 64), ROWS),
        Tiles(x, (config.high or config.low, 64), ROWS),
        Tiles(weight.as_strided((strips, n, k), (n * row, row, 1)), (strips, 64, 64), WEIGHTS),
        bias,
        y,
        num_rows,
        n,
        k,
        HAS_BIAS=bias is not None,
        GATED=gated,
        BLOCK_M=config.block_m,
        HIGH=config.high,
        GROUPS=config.groups,
        S=strips,
        TOGETHER=config.together,
        NUM_STAGES=config.num_stages,
        num_warps=WARPS.value,
        **registers,
        **launch_options(has_pdl(x.device)),
    )
