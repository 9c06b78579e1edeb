"""Attention of one query token a sequence over its paged keys and values (flash-decoding: Dao et al. 2023; Milakov and
Gimelshein 2018, arXiv:1805.02867, for the online softmax; Kwon et al. 2023, arXiv:2309.06180, for the pages).

    out = softmax(q K^T scale, over positions max(0, L - window) <= p < L) V,      L = context_len

Tiling: the grid is (num_kv_heads, num_splits, batch). Programs begin in the order of the rows, which the scheduler has longest first,
so that short ones fill the gaps at the end. The query heads that share a kv head are the rows of one tile, so that K and V are read
once; they are padded to the 16 rows that tl.dot needs. A row's keys are cut into splits of equal whole tiles:

    positions   0        first              (multiples of BLOCK_N)                 L
                |..hidden..|=== split 0 ===|=== split 1 ===|== split 2 ==|         splits past the end write nothing
                           |BLOCK_N|BLOCK_N|

With one split the result is written at once. Otherwise each split writes its normalised sum and the log2 of its weight in fp32,
and the program that comes last of a (sequence, kv head) adds them in their order: a counter tells it that it is the last. A split
holds at least MIN_SPLIT keys, so short rows of a batch use few splits.

`rotary_decode_attention` takes q, k and v as the linear layer leaves them, its last sums included, which saves a launch and a wait in
each layer. The rows of a program's tile that padding leaves are room for its k and v:

    rows of the tile    GROUP_SIZE heads of q | k | v | padding

All are loaded and turned at once (v is not), and the program whose split ends the row stores the last two before it reads keys. Nobody
else reads their place. As queries they give sums that nobody stores.

Scores, softmax and sums in fp32; the weights are rounded to V's dtype for the second product, the result once.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbotriton.backend.ops.operands import Unadded, parts_of

from .attention_tuning import decode_attention_config
from .fast_launch import launch
from .launch import chosen, has_pdl, launch_options, num_sms, wait_for_previous
from .split_sum import is_last_of, load_sum, workspace
from .tuning import MIN_DOT_ROWS, next_power_of_2

__all__ = ["paged_decode_attention", "rotary_decode_attention", "takes_rotary"]

REDUCE_TILE = 16  # splits that are added at once, at most
REDUCE_ELEMENTS = 1024  # and fp32 numbers of them a warp: 32 a thread


@triton.jit
def _key_range(context_lens_ptr, sequence, SLIDING_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first key seen, that rounded down to a tile, end)."""
    end = tl.load(context_lens_ptr + sequence)
    first = end * 0
    if SLIDING_WINDOW > 0:
        first = tl.maximum(end - SLIDING_WINDOW, 0)
    return first, first // BLOCK_N * BLOCK_N, end


@triton.jit
def _split_tokens(num_keys, num_splits, MIN_SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys a split: whole tiles, at least MIN_SPLIT keys."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_keys, num_splits), BLOCK_N) * BLOCK_N, MIN_SPLIT)


@triton.jit
def _ask_for_rows(block_ptr, rows, BLOCK_D: tl.constexpr):
    """Brings rows of BLOCK_D elements, at offsets [n] of a block, to the L2 cache; nothing waits for them. Not for the interpreter."""
    LINE: tl.constexpr = 1024 // block_ptr.dtype.element_ty.primitive_bitwidth
    lines = tl.arange(0, (BLOCK_D + LINE - 1) // LINE) * LINE
    ptrs = block_ptr + rows[:, None] + lines[None, :]
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _turned_rows(
    row_ptr,
    cos_ptr,
    sin_ptr,
    scale,
    heads,
    offs_g,
    offs_d,
    stride_head,
    stride_part,
    NUM_PARTS: tl.constexpr,
    HALF: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    dtype: tl.constexpr,
):
    """[BLOCK_G, BLOCK_D], fp32: q heads after rotary, times `scale`; k after rotary; v. heads: where each row's head stands in qkv."""
    mask = (offs_g < GROUP_SIZE + 2)[:, None] & (offs_d < HEAD_DIM)[None, :]
    is_turned = (offs_g < GROUP_SIZE + 1)[:, None] & (offs_d < 2 * HALF)[None, :]
    is_first = offs_d < HALF
    pairs = tl.where(is_first, offs_d + HALF, tl.where(offs_d < 2 * HALF, offs_d - HALF, offs_d))
    # Of the tile's shape, so that all loads have one layout: others would be changed through shared memory.
    angles = tl.where(is_first, offs_d, offs_d - HALF)[None, :] + offs_g[:, None] * 0
    head_ptrs = row_ptr + heads[:, None] * stride_head
    x = load_sum(head_ptrs + offs_d[None, :], mask, stride_part, NUM_PARTS, dtype).to(tl.float32)
    y = load_sum(head_ptrs + pairs[None, :], mask, stride_part, NUM_PARTS, dtype).to(tl.float32)
    cos = tl.load(cos_ptr + angles, mask=is_turned, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=is_turned, other=0.0)
    turned = tl.where(is_turned, x * cos + tl.where(is_first[None, :], -y, y) * sin, x)
    return turned * tl.where(offs_g < GROUP_SIZE, scale, 1.0)[:, None]


@triton.jit
def _add_splits(
    partial_ptr,
    log_weight_ptr,
    out_ptr,
    first_head,
    num_splits,
    num_used,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the sum of what all splits left of the GROUP_SIZE heads from `first_head` on, whoever came last."""
    offs_g = tl.arange(0, PADDED_GROUP)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_g < GROUP_SIZE)[:, None] & (offs_d < HEAD_DIM)[None, :]
    rows = first_head + tl.minimum(offs_g, GROUP_SIZE - 1)  # padding repeats the last head
    maximum = tl.full((PADDED_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    acc = tl.zeros((PADDED_GROUP, BLOCK_D), tl.float32)
    for tile in range(0, num_used, BLOCK_S):
        offs_s = tile + tl.arange(0, BLOCK_S)
        places = rows[None, :] * num_splits + offs_s[:, None]  # [BLOCK_S, PADDED_GROUP]
        mask_s = offs_s < num_used
        log_weights = tl.load(log_weight_ptr + places, mask=mask_s[:, None], other=float("-inf"), cache_modifier=".cg")
        partial_ptrs = partial_ptr + places[:, :, None] * HEAD_DIM + offs_d[None, None, :]
        partial = tl.load(partial_ptrs, mask=mask_s[:, None, None] & mask[None, :, :], other=0.0, cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, tl.max(log_weights, axis=0))
        rescale = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(log_weights - new_maximum[None, :])
        total = total * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale[:, None] + tl.sum(weights[:, :, None] * partial, axis=0)
        maximum = new_maximum
    y = acc / total[:, None]
    tl.store(out_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_table_row", "num_splits"])
def _split_kernel(
    q_ptr,
    cos_ptr,
    sin_ptr,
    q_scale_ptr,
    slot_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    context_lens_ptr,
    out_ptr,
    partial_ptr,
    log_weight_ptr,
    counters_ptr,
    num_splits,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_cos_row,
    stride_sin_row,
    stride_q_scale,
    stride_slot,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    stride_table_row,
    NUM_PARTS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    if EARLY and PDL:  # lengths, tables and earlier keys are older than the kernel before this one: see launch.py
        gdc_launch_dependents()
    else:
        wait_for_previous(PDL)
    kv_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    first, start, end = _key_range(context_lens_ptr, sequence, SLIDING_WINDOW, BLOCK_N)
    length = end
    num_used = 1
    if not ONE_SPLIT:
        split_tokens = _split_tokens(end - start, num_splits, MIN_SPLIT, BLOCK_N)
        num_used = tl.cdiv(end - start, split_tokens)
        start += split * split_tokens
        if (start >= end) & (split > 0):
            return
        end = tl.minimum(start + split_tokens, end)

    offs_g = tl.arange(0, BLOCK_G)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    table_ptr = block_tables_ptr + sequence * stride_table_row
    k_head_ptr = k_cache_ptr + kv_head * stride_k_head
    v_head_ptr = v_cache_ptr + kv_head * stride_v_head
    ONE_BLOCK: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0  # a tile lies in one block, read an iteration ahead
    next_block = tl.load(table_ptr + tl.minimum(start, tl.maximum(end - 1, 0)) // BLOCK_SIZE) if ONE_BLOCK else 0
    if EARLY and PDL:
        if ONE_BLOCK:
            row = start % BLOCK_SIZE + offs_n
            _ask_for_rows(k_head_ptr + next_block.to(tl.int64) * stride_k_block, row * stride_k_token, BLOCK_D)
            _ask_for_rows(v_head_ptr + next_block.to(tl.int64) * stride_v_block, row * stride_v_token, BLOCK_D)
        gdc_wait()
    mask_q = (offs_g < GROUP_SIZE)[:, None] & mask_d[None, :]
    heads = kv_head * GROUP_SIZE + offs_g
    row_ptr = q_ptr + sequence * stride_q_row
    if NUM_PARTS == 0:
        q = tl.load(row_ptr + heads[:, None] * stride_q_head + offs_d[None, :], mask=mask_q, other=0.0)
    else:
        NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP_SIZE
        stride_part = tl.num_programs(2).to(tl.int64) * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        places = tl.where(offs_g < GROUP_SIZE, heads, NUM_HEADS + kv_head + (offs_g - GROUP_SIZE) * NUM_KV_HEADS)
        q_scale = tl.load(q_scale_ptr + sequence * stride_q_scale) if HAS_Q_SCALE else 1.0
        q = _turned_rows(
            row_ptr, cos_ptr + sequence * stride_cos_row, sin_ptr + sequence * stride_sin_row, q_scale, places, offs_g, offs_d,
            stride_q_head, stride_part, NUM_PARTS, HALF, GROUP_SIZE, HEAD_DIM, k_cache_ptr.dtype.element_ty,
        ).to(k_cache_ptr.dtype.element_ty)  # fmt: skip
        slot = tl.load(slot_ptr + sequence * stride_slot)
        stored = tl.where((end == length) & (slot >= 0), GROUP_SIZE + 2, 0)
        k_ptr = k_head_ptr + slot // BLOCK_SIZE * stride_k_block + slot % BLOCK_SIZE * stride_k_token
        v_ptr = v_head_ptr + slot // BLOCK_SIZE * stride_v_block + slot % BLOCK_SIZE * stride_v_token
        ptrs = tl.where((offs_g == GROUP_SIZE)[:, None], k_ptr + offs_d[None, :], v_ptr + offs_d[None, :])
        tl.store(ptrs, q, mask=((offs_g >= GROUP_SIZE) & (offs_g < stored))[:, None] & mask_d[None, :])
        tl.debug_barrier()  # other threads of this program read what was stored
    maximum = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    # Every tile holds at least one key that is seen, so `maximum` is finite after the first.
    for tile in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        positions = tile + offs_n
        seen = (positions >= first) & (positions < end)
        if ONE_BLOCK:  # int32 offsets inside it, and a scalar in front
            block = next_block.to(tl.int64)  # int64: the pool may pass 2^31
            next_block = tl.load(table_ptr + tl.minimum(tile + BLOCK_N, end - 1) // BLOCK_SIZE)
            k_tile_ptr = k_head_ptr + (block * stride_k_block + tile % BLOCK_SIZE * stride_k_token)
            v_tile_ptr = v_head_ptr + (block * stride_v_block + tile % BLOCK_SIZE * stride_v_token)
            k_rows = offs_n * stride_k_token
            v_rows = offs_n * stride_v_token
        else:
            block = tl.load(table_ptr + positions // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
            k_tile_ptr = k_head_ptr
            v_tile_ptr = v_head_ptr
            k_rows = block * stride_k_block + positions % BLOCK_SIZE * stride_k_token
            v_rows = block * stride_v_block + positions % BLOCK_SIZE * stride_v_token
        k = tl.load(k_tile_ptr + k_rows[None, :] + offs_d[:, None], mask=seen[None, :] & mask_d[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2  # [BLOCK_G, BLOCK_N]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        rescale = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[:, None])
        v = tl.load(v_tile_ptr + v_rows[:, None] + offs_d[None, :], mask=seen[:, None] & mask_d[None, :], other=0.0)
        total = total * rescale + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc=acc * rescale[:, None], input_precision=PRECISION)
        maximum = new_maximum

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # total is 0 only for a sequence of no keys: zeros
    if num_used <= 1:
        out_rows = (sequence * NUM_HEADS + heads) * HEAD_DIM
        tl.store(out_ptr + out_rows[:, None] + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask_q)
    elif not ONE_SPLIT:
        partial_rows = (sequence * NUM_HEADS + heads) * num_splits + split
        tl.store(partial_ptr + partial_rows[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=mask_q)
        tl.store(log_weight_ptr + partial_rows, maximum + tl.log2(total), mask=offs_g < GROUP_SIZE)
        if is_last_of(counters_ptr + sequence * tl.num_programs(0) + kv_head, num_used):
            first_head = sequence * NUM_HEADS + kv_head * GROUP_SIZE
            _add_splits(
                partial_ptr, log_weight_ptr, out_ptr, first_head, num_splits, num_used,
                GROUP_SIZE, HEAD_DIM, PADDED_GROUP, BLOCK_S, BLOCK_D,
            )  # fmt: skip


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch on the current device and stream; nothing is read back, so it can be captured in a CUDA graph.

    q: [batch, num_heads, head_dim], fp16|bf16|fp32, contiguous inside a head; head h reads kv head h // group_size
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], q's dtype, strided but for the last dim
    block_tables: [batch, max_blocks], int32, rows of any stride; entries past the context are not read
    context_lens: [batch], int32, contiguous, the new token included, at most max_blocks * block_size; 0 gives a row of zeros
    sliding_window: keys that a query sees, itself included; 0: all

    out: of the result's shape and dtype, contiguous: filled and returned; None: a new tensor

    Returns [batch, num_heads, head_dim], contiguous, in q's dtype. batch may be 0. Raises ConfigError when head_dim > 256.
    """
    assert q.stride(2) == 1, "heads are contiguous"
    assert q.dtype == k_cache.dtype, "the cache has q's dtype"
    assert q.shape[0] == context_lens.shape[0], "one query a row"
    num_heads, strides = q.shape[1], (q.stride(0), q.stride(1))
    return _launch(
        (q, None, None, None, None), (*strides, 0, 0, 0, 0), 0, 0, num_heads, k_cache, v_cache, block_tables, context_lens,
        scale, sliding_window, out,
    )  # fmt: skip


def takes_rotary(group_size: int) -> bool:
    """Whether a tile has room for k and v beside the query heads of a kv head."""
    return group_size + 2 <= max(MIN_DOT_ROWS, next_power_of_2(group_size))


def rotary_decode_attention(
    qkv: Unadded,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """`rotary_store_kv` and `paged_decode_attention` of its queries in one launch, with the arguments of both; the caches are modified.

    slot_mapping: [batch], int64: where the token at context_lens - 1 lies by block_tables; -1 with a context of 0
    """
    x, num_parts = parts_of(qkv)
    batch, head_dim, half = qkv.shape[0], k_cache.shape[3], cos.shape[1]
    num_heads = qkv.shape[1] // head_dim - 2 * k_cache.shape[1]
    assert qkv.shape[1] == (num_heads + 2 * k_cache.shape[1]) * head_dim, f"qkv has {qkv.shape[1]} columns"
    assert takes_rotary(num_heads // k_cache.shape[1]), f"{num_heads} heads over {k_cache.shape[1]} leave no room for k and v"
    assert qkv.dtype == k_cache.dtype, "the cache has qkv's dtype"
    assert 2 * half <= head_dim, f"rotary_dim {2 * half} with head_dim {head_dim}"
    assert batch == cos.shape[0] == sin.shape[0] == slot_mapping.shape[0] == context_lens.shape[0], "one token a row"
    assert 1 == x.stride(-1) == cos.stride(1) == sin.stride(1) or half == 1
    strides = (x.stride(-2), head_dim, cos.stride(0), sin.stride(0), 0 if q_scale is None else q_scale.stride(0))
    return _launch(
        (x, cos, sin, q_scale, slot_mapping), (*strides, slot_mapping.stride(0)), num_parts, half, num_heads, k_cache, v_cache,
        block_tables, context_lens, scale, sliding_window,
    )  # fmt: skip


def _launch(
    source: tuple[torch.Tensor | None, ...],
    source_strides: tuple[int, ...],
    num_parts: int,
    half: int,
    num_heads: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """source: q or q, k and v, then what turns these and says where the last two go; num_parts: of q, k and v, 0: q alone, turned."""
    batch, device, dtype = context_lens.shape[0], k_cache.device, k_cache.dtype
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    config = chosen(
        decode_attention_config,
        batch=batch,
        num_kv_heads=num_kv_heads,
        group_size=num_heads // num_kv_heads,
        head_dim=head_dim,
        element_bytes=k_cache.element_size(),
        max_context=block_tables.shape[1] * block_size,
        num_sms=num_sms(device),
    )
    if out is None:
        out = torch.empty((batch, num_heads, head_dim), dtype=dtype, device=device)
    if batch == 0:
        return out
    assert num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} kv heads"
    assert k_cache.dtype == v_cache.dtype == out.dtype, "both caches and the output have one dtype"
    assert 1 == k_cache.stride(3) == v_cache.stride(3) == block_tables.stride(1) == context_lens.stride(0)
    num_splits = config.num_splits
    padded_group = next_power_of_2(num_heads // num_kv_heads)
    one_split = num_splits == 1
    partial = log_weight = counters = None
    if not one_split:
        counters = workspace(device)[1]
        assert batch * num_kv_heads <= counters.numel(), f"{batch} x {num_kv_heads} heads are too many to split"
        partial = torch.empty((batch, num_heads, num_splits, head_dim), dtype=torch.float32, device=device)
        log_weight = torch.empty((batch, num_heads, num_splits), dtype=torch.float32, device=device)
    launch(
        _split_kernel,
        (num_kv_heads, num_splits, batch),
        *source,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        out,
        partial,
        log_weight,
        counters,
        num_splits,
        scale * math.log2(math.e),
        *source_strides,
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_tables.stride(0),
        NUM_PARTS=num_parts,
        HALF=half,
        HAS_Q_SCALE=source[3] is not None,
        NUM_HEADS=num_heads,
        GROUP_SIZE=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SLIDING_WINDOW=sliding_window,
        ONE_SPLIT=one_split,
        MIN_SPLIT=config.min_split_tokens,
        PRECISION="ieee",
        BLOCK_G=config.block_g,
        BLOCK_S=max(1, min(REDUCE_TILE, REDUCE_ELEMENTS * config.num_warps // (padded_group * config.block_d))),
        PADDED_GROUP=padded_group,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        NUM_STAGES=config.num_stages,
        EARLY=config.is_early,
        num_warps=config.num_warps,
        **launch_options(has_pdl(device)),
    )
    return out
