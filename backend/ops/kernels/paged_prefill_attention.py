"""Causal attention of prompt chunks over their paged keys and values (FlashAttention-2: Dao 2023, arXiv:2307.08691; Milakov and
Gimelshein 2018, arXiv:1805.02867, for the online softmax; Kwon et al. 2023, arXiv:2309.06180, for the pages).

    query i of a row stands at p = L - num_queries + i:   out_i = softmax(q_i K^T scale, over max(0, p + 1 - window) <= j <= p) V

Tiling: the grid is (query tiles of all rows, num_kv_heads). A tile holds BLOCK_Q = BLOCK_M // GROUP_SIZE consecutive queries of
one row, each with all the query heads of its kv head, so that K and V are read once for them; what is left of BLOCK_M is padding.

    tile  | query 0: head 0 .. GROUP_SIZE - 1 | query 1: heads | ... | query BLOCK_Q - 1: heads | padding |    = BLOCK_M rows

Only the device knows where rows begin (cu_seqlens_q), and the launch must not wait for it: row i owns the tiles from
cu_seqlens_q[i] // BLOCK_Q + i on. That is at least as many as it needs and at most one more, their number over all rows is known
on the host, and a program finds its row by bisection. The last tiles, which see the most keys, are started first.

Keys go by in tiles of BLOCK_N, masked only where some query of the tile does not see them all:

    0        first (window)        p of the first query     p of the last query
    |..hidden..|==== all seen ====|== triangle, masked ====|
    with a sliding window every tile is masked: the first keys differ from query to query

Scores, softmax and sums in fp32; the weights are rounded to V's dtype for the second product, the result once.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .attention_tuning import prefill_attention_config
from .fast_launch import launch
from .hopper_prefill_attention import hopper_prefill_attention
from .hopper_tuning import HOPPER_PREFILL_STAGES, takes_hopper_prefill
from .launch import chosen

__all__ = ["paged_prefill_attention"]

CPU_COMPUTE_CAPABILITY = (
    100  # for the interpreter: the tiles that sm_90 has for what its own kernel, which needs a GPU, does not take
)


@triton.jit
def _row_of_tile(cu_seqlens_ptr, tile, num_rows, BLOCK_Q: tl.constexpr):
    """The last row whose first tile is not past `tile`."""
    low = tile * 0
    high = low + num_rows
    while high - low > 1:
        middle = (low + high) // 2
        is_past = tl.load(cu_seqlens_ptr + middle) // BLOCK_Q + middle > tile
        low = tl.where(is_past, low, middle)
        high = tl.where(is_past, middle, high)
    return low


@triton.jit
def _attend(
    acc,
    total,
    maximum,
    q,
    positions,
    begin,
    end,
    first,
    table_ptr,
    k_head_ptr,
    v_head_ptr,
    scale_log2,
    stride_k_block,
    stride_k_token,
    stride_v_block,
    stride_v_token,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Adds the keys [begin, end) to the running softmax; begin is a multiple of BLOCK_N. Not MASKED: end is one too, and every
    query sees every key. MASKED: no query sees keys before `first`, and those that a query does not see are left out."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    for tile in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        keys = tile + offs_n
        mask_n = (keys >= first) & (keys < end) if MASKED else keys >= 0
        if BLOCK_SIZE % BLOCK_N == 0:  # the tile lies in one block
            block = tl.load(table_ptr + tile // BLOCK_SIZE).to(tl.int64)  # int64: the pool may pass 2^31
            k_tile_ptr = k_head_ptr + (block * stride_k_block + tile % BLOCK_SIZE * stride_k_token)
            v_tile_ptr = v_head_ptr + (block * stride_v_block + tile % BLOCK_SIZE * stride_v_token)
            k_rows = offs_n * stride_k_token  # int32: inside a block
            v_rows = offs_n * stride_v_token
        else:
            block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=mask_n, other=0).to(tl.int64)
            k_tile_ptr = k_head_ptr
            v_tile_ptr = v_head_ptr
            k_rows = block * stride_k_block + keys % BLOCK_SIZE * stride_k_token
            v_rows = block * stride_v_block + keys % BLOCK_SIZE * stride_v_token
        # Of masked keys whatever the block holds: a query sees none of them, and its scores of them are replaced.
        k = tl.load(k_tile_ptr + k_rows[None, :] + offs_d[:, None], mask=mask_d[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = keys[None, :] <= positions[:, None]
            if SLIDING_WINDOW > 0:
                seen &= keys[None, :] > positions[:, None] - SLIDING_WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale_log2)
        rescale = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores * scale_log2 - new_maximum[:, None])
        v = tl.load(v_tile_ptr + v_rows[:, None] + offs_d[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        total = total * rescale + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc=acc * rescale[:, None], input_precision=PRECISION)
        maximum = new_maximum
    return acc, total, maximum


# Tables and lengths are slices that begin at the first prefill row: their alignment changes from step to step and must not
# choose another compiled kernel.
@triton.jit(do_not_specialize=["block_tables_ptr", "context_lens_ptr", "cu_seqlens_ptr", "num_rows", "stride_table_row"])
def _prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    context_lens_ptr,
    cu_seqlens_ptr,
    out_ptr,
    num_rows,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    stride_table_row,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP_SIZE
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest contexts of each row first
    kv_head = tl.program_id(1).to(tl.int64)
    row = _row_of_tile(cu_seqlens_ptr, tile, num_rows, BLOCK_Q).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + row)
    num_queries = tl.load(cu_seqlens_ptr + row + 1) - start
    first_query = (tile - (start // BLOCK_Q + row.to(tl.int32))) * BLOCK_Q
    if first_query >= num_queries:
        return
    context_len = tl.load(context_lens_ptr + row)
    first_position = context_len - num_queries + first_query
    end = tl.minimum(first_position + BLOCK_Q, context_len)  # one past the last key that the tile sees
    all_seen_end = (first_position + 1) // BLOCK_N * BLOCK_N
    first = end * 0
    if SLIDING_WINDOW > 0:
        first = tl.maximum(first_position + 1 - SLIDING_WINDOW, 0)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    queries = first_query + offs_m // GROUP_SIZE
    heads = kv_head * GROUP_SIZE + offs_m % GROUP_SIZE
    positions = context_len - num_queries + queries
    mask_q = ((offs_m < BLOCK_Q * GROUP_SIZE) & (queries < num_queries))[:, None] & (offs_d < HEAD_DIM)[None, :]
    tokens = start.to(tl.int64) + queries
    q_ptrs = q_ptr + tokens[:, None] * stride_q_row + heads[:, None] * stride_q_head + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)
    table_ptr = block_tables_ptr + row * stride_table_row
    k_head_ptr = k_cache_ptr + kv_head * stride_k_head
    v_head_ptr = v_cache_ptr + kv_head * stride_v_head

    # Finite, so that a query none of whose keys came by yet (sliding windows) has weights of 0 and not NaN.
    maximum = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc, total, maximum = _attend(
        acc,
        total,
        maximum,
        q,
        positions,
        first // BLOCK_N * BLOCK_N,
        all_seen_end,
        first,
        table_ptr,
        k_head_ptr,
        v_head_ptr,
        scale_log2,
        stride_k_block,
        stride_k_token,
        stride_v_block,
        stride_v_token,
        SLIDING_WINDOW > 0,
        HEAD_DIM,
        BLOCK_SIZE,
        SLIDING_WINDOW,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
        NUM_STAGES,
    )
    acc, total, maximum = _attend(
        acc,
        total,
        maximum,
        q,
        positions,
        all_seen_end,
        end,
        first,
        table_ptr,
        k_head_ptr,
        v_head_ptr,
        scale_log2,
        stride_k_block,
        stride_k_token,
        stride_v_block,
        stride_v_token,
        True,
        HEAD_DIM,
        BLOCK_SIZE,
        SLIDING_WINDOW,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
        NUM_STAGES,
    )
    out_rows = (tokens * NUM_HEADS + heads) * HEAD_DIM
    out = acc / total[:, None]  # every query sees itself; what padding holds is not stored
    tl.store(out_ptr + out_rows[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_q)


@functools.cache
def _compute_capability(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_COMPUTE_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch on the current device and stream; nothing is read back: the grid follows from the shapes of q and block_tables.

    q: [num_tokens, num_heads, head_dim], fp16|bf16|fp32, contiguous inside a head; head h reads kv head h // group_size
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], q's dtype, strided but for the last dim
    block_tables: [num_rows, max_blocks], int32, rows of any stride; entries past the context are not read
    context_lens: [num_rows], int32, contiguous: keys of each row, its queries included
    cu_seqlens_q: [num_rows + 1], int32, contiguous: row i's queries are q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]], at most
    context_lens[i] of them, the last positions of its context; from 0 to num_tokens. A row may have no queries
    scale: > 0      sliding_window: keys that a query sees, itself included; 0: all

    out: of the result's shape and dtype, contiguous: filled and returned; None: a new tensor

    Returns [num_tokens, num_heads, head_dim], contiguous, in q's dtype. num_tokens may be 0.
    Raises ConfigError when head_dim > 256.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    num_rows = block_tables.shape[0]
    group_size = num_heads // num_kv_heads
    capability = _compute_capability(q.device)
    config = chosen(prefill_attention_config, group_size, head_dim, q.element_size(), capability)
    if out is None:
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    assert scale > 0, f"the maximum is taken before the scale {scale}"
    assert num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} kv heads"
    assert k_cache.dtype == v_cache.dtype == q.dtype, "the cache has q's dtype"
    assert context_lens.shape[0] == cu_seqlens_q.shape[0] - 1 == num_rows, "one length and one start a row, and the end"
    assert 1 == q.stride(2) == k_cache.stride(3) == v_cache.stride(3) == block_tables.stride(1)
    assert 1 == context_lens.stride(0) == cu_seqlens_q.stride(0)
    if chosen(takes_hopper_prefill, group_size, head_dim, block_size, q.element_size(), sliding_window, capability):
        tables = block_tables, context_lens, cu_seqlens_q
        hopper_prefill_attention(q, k_cache, v_cache, *tables, scale, HOPPER_PREFILL_STAGES, out)
        return out
    num_tiles = num_tokens // (config.block_m // group_size) + num_rows
    launch(
        _prefill_kernel,
        (num_tiles, num_kv_heads),
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        cu_seqlens_q,
        out,
        num_rows,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SLIDING_WINDOW=sliding_window,
        PRECISION="ieee",
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return out
