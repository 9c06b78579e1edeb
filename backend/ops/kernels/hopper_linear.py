"""The plain product over prompts, y = round(x W^T + b), with the warps, the ring and the order of tiles of `hopper_gate_up`.

A tile is 128 rows by 256 columns. It ends with the rounding alone, two columns to a word; its store, 64 columns at a time through two
buffers of a half, runs under the next tile's first two products.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_gate_up import _locate, _pack, load_tile, store_tile
from .launch import num_sms
from .tuning import ceil_div, hopper_linear_config

__all__ = ["linear"]

HALF_M = gl.constexpr(64)  # rows of a half: what the matrix instruction of four warps takes
BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
STORE_N = gl.constexpr(64)  # 128 bytes: as wide as a store by TMA is
BLOCK_K = gl.constexpr(64)
COMPUTE_REGISTERS = gl.constexpr(240)
FETCH_REGISTERS = gl.constexpr(24)
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16], [0, 32], [0, 64]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
)  # of the sums' layout, two columns each


@gluon.jit
def _fetch(x_desc, weight_desc, num_blocks_m, num_blocks_n, num_steps, rings, GROUP_M: gl.constexpr, NUM_STAGES: gl.constexpr):
    """The one warp that brings tiles of x and W."""
    STAGE_BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K * 2
    x_tiles, weight_tiles, full, free = rings
    number = 0
    for item in range(gl.program_id(0), num_blocks_m * num_blocks_n, gl.num_programs(0)):
        block_m, block_n = _locate(item, num_blocks_m, num_blocks_n, GROUP_M)
        for step in range(num_steps):
            stage = number % NUM_STAGES
            mbarrier.wait(free.index(stage), (number // NUM_STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), STAGE_BYTES)
            load_tile(x_desc, [block_m * BLOCK_M, step * BLOCK_K], full.index(stage), x_tiles.index(stage))
            load_tile(weight_desc, [block_n * BLOCK_N, step * BLOCK_K], full.index(stage), weight_tiles.index(stage))
            number += 1


@gluon.jit
def _round(
    acc, bias_ptr, item, n, num_blocks_m, num_blocks_n, HAS_BIAS: gl.constexpr, GROUP_M: gl.constexpr, dtype: gl.constexpr
):
    """Words of two columns each: [64, 128]."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    if HAS_BIAS:
        _block_m, block_n = _locate(item, num_blocks_m, num_blocks_n, GROUP_M)
        offs_n = block_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SUMS))
        acc += gl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(gl.float32)[None, :]
    even, odd = gl.split(acc.reshape([HALF_M, BLOCK_N // 2, 2]))
    return gl.convert_layout(_pack(even, odd, dtype), WORDS, assert_trivial=True)


@gluon.jit
def _store(words, column, row, y_desc, tile, dtype: gl.constexpr):
    """[64, 32] words."""
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STORE_N, 16])
    LOW: gl.constexpr = "{ .reg .b16 high; mov.b32 {$0, high}, $1; }"
    HIGH: gl.constexpr = "{ .reg .b16 low; mov.b32 {low, $0}, $1; }"
    if dtype == gl.bfloat16:
        even = gl.inline_asm_elementwise(LOW, "=h,r", [words], dtype=gl.bfloat16, is_pure=True, pack=1)
        odd = gl.inline_asm_elementwise(HIGH, "=h,r", [words], dtype=gl.bfloat16, is_pure=True, pack=1)
    else:
        even = gl.inline_asm_elementwise(LOW, "=h,r", [words], dtype=gl.float16, is_pure=True, pack=1)
        odd = gl.inline_asm_elementwise(HIGH, "=h,r", [words], dtype=gl.float16, is_pure=True, pack=1)
    tile.store(gl.convert_layout(gl.join(even, odd).reshape([HALF_M, STORE_N]), PART, assert_trivial=True))
    fence_async_shared()
    store_tile(y_desc, [row, column], tile)


@gluon.jit
def _finish(
    words, item, num_blocks_m, num_blocks_n, y_desc, y_tiles, HALF: gl.constexpr, GROUP_M: gl.constexpr, dtype: gl.constexpr
):
    """The store of 64 rows of a tile."""
    block_m, block_n = _locate(item, num_blocks_m, num_blocks_n, GROUP_M)
    row, column = block_m * BLOCK_M + HALF * HALF_M, block_n * BLOCK_N
    left, right = gl.split(words.reshape([HALF_M, 2, STORE_N]).permute((0, 2, 1)))
    first, second = gl.split(left.reshape([HALF_M, 2, STORE_N // 2]).permute((0, 2, 1)))
    third, fourth = gl.split(right.reshape([HALF_M, 2, STORE_N // 2]).permute((0, 2, 1)))
    tma.store_wait(0)  # the stores of the tile before have read what is written now
    _store(first, column, row, y_desc, y_tiles.index(0), dtype)
    _store(second, column + STORE_N, row, y_desc, y_tiles.index(1), dtype)
    tma.store_wait(0)
    _store(third, column + 2 * STORE_N, row, y_desc, y_tiles.index(0), dtype)
    _store(fourth, column + 3 * STORE_N, row, y_desc, y_tiles.index(1), dtype)


@gluon.jit
def _compute(
    y_desc,
    bias_ptr,
    n,
    num_blocks_m,
    num_blocks_n,
    num_steps,
    rings,
    y_tiles,
    HALF: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUP_M: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Four warps: rows HALF * 64 to HALF * 64 + 63 of each tile. y_tiles: [2, 64, 64], their own."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dtype: gl.constexpr = y_desc.dtype
    x_tiles, weight_tiles, full, free = rings
    acc = gl.zeros([HALF_M, BLOCK_N], gl.float32, SUMS)
    words = gl.zeros([HALF_M, BLOCK_N // 2], gl.int32, WORDS)
    done, number = 0, 0  # the tile whose words these are; steps
    under = gl.minimum(num_steps - 1, 1)  # the step under whose products the tile before is stored
    for item in range(gl.program_id(0), num_blocks_m * num_blocks_n, gl.num_programs(0)):
        for step in range(num_steps):
            stage = number % NUM_STAGES
            mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)
            x = x_tiles.index(stage).slice(HALF * HALF_M, HALF_M, 0)
            acc = warpgroup_mma(x, weight_tiles.index(stage).permute((1, 0)), acc, use_acc=step > 0, is_async=True)
            if (step == under) & (number > step):
                _finish(words, done, num_blocks_m, num_blocks_n, y_desc, y_tiles, HALF, GROUP_M, dtype)
            acc = warpgroup_mma_wait(1, [acc])
            mbarrier.arrive(free.index((number - 1) % NUM_STAGES), count=1, pred=step > 0)
            number += 1
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index((number - 1) % NUM_STAGES), count=1)
        words = _round(acc, bias_ptr, item, n, num_blocks_m, num_blocks_n, HAS_BIAS, GROUP_M, dtype)
        done = item
    _finish(words, done, num_blocks_m, num_blocks_n, y_desc, y_tiles, HALF, GROUP_M, dtype)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n", "num_blocks_m", "num_blocks_n", "num_steps"])
def _hopper_linear_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    y_desc,
    n,
    num_blocks_m,
    num_blocks_n,
    num_steps,
    HAS_BIAS: gl.constexpr,
    GROUP_M: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(weight_desc.dtype, [NUM_STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    upper = gl.allocate_shared_memory(y_desc.dtype, [2, HALF_M, STORE_N], y_desc.layout)
    lower = gl.allocate_shared_memory(y_desc.dtype, [2, HALF_M, STORE_N], y_desc.layout)
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
            (_compute, (y_desc, bias_ptr, n, num_blocks_m, num_blocks_n, num_steps, rings, upper,
                        0, HAS_BIAS, GROUP_M, NUM_STAGES)),
            (_compute, (y_desc, bias_ptr, n, num_blocks_m, num_blocks_n, num_steps, rings, lower,
                        1, HAS_BIAS, GROUP_M, NUM_STAGES)),
            (_fetch, (x_desc, weight_desc, num_blocks_m, num_blocks_n, num_steps, rings, GROUP_M, NUM_STAGES)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, FETCH_REGISTERS],
    )
    # fmt: on


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [num_rows, in_features], fp16|bf16, rows 16-byte aligned (in_features and the rows' stride multiples of 8), contiguous inside a row
    weight: [in_features, out_features], x's dtype, contiguous along in_features (the transpose of a stored [out, in]), columns 16-byte
        aligned; out_features a multiple of 8
    bias: [out_features], contiguous, or None

    Returns [num_rows, out_features], new, contiguous, in x's dtype. num_rows may be 0.
    """
    assert x.element_size() == 2, f"{x.dtype} is no 16 bit type"
    assert x.stride(1) == 1, "x must be contiguous inside a row"
    assert weight.stride(0) == 1, "the weight must be contiguous along in_features"
    num_rows, k = x.shape
    n = weight.shape[1]
    y = torch.empty((num_rows, n), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    config = hopper_linear_config()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    num_blocks_m, num_blocks_n = ceil_div(num_rows, BLOCK_M.value), ceil_div(n, BLOCK_N.value)
    _hopper_linear_kernel[(min(num_blocks_m * num_blocks_n, num_sms(x.device)),)](
        TensorDescriptor.from_tensor(x, [BLOCK_M.value, BLOCK_K.value], layout),
        TensorDescriptor.from_tensor(weight.t(), [BLOCK_N.value, BLOCK_K.value], layout),
        bias,
        TensorDescriptor.from_tensor(y, [HALF_M.value, STORE_N.value], layout),
        n,
        num_blocks_m,
        num_blocks_n,
        ceil_div(k, BLOCK_K.value),
        HAS_BIAS=bias is not None,
        GROUP_M=config.group_m,
        NUM_STAGES=config.num_stages,
        num_warps=4,
    )
    return y
