"""Rotary embedding (Su et al. 2021, arXiv:2104.09864) of q and k, fused with the write of k and v into the paged cache.

    a, b = h[i], h[i + rotary_dim / 2]:   h'[i] = a cos_i - b sin_i,   h'[i + rotary_dim / 2] = b cos_i + a sin_i

in fp32, rounded once; q' is multiplied by q_scale before it is rounded; dims past rotary_dim stay; v is copied.

Tiling: the grid is (num_tokens, blocks of BLOCK_H heads); a block holds heads of one kind only, so its destination is one tensor.

    row of qkv    | q heads: cdiv(num_heads, BLOCK_H) programs | k: cdiv(num_kv_heads, BLOCK_H) | v: the same |
    one head      | a: BLOCK_HALF | b: BLOCK_HALF | rest: BLOCK_REST |      three contiguous tiles [BLOCK_H, .]
"""

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import Unadded, parts_of

from .fast_launch import launch
from .launch import chosen, has_pdl, launch_options, wait_for_previous
from .split_sum import load_sum
from .tuning import ceil_div, rotary_config

__all__ = ["rotary_store_kv"]


@triton.jit
def _rotate(a, b, cos, sin, scale):
    """fp32 in, fp32 out: both halves of the head, times the scale of the row."""
    return (a * cos - b * sin) * scale, (b * cos + a * sin) * scale


@triton.jit
def _rotary_store_kv_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_scale_ptr,
    slot_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    stride_qkv_row,
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
    NUM_PARTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)  # int64: num_tokens * row size may pass 2^31
    head_block = tl.program_id(1).to(tl.int64)
    NUM_Q_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    NUM_KV_BLOCKS: tl.constexpr = (NUM_KV_HEADS + BLOCK_H - 1) // BLOCK_H
    offs_h = tl.arange(0, BLOCK_H)[:, None]
    offs_half = tl.arange(0, BLOCK_HALF)[None, :]
    mask_half = offs_half < HALF
    row_ptr = qkv_ptr + token * stride_qkv_row
    stride_part = tl.num_programs(0).to(tl.int64) * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    dtype: tl.constexpr = q_out_ptr.dtype.element_ty
    scale = 1.0

    # Where this block of heads comes from (source, kind) and where it goes to (target).
    if head_block < NUM_Q_BLOCKS:
        heads = head_block * BLOCK_H + offs_h
        mask_h = heads < NUM_HEADS
        source_ptr = row_ptr + heads * HEAD_DIM
        target_ptr = q_out_ptr + (token * NUM_HEADS + heads) * HEAD_DIM
        if HAS_Q_SCALE:
            scale = tl.load(q_scale_ptr + token * stride_q_scale)
    else:
        slot = tl.load(slot_ptr + token * stride_slot)
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        kv_block = head_block - NUM_Q_BLOCKS
        if kv_block < NUM_KV_BLOCKS:
            heads = kv_block * BLOCK_H + offs_h
            source_ptr = row_ptr + (NUM_HEADS + heads) * HEAD_DIM
            target_ptr = k_cache_ptr + block * stride_k_block + heads * stride_k_head + offset * stride_k_token
        else:
            heads = (kv_block - NUM_KV_BLOCKS) * BLOCK_H + offs_h
            source_ptr = row_ptr + (NUM_HEADS + NUM_KV_HEADS + heads) * HEAD_DIM
            target_ptr = v_cache_ptr + block * stride_v_block + heads * stride_v_head + offset * stride_v_token
        mask_h = heads < tl.where(slot >= 0, NUM_KV_HEADS, 0)

    mask = mask_h & mask_half
    a = load_sum(source_ptr + offs_half, mask, stride_part, NUM_PARTS, dtype).to(tl.float32)
    b = load_sum(source_ptr + HALF + offs_half, mask, stride_part, NUM_PARTS, dtype).to(tl.float32)
    if head_block < NUM_Q_BLOCKS + NUM_KV_BLOCKS:
        cos = tl.load(cos_ptr + token * stride_cos_row + offs_half, mask=mask_half, other=0.0)
        sin = tl.load(sin_ptr + token * stride_sin_row + offs_half, mask=mask_half, other=0.0)
        a, b = _rotate(a, b, cos, sin, scale)
    tl.store(target_ptr + offs_half, a.to(target_ptr.dtype.element_ty), mask=mask)
    tl.store(target_ptr + HALF + offs_half, b.to(target_ptr.dtype.element_ty), mask=mask)
    if BLOCK_REST > 0:
        offs_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        mask_rest = mask_h & (offs_rest < HEAD_DIM)
        rest = load_sum(source_ptr + offs_rest, mask_rest, stride_part, NUM_PARTS, dtype).to(tl.float32) * scale
        tl.store(target_ptr + offs_rest, rest.to(target_ptr.dtype.element_ty), mask=mask_rest)


def rotary_store_kv(
    qkv: Unadded,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """Launch on the current device and stream. k_cache and v_cache are modified at the slots.

    qkv: [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], fp16|bf16|fp32, rows of any stride, contiguous inside a row; or
        SplitSums of that
    cos, sin: [num_tokens, rotary_dim / 2], fp32, contiguous inside a row      q_scale: [num_tokens], fp32, or None
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], qkv's dtype, strided but for the last dim
    slot_mapping: [num_tokens], int64: block * block_size + offset; -1 stores nothing. Two tokens never share a slot

    Returns q': [num_tokens, num_heads, head_dim], new, contiguous, in qkv's dtype. num_tokens may be 0.
    Raises ConfigError when head_dim > 256 or rotary_dim is odd or larger than head_dim.
    """
    num_tokens, dtype = qkv.shape[0], qkv.dtype
    x, num_parts = parts_of(qkv)
    block_size, head_dim = k_cache.shape[2:]
    half = cos.shape[1]
    config = chosen(rotary_config, num_heads, num_kv_heads, head_dim, 2 * half)
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim, f"qkv has {qkv.shape[1]} columns"
    assert k_cache.dtype == v_cache.dtype == dtype, "the cache has qkv's dtype"
    assert 1 == x.stride(-1) == cos.stride(1) == sin.stride(1) == k_cache.stride(3) == v_cache.stride(3) or half == 1
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=dtype, device=x.device)
    if num_tokens == 0:
        return q
    num_head_blocks = ceil_div(num_heads, config.block_h) + 2 * ceil_div(num_kv_heads, config.block_h)
    launch(
        _rotary_store_kv_kernel,
        (num_tokens, num_head_blocks),
        x,
        cos,
        sin,
        q_scale,
        slot_mapping,
        q,
        k_cache,
        v_cache,
        x.stride(-2),
        cos.stride(0),
        sin.stride(0),
        0 if q_scale is None else q_scale.stride(0),
        slot_mapping.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_PARTS=num_parts,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK_SIZE=block_size,
        HAS_Q_SCALE=q_scale is not None,
        BLOCK_H=config.block_h,
        BLOCK_HALF=config.block_half,
        BLOCK_REST=config.block_rest,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return q
