"""The gated product of a feed-forward layer over prompts, for Hopper: y = silu(x gate^T) * (x up^T), and nothing else is written.

In Gluon, as `hopper_prefill_attention`: a warp that only fetches, two groups of four warps that only compute. A program takes tiles of
128 rows and of 128 gates with the 128 ups that belong to them, one tile after the other; gate and up of a column end in one thread.

    x tile [128, 64]        W tile [128 gates + 128 ups, 64]        a stage of the ring holds both, 48 KiB

    fetching     |x W|x W|x W| ...        |next tile: x W|x W| ...
    upper half   | products, step by step |R| products ...            rows  0 ..  63 of the tile: [64, 256] += x W^T
                                           |  SiLU, store |
    lower half   | the same                                           rows 64 .. 127

A tile ends with R alone: gate and up, with their bias, are rounded to the dtype, as a layer that writes them would, and packed into a word,
which frees the sums for the next tile. SiLU of the words, 64 a thread, and the store run under that tile's first two products. SiLU is in
fp32, its result rounded once. Two sigmoids share an inverse, 1/a = b/(ab), since all wait for the unit that takes exp2 and inverses.
exp2 ends at 2^62 for that: silu of a gate below -43 is gate * 2^-62, which is nothing beside any other number of a row.

A stage has two barriers: `full`, which the bytes of its tiles complete, and `free`, at which both halves arrive when their products have
read it. Step number n of a program, over all its tiles, lies in stage n % NUM_STAGES and waits for phase n // NUM_STAGES; the fetching
warp waits for the phase before, so the first round passes at once.

Tiles go in groups of group_m row blocks, in a group column after column, so that those under way at one time share x and W in the L2 cache.
Rows, columns and inputs past the end are zeros in a tile that is fetched, and are not stored.
"""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .fast_launch import Tiles, launch
from .hopper_tuning import hopper_gate_up_config, takes_hopper_gate_up
from .launch import has_pdl, is_hopper, launch_options, num_sms
from .tuning import ceil_div

__all__ = ["gate_up", "takes"]

# renamed after triton 3.6
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

HALF_M = gl.constexpr(64)  # rows of a half: what the matrix instruction of four warps takes
BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(128)  # columns of y
HALF_N = gl.constexpr(64)  # 128 bytes: as wide as a store by TMA is
BLOCK_K = gl.constexpr(64)
COMPUTE_REGISTERS = gl.constexpr(240)  # a thread; a program is launched with 3 x 128 threads of 168
FETCH_REGISTERS = gl.constexpr(24)
MINUS_LOG2_E = gl.constexpr(-math.log2(math.e))
PLAIN, PAIRED = (gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank) for rank in (2, 3))


@gluon.jit
def _locate(item, num_blocks_m, num_blocks_n, group_m):
    """(row block, column block) of a tile."""
    first = item // (group_m * num_blocks_n) * group_m
    size = gl.minimum(num_blocks_m - first, group_m)
    within = item % (group_m * num_blocks_n)
    return first + within % size, within // size


@gluon.jit
def _fetch(
    x_desc, weight_desc, num_blocks_m, num_blocks_n, num_steps, rings, group_m, NUM_STAGES: gl.constexpr, PDL: gl.constexpr
):
    """The one warp that brings tiles of x and W. Tiles of W that find room at once are asked for before the wait for the kernel before."""
    STAGE_BYTES: gl.constexpr = (BLOCK_M + 2 * BLOCK_N) * BLOCK_K * 2
    x_tiles, weight_tiles, full, free = rings
    number = 0
    num_early = gl.minimum(num_steps, NUM_STAGES)  # of the first tile, which every program has
    _block_m, early_n = _locate(gl.program_id(0), num_blocks_m, num_blocks_n, group_m)
    for step in range(num_early):
        mbarrier.expect(full.index(step), STAGE_BYTES)
        load_tile(weight_desc, [0, early_n * BLOCK_N, step * BLOCK_K], full.index(step), weight_tiles.index(step))
    if PDL:
        gdc_wait()
    for item in range(gl.program_id(0), num_blocks_m * num_blocks_n, gl.num_programs(0)):
        block_m, block_n = _locate(item, num_blocks_m, num_blocks_n, group_m)
        for step in range(num_steps):
            stage = number % NUM_STAGES
            if number >= num_early:
                mbarrier.wait(free.index(stage), (number // NUM_STAGES & 1) ^ 1)
                mbarrier.expect(full.index(stage), STAGE_BYTES)
                load_tile(weight_desc, [0, block_n * BLOCK_N, step * BLOCK_K], full.index(stage), weight_tiles.index(stage))
            load_tile(x_desc, [block_m * BLOCK_M, step * BLOCK_K], full.index(stage), x_tiles.index(stage))
            number += 1


@gluon.jit
def _exp2(x):
    """Of fp32 in one instruction."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _inverse(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _pack(gate, up, dtype: gl.constexpr):
    """Both rounded to the dtype, in a word: gate low, up high."""
    if dtype == gl.bfloat16:
        ASM: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        ASM: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ASM, "=r,f,f", [gate, up], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def low_half(words, dtype: gl.constexpr):
    """The number in the low half of each word, in fp32."""
    if dtype == gl.bfloat16:
        ASM: gl.constexpr = "shl.b32 $0, $1, 16;"
    else:
        ASM: gl.constexpr = "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, low; }"
    return gl.inline_asm_elementwise(ASM, "=f,r", [words], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def high_half(words, dtype: gl.constexpr):
    if dtype == gl.bfloat16:
        ASM: gl.constexpr = "and.b32 $0, $1, 0xffff0000;"
    else:
        ASM: gl.constexpr = "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, high; }"
    return gl.inline_asm_elementwise(ASM, "=f,r", [words], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _with_bias(sums, bias_ptr, first, inter, LAYOUT: gl.constexpr):
    offs = first + gl.arange(0, HALF_N, layout=gl.SliceLayout(0, LAYOUT))
    return sums + gl.load(bias_ptr + offs, mask=offs < inter, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _round(acc, bias_ptr, item, inter, num_blocks_m, num_blocks_n, HAS_BIAS: gl.constexpr, group_m, dtype: gl.constexpr):
    """Words of the left and of the right half of a tile's columns: [64, 64] each."""
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_N, 16])
    parts = acc.reshape([HALF_M, 2, 2, HALF_N]).permute((0, 3, 1, 2))  # [rows, columns, gate or up, half of the columns]
    left, right = gl.split(parts)
    left_gate, left_up = gl.split(left)
    right_gate, right_up = gl.split(right)
    left_gate = gl.convert_layout(left_gate, PART, assert_trivial=True)
    left_up = gl.convert_layout(left_up, PART, assert_trivial=True)
    right_gate = gl.convert_layout(right_gate, PART, assert_trivial=True)
    right_up = gl.convert_layout(right_up, PART, assert_trivial=True)
    if HAS_BIAS:
        _block_m, block_n = _locate(item, num_blocks_m, num_blocks_n, group_m)
        first = block_n * BLOCK_N
        left_gate = _with_bias(left_gate, bias_ptr, first, inter, PART)
        left_up = _with_bias(left_up, bias_ptr + inter, first, inter, PART)
        right_gate = _with_bias(right_gate, bias_ptr, first + HALF_N, inter, PART)
        right_up = _with_bias(right_up, bias_ptr + inter, first + HALF_N, inter, PART)
    return _pack(left_gate, left_up, dtype), _pack(right_gate, right_up, dtype)


@gluon.jit
def _silu_and_mul(words, dtype: gl.constexpr):
    """[64, 64] words of gate and up: y of the dtype."""
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_N, 16])
    first, second = gl.split(words.reshape([HALF_M, 2, HALF_N // 2]).permute((0, 2, 1)))
    first_gate, second_gate = low_half(first, dtype), low_half(second, dtype)
    a = 1.0 + _exp2(gl.minimum(first_gate * MINUS_LOG2_E, 62.0))
    b = 1.0 + _exp2(gl.minimum(second_gate * MINUS_LOG2_E, 62.0))
    inverse = _inverse(a * b)
    first_y = first_gate * (b * inverse) * high_half(first, dtype)
    second_y = second_gate * (a * inverse) * high_half(second, dtype)
    y = gl.join(first_y.to(dtype), second_y.to(dtype)).permute((0, 2, 1)).reshape([HALF_M, HALF_N])
    return gl.convert_layout(y, PART, assert_trivial=True)


@gluon.jit
def _finish(left, right, item, num_blocks_m, num_blocks_n, y_desc, y_tiles, HALF: gl.constexpr, group_m, dtype: gl.constexpr):
    """SiLU and the store of 64 rows of a tile."""
    block_m, block_n = _locate(item, num_blocks_m, num_blocks_n, group_m)
    row, column = block_m * BLOCK_M + HALF * HALF_M, block_n * BLOCK_N
    tma.store_wait(0)  # the stores of the tile before have read what is written now
    y_tiles.index(0).store(_silu_and_mul(left, dtype))
    y_tiles.index(1).store(_silu_and_mul(right, dtype))
    fence_async_shared()
    store_tile(y_desc, [row, column], y_tiles.index(0))
    store_tile(y_desc, [row, column + HALF_N], y_tiles.index(1))


@gluon.jit
def _compute(
    y_desc,
    bias_ptr,
    inter,
    num_blocks_m,
    num_blocks_n,
    num_steps,
    rings,
    y_tiles,
    HALF: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    group_m,
    NUM_STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Four warps: rows HALF * 64 to HALF * 64 + 63 of each tile. y_tiles: [2, 64, 64], their own."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_N, 16])
    dtype: gl.constexpr = y_desc.dtype
    x_tiles, weight_tiles, full, free = rings
    acc = gl.zeros([HALF_M, 2 * BLOCK_N], gl.float32, SUMS)
    left = gl.zeros([HALF_M, HALF_N], gl.int32, PART)
    right = gl.zeros([HALF_M, HALF_N], gl.int32, PART)
    done, number = 0, 0  # the tile whose words these are; steps
    under = gl.minimum(num_steps - 1, 1)  # the step under whose products the tile before is finished
    if PDL:
        gdc_wait()
    for item in range(gl.program_id(0), num_blocks_m * num_blocks_n, gl.num_programs(0)):
        for step in range(num_steps):
            stage = number % NUM_STAGES
            mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)
            x = x_tiles.index(stage).slice(HALF * HALF_M, HALF_M, 0)
            weight = weight_tiles.index(stage).reshape([2 * BLOCK_N, BLOCK_K]).permute((1, 0))
            acc = warpgroup_mma(x, weight, acc, use_acc=step > 0, is_async=True)
            if (step == under) & (number > step):
                _finish(left, right, done, num_blocks_m, num_blocks_n, y_desc, y_tiles, HALF, group_m, dtype)
            acc = warpgroup_mma_wait(1, [acc])
            mbarrier.arrive(free.index((number - 1) % NUM_STAGES), count=1, pred=step > 0)
            number += 1
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index((number - 1) % NUM_STAGES), count=1)
        left, right = _round(acc, bias_ptr, item, inter, num_blocks_m, num_blocks_n, HAS_BIAS, group_m, dtype)
        done = item
    _finish(left, right, done, num_blocks_m, num_blocks_n, y_desc, y_tiles, HALF, group_m, dtype)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["inter", "num_blocks_m", "num_blocks_n", "num_steps", "group_m"])
def _hopper_gate_up_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    y_desc,
    inter,
    num_blocks_m,
    num_blocks_n,
    num_steps,
    group_m,
    HAS_BIAS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(weight_desc.dtype, [NUM_STAGES, 2, BLOCK_N, BLOCK_K], weight_desc.layout)
    upper = gl.allocate_shared_memory(y_desc.dtype, [2, HALF_M, HALF_N], y_desc.layout)
    lower = gl.allocate_shared_memory(y_desc.dtype, [2, HALF_M, HALF_N], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    rings = (x_tiles, weight_tiles, full, free)
    # fmt: off
    gl.warp_specialize(
        [
            (_compute, (y_desc, bias_ptr, inter, num_blocks_m, num_blocks_n, num_steps, rings, upper,
                        0, HAS_BIAS, group_m, NUM_STAGES, PDL)),
            (_compute, (y_desc, bias_ptr, inter, num_blocks_m, num_blocks_n, num_steps, rings, lower,
                        1, HAS_BIAS, group_m, NUM_STAGES, PDL)),
            (_fetch, (x_desc, weight_desc, num_blocks_m, num_blocks_n, num_steps, rings, group_m, NUM_STAGES, PDL)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, FETCH_REGISTERS],
    )
    # fmt: on


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `gate_up` can be asked for; x contiguous."""
    k, columns = weight.shape
    is_stored_by_rows = weight.stride() == (1, k)
    return is_stored_by_rows and takes_hopper_gate_up(k, columns // 2, x.element_size(), is_hopper=is_hopper(x.device))


def gate_up(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [num_rows, in_features], fp16|bf16, rows 16-byte aligned (in_features and the rows' stride multiples of 8), contiguous inside a row
    weight: [in_features, 2 inter], columns [gate | up], x's dtype, contiguous along in_features (the transpose of a stored
        [2 inter, in_features]), columns 16-byte aligned; inter a multiple of 8
    bias: [2 inter], contiguous, or None

    Returns silu(x gate) * (x up): [num_rows, inter], new, contiguous, in x's dtype. num_rows may be 0.
    """
    assert x.element_size() == 2, f"{x.dtype} is no 16 bit type"
    assert x.stride(1) == 1, "x must be contiguous inside a row"
    assert weight.stride(0) == 1, "the weight must be contiguous along in_features"
    num_rows, k = x.shape
    inter = weight.shape[1] // 2
    y = torch.empty((num_rows, inter), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    config = hopper_gate_up_config(num_rows, k)
    num_blocks_m, num_blocks_n = ceil_div(num_rows, BLOCK_M.value), ceil_div(inter, BLOCK_N.value)
    pairs = weight.as_strided((2, inter, k), (inter * weight.stride(1), weight.stride(1), 1))  # [gate or up, inter, in_features]
    launch(
        _hopper_gate_up_kernel,
        (min(num_blocks_m * num_blocks_n, num_sms(x.device)),),
        Tiles(x, (BLOCK_M.value, BLOCK_K.value), PLAIN),
        Tiles(pairs, (2, BLOCK_N.value, BLOCK_K.value), PAIRED),
        bias,
        Tiles(y, (HALF_M.value, HALF_N.value), PLAIN),
        inter,
        num_blocks_m,
        num_blocks_n,
        ceil_div(k, BLOCK_K.value),
        config.group_m,
        HAS_BIAS=bias is not None,
        NUM_STAGES=config.num_stages,
        num_warps=4,
        **launch_options(has_pdl(x.device)),
    )
    return y
