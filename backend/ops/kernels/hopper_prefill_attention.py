"""Prefill attention for Hopper: a warp that only fetches, two groups of four warps that only compute (Shah et al. 2024,
arXiv:2407.08608, FlashAttention-3). What is computed, tiles of rows and their places in the grid are as in `paged_prefill_attention`,
whose launcher chooses. Written in Gluon, the layer of triton where layouts, shared memory and waits are explicit: triton itself waits for
a matrix product before the first use of its result in a loop, so its softmax runs beside none.

A program takes work items, one query tile of one kv head each, item after item: the last tiles of all heads first. Its warps:

    fetching   | K0 | V0 | K1 | V1 | ...            TMA into rings of NUM_STAGES tiles; goes on to the next item while this one is computed
    upper half | rows  0 ..  63 of the tile         S1 = Q K1^T and O += P0 V0 are issued; softmax of S1 under O += P0 V0; O rescaled; ...
    lower half | rows 64 .. 127                     the same, out of step with the upper half: one's softmax under the other's products

    tile of keys    S = Q K^T ------- softmax ------------ P        issued, waited for: S(j+1) | O(j)        each half, each step j
    tile before                O += P V ---------- O * rescale      (at most two products of a half are under way)

Rings: K and V have one each, the same number of tiles. A stage has two barriers: `full`, which the bytes of its tile complete, and `free`,
at which both halves arrive when their products have read it. Tile number n of a program, over all its items, lies in stage n % NUM_STAGES
and waits for phase n // NUM_STAGES; the fetching warp waits for the phase before, so the first round passes at once.

Slots past the context's end may hold anything, NaN too, and 0 * NaN is NaN: the fetching warp lets the last V tile of a context come to
a barrier of its own, writes zeros there and only then completes `full`. Keys need none: their scores are replaced.

Scores, softmax and sums in fp32; the weights are rounded to V's dtype for the second product, the result once.
"""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .fast_launch import Tiles, launch
from .launch import num_sms

__all__ = ["hopper_prefill_attention"]

load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # renamed after triton 3.6

HALF_M = gl.constexpr(64)  # rows of a half: what the matrix instruction of four warps takes
BLOCK_N = gl.constexpr(64)  # keys of a tile: a block of the cache
TAIL_ROWS = gl.constexpr(8)  # of V that the fetching warp holds in registers at once
COMPUTE_REGISTERS = gl.constexpr(232)  # a thread; a program is launched with 3 x 128 threads of 168
FETCH_REGISTERS = gl.constexpr(40)
PAGES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


@gluon.jit
def _row_of_tile(cu_seqlens_ptr, tile, num_rows, BLOCK_Q: gl.constexpr):
    """The last row whose first tile is not past `tile`."""
    low = tile * 0
    high = low + num_rows
    while high - low > 1:
        middle = (low + high) // 2
        is_past = gl.load(cu_seqlens_ptr + middle) // BLOCK_Q + middle > tile
        low = gl.where(is_past, low, middle)
        high = gl.where(is_past, middle, high)
    return low


@gluon.jit
def _locate(item, work, NUM_KV_HEADS: gl.constexpr, BLOCK_Q: gl.constexpr):
    """(row, kv head, first token of the row, first query of the tile, the row's queries and context, tiles of keys: 0 if no queries)."""
    cu_seqlens_ptr, context_lens_ptr, num_rows, num_items = work
    tile = (num_items - 1 - item) // NUM_KV_HEADS
    row = _row_of_tile(cu_seqlens_ptr, tile, num_rows, BLOCK_Q)
    start = gl.load(cu_seqlens_ptr + row)
    num_queries = gl.load(cu_seqlens_ptr + row + 1) - start
    context_len = gl.load(context_lens_ptr + row)
    first_query = (tile - (start // BLOCK_Q + row)) * BLOCK_Q
    end = gl.minimum(context_len - num_queries + first_query + BLOCK_Q, context_len)
    num_tiles = gl.where(first_query < num_queries, (end + BLOCK_N - 1) // BLOCK_N, 0)
    return row, item % NUM_KV_HEADS, start, first_query, num_queries, context_len, num_tiles


@gluon.jit
def _fetch(
    k_desc,
    v_desc,
    block_tables_ptr,
    stride_table_row,
    work,
    rings,
    tail,
    NUM_KV_HEADS: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """The one warp that brings tiles of K and V. tail: the barrier of V tiles that hold slots past the context's end."""
    TILE_BYTES: gl.constexpr = BLOCK_N * HEAD_DIM * 2
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [1, 1], [1, 0])
    k_tiles, v_tiles, k_full, k_free, v_full, v_free = rings
    number = 0
    num_tails = 0
    for item in range(gl.program_id(0), work[3], gl.num_programs(0)):
        row, kv_head, _start, _first_query, _num_queries, context_len, num_tiles = _locate(item, work, NUM_KV_HEADS, BLOCK_Q)
        table_ptr = block_tables_ptr + row.to(gl.int64) * stride_table_row
        for tile in range(num_tiles):
            stage = number % NUM_STAGES
            before = (number // NUM_STAGES & 1) ^ 1
            block = gl.load(table_ptr + tile)
            mbarrier.wait(k_free.index(stage), before)
            mbarrier.expect(k_full.index(stage), TILE_BYTES)
            load_tile(k_desc, [block, kv_head, 0, 0], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_free.index(stage), before)
            if (tile + 1) * BLOCK_N <= context_len:
                mbarrier.expect(v_full.index(stage), TILE_BYTES)
                load_tile(v_desc, [block, kv_head, 0, 0], v_full.index(stage), v_tiles.index(stage))
            else:
                mbarrier.expect(tail, TILE_BYTES)
                load_tile(v_desc, [block, kv_head, 0, 0], tail, v_tiles.index(stage))
                mbarrier.wait(tail, num_tails & 1)
                num_tails += 1
                values = v_tiles.index(stage).reshape([BLOCK_N, HEAD_DIM])
                for part in gl.static_range(BLOCK_N // TAIL_ROWS):
                    slots = values.slice(part * TAIL_ROWS, TAIL_ROWS, 0)
                    keys = tile * BLOCK_N + part * TAIL_ROWS + gl.arange(0, TAIL_ROWS, layout=gl.SliceLayout(1, ROWS))
                    kept = slots.load(ROWS)
                    slots.store(gl.where((keys < context_len)[:, None], kept, gl.zeros_like(kept)))
                fence_async_shared()
                mbarrier.arrive(v_full.index(stage), count=1)
            number += 1


@gluon.jit
def _weigh(scores, maximum, total, positions, tile, scale_log2, MASKED: gl.constexpr, layout: gl.constexpr):
    """One step of the online softmax: (weights, what older sums are multiplied by, maximum, total)."""
    if MASKED:
        keys = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        scores = gl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    new_maximum = gl.maximum(maximum, gl.max(scores, axis=1) * scale_log2)
    rescale = gl.exp2(maximum - new_maximum)
    weights = gl.exp2(scores * scale_log2 - new_maximum[:, None])
    return weights, rescale, new_maximum, total * rescale + gl.sum(weights, axis=1)


@gluon.jit
def _step(
    q,
    weights,
    acc,
    maximum,
    total,
    positions,
    tile,
    num_tiles,
    number,
    scale_log2,
    rings,
    MASKED: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    dtype: gl.constexpr,
):
    """Scores and softmax of `tile`, whose K is there; the weights of the tile before it are added up meanwhile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    k_tiles, v_tiles, k_full, k_free, v_full, v_free = rings
    stage = number % NUM_STAGES
    last = (number - 1) % NUM_STAGES
    k = k_tiles.index(stage).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
    nothing = gl.zeros([HALF_M, BLOCK_N], gl.float32, S_LAYOUT)
    scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    mbarrier.wait(v_full.index(last), (number - 1) // NUM_STAGES & 1)
    acc = warpgroup_mma(p, v_tiles.index(last).reshape([BLOCK_N, HEAD_DIM]), acc, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    weights, rescale, maximum, total = _weigh(scores, maximum, total, positions, tile, scale_log2, MASKED, S_LAYOUT)
    # The loop of this wait keeps the softmax before the wait for the product: ptxas moved its exponentials behind that.
    mbarrier.wait(k_full.index((number + 1) % NUM_STAGES), (number + 1) // NUM_STAGES & 1, pred=tile + 1 < num_tiles)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(v_free.index(last), count=1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return weights, acc, maximum, total


@gluon.jit
def _compute(
    q_ptr,
    out_ptr,
    stride_q_row,
    stride_q_head,
    scale_log2,
    work,
    rings,
    HALF: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Four warps: rows HALF * 64 to HALF * 64 + 63 of each query tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    k_tiles, v_tiles, k_full, k_free, v_full, v_free = rings
    number = 0
    for item in range(gl.program_id(0), work[3], gl.num_programs(0)):
        _row, kv_head, start, first_query, num_queries, context_len, num_tiles = _locate(item, work, NUM_KV_HEADS, BLOCK_Q)
        if num_tiles > 0:
            offs_m = HALF * HALF_M + gl.arange(0, HALF_M, layout=gl.SliceLayout(1, ROWS))
            offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
            queries = first_query + offs_m // GROUP_SIZE
            heads = kv_head * GROUP_SIZE + offs_m % GROUP_SIZE
            mask = ((offs_m < BLOCK_Q * GROUP_SIZE) & (queries < num_queries))[:, None]
            tokens = start.to(gl.int64) + queries
            q_rows = tokens * stride_q_row + heads * stride_q_head
            q = gl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
            q = gl.convert_layout(q, gl.DotOperandLayout(0, S_LAYOUT, 2))

            first_position = context_len - num_queries + first_query
            positions = first_position + (HALF * HALF_M + gl.arange(0, HALF_M, layout=gl.SliceLayout(1, S_LAYOUT))) // GROUP_SIZE
            maximum = gl.full([HALF_M], -1e30, gl.float32, gl.SliceLayout(1, S_LAYOUT))
            total = gl.zeros([HALF_M], gl.float32, gl.SliceLayout(1, S_LAYOUT))
            acc = gl.zeros([HALF_M, HEAD_DIM], gl.float32, O_LAYOUT)
            stage = number % NUM_STAGES
            mbarrier.wait(k_full.index(stage), number // NUM_STAGES & 1)
            k = k_tiles.index(stage).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
            nothing = gl.zeros([HALF_M, BLOCK_N], gl.float32, S_LAYOUT)
            scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, [scores])
            mbarrier.arrive(k_free.index(stage), count=1)
            weights, _rescale, maximum, total = _weigh(scores, maximum, total, positions, 0, scale_log2, True, S_LAYOUT)
            mbarrier.wait(k_full.index((number + 1) % NUM_STAGES), (number + 1) // NUM_STAGES & 1, pred=num_tiles > 1)
            all_seen = gl.maximum(gl.minimum((first_position + 1) // BLOCK_N, num_tiles), 1)
            # fmt: off
            for tile in range(1, all_seen):
                weights, acc, maximum, total = _step(
                    q, weights, acc, maximum, total, positions, tile, num_tiles, number + tile, scale_log2, rings,
                    False, HEAD_DIM, NUM_STAGES, dtype)
            for tile in range(all_seen, num_tiles):
                weights, acc, maximum, total = _step(
                    q, weights, acc, maximum, total, positions, tile, num_tiles, number + tile, scale_log2, rings,
                    True, HEAD_DIM, NUM_STAGES, dtype)
            # fmt: on
            number += num_tiles
            last = (number - 1) % NUM_STAGES
            mbarrier.wait(v_full.index(last), (number - 1) // NUM_STAGES & 1)
            p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
            v = v_tiles.index(last).reshape([BLOCK_N, HEAD_DIM])
            acc = warpgroup_mma_wait(0, [warpgroup_mma(p, v, acc, is_async=True)])
            mbarrier.arrive(v_free.index(last), count=1)

            out = acc / gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]  # every query sees itself
            out_rows = (tokens * (NUM_KV_HEADS * GROUP_SIZE) + heads) * HEAD_DIM
            gl.store(out_ptr + out_rows[:, None] + offs_d[None, :], gl.convert_layout(out.to(dtype), ROWS), mask=mask)


# Tables and lengths are slices whose alignment changes from step to step: it must not choose another compiled kernel.
@gluon.jit(
    do_not_specialize=["block_tables_ptr", "context_lens_ptr", "cu_seqlens_ptr", "num_rows", "num_items", "stride_table_row"]
)
def _hopper_prefill_kernel(
    q_ptr,
    k_desc,
    v_desc,
    block_tables_ptr,
    context_lens_ptr,
    cu_seqlens_ptr,
    out_ptr,
    num_rows,
    num_items,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_table_row,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    BLOCK_Q: gl.constexpr = 2 * HALF_M // GROUP_SIZE
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [NUM_STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [NUM_STAGES, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    tail = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    mbarrier.init(tail, count=1)
    fence_async_shared()
    work = (cu_seqlens_ptr, context_lens_ptr, num_rows, num_items)
    rings = (k_tiles, v_tiles, k_full, k_free, v_full, v_free)
    # fmt: off
    gl.warp_specialize(
        [
            (_compute, (q_ptr, out_ptr, stride_q_row, stride_q_head, scale_log2, work, rings,
                        0, NUM_KV_HEADS, GROUP_SIZE, BLOCK_Q, HEAD_DIM, NUM_STAGES)),
            (_compute, (q_ptr, out_ptr, stride_q_row, stride_q_head, scale_log2, work, rings,
                        1, NUM_KV_HEADS, GROUP_SIZE, BLOCK_Q, HEAD_DIM, NUM_STAGES)),
            (_fetch, (k_desc, v_desc, block_tables_ptr, stride_table_row, work, rings, tail,
                      NUM_KV_HEADS, BLOCK_Q, HEAD_DIM, NUM_STAGES)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, FETCH_REGISTERS],
    )
    # fmt: on


def hopper_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    scale: float,
    num_stages: int,
    out: torch.Tensor,
) -> None:
    """Operands as `paged_prefill_attention`'s, which asserts them; fills `out`, [num_tokens, num_heads, head_dim], contiguous.

    q: fp16|bf16, at least one token, head_dim 64 or 128, at most 64 query heads a kv head; no sliding window
    k_cache, v_cache: blocks of 64 tokens, 16-byte aligned, strides of whole 16 bytes
    num_stages: tiles of K and of V that a program has room for
    """
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    assert block_size == BLOCK_N.value
    num_rows = block_tables.shape[0]
    group_size = num_heads // num_kv_heads
    block_shape = (1, 1, block_size, head_dim)
    num_items = (num_tokens // (2 * HALF_M.value // group_size) + num_rows) * num_kv_heads
    launch(
        _hopper_prefill_kernel,
        (min(num_items, num_sms(q.device)),),
        q,
        Tiles(k_cache, block_shape, PAGES),
        Tiles(v_cache, block_shape, PAGES),
        block_tables,
        context_lens,
        cu_seqlens_q,
        out,
        num_rows,
        num_items,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        NUM_STAGES=num_stages,
        num_warps=4,
    )
