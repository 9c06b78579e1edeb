"""All that stands before attention for a few rows, in one launch: norm, q, k and v, rotary, and the write into the paged cache.

    r = round(x + residual);   q, k, v = round(round(rms_norm(r)) W + b);   q, k = round(rotary(q, k));   cache[slot] = k, v

Rotary joins dims i and i + head_dim / 2 of a head, so a program takes both: pairs p = head * head_dim / 2 + i, of all heads in the
order of W's outputs. The rest is as in skinny_linear.py: whole rows of W, the norm computed by every program, tile after tile.

    W rows    head h:  | i: BLOCK_N |        | i + HALF: BLOCK_N |         one tile: two blocks of BLOCK_N rows, each K long
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import has_pdl, launch_options, num_sms
from .skinny_linear import MAX_SKINNY_ROWS, _normalised
from .tuning import ceil_div, skinny_linear_config

__all__ = ["norm_qkv_rotary_store"]


@triton.jit
def _load_pairs(
    weight_ptr, first, offs_k, stride_row, NUM_PAIRS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Weights of pairs first .. first + BLOCK_N, both of them; past NUM_PAIRS zeros."""
    pairs = first + tl.arange(0, BLOCK_N)
    rows = pairs // HALF * (2 * HALF) + pairs % HALF
    mask = (pairs < NUM_PAIRS)[:, None] & (offs_k < K)[None, :]
    rows_ptr = weight_ptr + rows.to(tl.int64)[:, None] * stride_row + offs_k[None, :]
    return tl.load(rows_ptr, mask=mask, other=0.0), tl.load(rows_ptr + HALF * stride_row, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_programs"])
def _norm_qkv_kernel(
    x_ptr,
    residual_ptr,
    gain_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    q_scale_ptr,
    slot_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    r_ptr,
    eps,
    stride_x_row,
    stride_residual_row,
    stride_weight_row,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    num_programs,
    M: tl.constexpr,
    K: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    NUM_PAIRS: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HALF
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    start = tl.program_id(0) * BLOCK_N
    weight_a, weight_b = _load_pairs(weight_ptr, start, offs_k, stride_weight_row, NUM_PAIRS, HALF, K, BLOCK_N)
    gain = tl.load(gain_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = _normalised(
        x_ptr, residual_ptr, gain, r_ptr, eps, stride_x_row, stride_residual_row, M, K, HAS_RESIDUAL, BLOCK_M, BLOCK_K
    )
    mask_m = offs_m < M
    slots = tl.load(slot_ptr + offs_m, mask=mask_m, other=-1)
    blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    for first in range(start, NUM_PAIRS, num_programs * BLOCK_N):
        ahead_a, ahead_b = _load_pairs(
            weight_ptr, first + num_programs * BLOCK_N, offs_k, stride_weight_row, NUM_PAIRS, HALF, K, BLOCK_N
        )
        head = tl.cast(first // HALF, tl.int64)  # BLOCK_N divides HALF: a tile lies in one head
        dims = first % HALF + tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (dims < HALF)[None, :]
        # read while the weights are on their way, also where a value head does not turn
        angle = offs_m[:, None] * HALF + dims[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        if HAS_BIAS:
            bias_a = tl.load(bias_ptr + head * 2 * HALF + dims).to(tl.float32)
            bias_b = tl.load(bias_ptr + head * 2 * HALF + HALF + dims).to(tl.float32)
        a = tl.sum(weight_a.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)  # [BLOCK_M, BLOCK_N]
        b = tl.sum(weight_b.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)
        if HAS_BIAS:
            a += bias_a[None, :]
            b += bias_b[None, :]
        a = a.to(dtype).to(tl.float32)
        b = b.to(dtype).to(tl.float32)
        if head < NUM_HEADS + NUM_KV_HEADS:
            turned_a = a * cos - b * sin
            turned_b = b * cos + a * sin
            if head < NUM_HEADS:
                if HAS_Q_SCALE:
                    scale = tl.load(q_scale_ptr + offs_m, mask=mask_m, other=1.0)[:, None]
                    turned_a = turned_a * scale
                    turned_b = turned_b * scale
                target_ptr = q_ptr + (offs_m[:, None] * NUM_HEADS + head) * (2 * HALF) + dims[None, :]
                tl.store(target_ptr, turned_a.to(dtype), mask=mask)
                tl.store(target_ptr + HALF, turned_b.to(dtype), mask=mask)
            else:
                target = blocks * stride_k_block + (head - NUM_HEADS) * stride_k_head + offsets * stride_k_token
                target_ptr = k_cache_ptr + target[:, None] + dims[None, :]
                tl.store(target_ptr, turned_a.to(dtype), mask=mask & (slots >= 0)[:, None])
                tl.store(target_ptr + HALF, turned_b.to(dtype), mask=mask & (slots >= 0)[:, None])
        else:
            target = blocks * stride_v_block + (head - NUM_HEADS - NUM_KV_HEADS) * stride_v_head + offsets * stride_v_token
            target_ptr = v_cache_ptr + target[:, None] + dims[None, :]
            tl.store(target_ptr, a.to(dtype), mask=mask & (slots >= 0)[:, None])
            tl.store(target_ptr + HALF, b.to(dtype), mask=mask & (slots >= 0)[:, None])
        weight_a, weight_b = ahead_a, ahead_b


def norm_qkv_rotary_store(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on the current device and stream. k_cache and v_cache are modified at the slots.

    x, residual: [num_rows <= 4, hidden], fp16|bf16|fp32, rows of any stride, contiguous inside a row; residual may be None
    gain: [hidden]      weight: [hidden, (num_heads + 2 num_kv_heads) * head_dim], contiguous along hidden, columns [q | k | v]
    bias: [columns], contiguous, or None
    cos, sin: [num_rows, head_dim / 2], fp32, contiguous: the whole head turns      q_scale: [num_rows], fp32, contiguous, or None
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], x's dtype, strided but for the last dim
    slot_mapping: [num_rows], int64, contiguous; -1 stores nothing

    Returns (q: [num_rows, num_heads, head_dim], r: [num_rows, hidden]), new, contiguous; without a residual r is x itself.
    """
    num_rows, k = x.shape
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    half = head_dim // 2
    num_heads = weight.shape[1] // head_dim - 2 * num_kv_heads
    assert num_rows <= MAX_SKINNY_ROWS, f"{num_rows} rows are more than {MAX_SKINNY_ROWS}"
    assert cos.shape == sin.shape == (num_rows, half), f"the whole head turns: {cos.shape} is not {(num_rows, half)}"
    assert 1 == x.stride(1) == weight.stride(0) == slot_mapping.stride(0) == k_cache.stride(3) == v_cache.stride(3)
    assert cos.is_contiguous(), "cos must be contiguous"
    assert sin.is_contiguous(), "sin must be contiguous"
    q = torch.empty((num_rows, num_heads, head_dim), dtype=x.dtype, device=x.device)
    r = x if residual is None else torch.empty((num_rows, k), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return q, r
    config = skinny_linear_config(num_rows, k, x.element_size(), whole_rows=True, gated=True)
    block_n = min(config.block_n, half & -half)
    num_programs = min(ceil_div(weight.shape[1] // 2, block_n), config.programs_per_sm * num_sms(x.device))
    _norm_qkv_kernel[(num_programs,)](
        x,
        residual,
        gain,
        weight,
        bias,
        cos,
        sin,
        q_scale,
        slot_mapping,
        q,
        k_cache,
        v_cache,
        None if residual is None else r,
        eps,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        weight.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        num_programs,
        M=num_rows,
        K=k,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=half,
        BLOCK_SIZE=block_size,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        HAS_Q_SCALE=q_scale is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return q, r
