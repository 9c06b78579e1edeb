"""The small ops that have kernels, as plain torch. Fused units are built from these or from the kernels of the same names.

Same signatures as the launchers in `ops/kernels/`. Slow and obvious on purpose: they define what the kernels must give.
"""

import torch

from ..operands import Projected, Unadded, stream_after, whole

__all__ = ["paged_decode_attention", "paged_prefill_attention", "rms_norm", "rotary_store_kv", "silu_and_mul"]

#: Prefill scores held at once (fp32 elements): 256 MiB, so that a long chunk over a long context fits beside the KV cache.
MAX_SCORES = 2**26


def rms_norm(
    x: Projected, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm, optionally of the sum with a residual stream (Zhang and Sennrich 2019, arXiv:1910.07467).

    x, residual: [num_tokens, hidden], fp16|bf16|fp32, x also SplitSums or Added      weight: [hidden], the same dtype

        r = x                      without residual
        r = round(x + residual)    to x's dtype, otherwise
        y = r / sqrt(mean(r^2) + eps) * weight      in fp32, rounded once

    Returns (y, r), both [num_tokens, hidden] in x's dtype; r is x itself without a residual. num_tokens may be 0.
    """
    r = stream_after(x, residual)
    wide = r.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype), r


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
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of q and k, then k and v into the paged cache, which is modified.

    qkv:      [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], fp16|bf16|fp32, heads in the order q, k, v; or
        SplitSums of that
    cos, sin: [num_tokens, rotary_dim / 2], fp32          q_scale: [num_tokens], fp32, or None
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]
    slot_mapping: [num_tokens], int64: block * block_size + offset; -1 stores nothing

        a, b = h[i], h[i + rotary_dim / 2]:   h'[i] = a cos_i - b sin_i;   h'[i + rotary_dim / 2] = b cos_i + a sin_i

    in fp32, rounded once; dims past rotary_dim stay. q' is multiplied by q_scale before it is rounded.
    Returns q': [num_tokens, num_heads, head_dim] in qkv's dtype.
    """
    num_tokens, head_dim, qkv = qkv.shape[0], k_cache.shape[-1], whole(qkv)
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    half = cos.shape[1]
    qk = heads[:, : num_heads + num_kv_heads].float()
    a, b = qk[..., :half], qk[..., half : 2 * half]
    c, s = cos[:, None, :], sin[:, None, :]
    rotated = torch.cat((a * c - b * s, b * c + a * s, qk[..., 2 * half :]), dim=-1)
    q = rotated[:, :num_heads]
    if q_scale is not None:
        q = q * q_scale[:, None, None]
    k, v = rotated[:, num_heads:].to(k_cache.dtype), heads[:, num_heads + num_kv_heads :].to(v_cache.dtype)
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        slot_mapping, k, v = slot_mapping[kept], k[kept], v[kept]
    block_size = k_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v
    return q.to(qkv.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """SiLU of the gate times the up projection (Shazeer 2020, arXiv:2002.05202).

    x: [num_tokens, 2 inter], fp16|bf16|fp32, columns [gate | up]

        y = gate / (1 + exp(-gate)) * up      in fp32, rounded once

    Returns y: [num_tokens, inter] in x's dtype. num_tokens may be 0.
    """
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


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
    """Attention of one query token a sequence over its paged keys and values; grouped heads (Ainslie et al., arXiv:2305.13245).

    q: [batch, num_heads, head_dim], fp16|bf16|fp32; head h reads kv head h // (num_heads / num_kv_heads)
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]
    block_tables: [batch, max_blocks], int32; entries past the context are any valid block
    context_lens: [batch], int32, the new token included, in [1, max_blocks * block_size]
    sliding_window: keys that a query sees, itself included; 0: all
    out: of the result's shape and dtype, contiguous: filled and returned; None: a new tensor

        out = softmax(q K^T scale, over positions max(0, L - window) <= p < L) V,  L = context_len, in fp32, rounded once

    Returns [batch, num_heads, head_dim] in q's dtype. batch may be 0.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    tables = block_tables.long()
    keys = k_cache.transpose(0, 1)[:, tables].flatten(2, 3).float()  # [num_kv_heads, batch, max_len, head_dim]
    values = v_cache.transpose(0, 1)[:, tables].flatten(2, 3).float()
    queries = q.view(batch, num_kv_heads, -1, head_dim).transpose(0, 1).float()  # [num_kv_heads, batch, group, head_dim]
    position = torch.arange(keys.shape[2], device=q.device)
    lens = context_lens.long()[:, None]
    hidden = position >= lens  # [batch, max_len]
    if sliding_window > 0:
        hidden = hidden | (position < lens - sliding_window)
    scores = (queries @ keys.transpose(-1, -2)) * scale
    weights = torch.softmax(scores.masked_fill(hidden[:, None], float("-inf")), dim=-1)
    attended = weights @ values  # [num_kv_heads, batch, group, head_dim]
    attended = attended.transpose(0, 1).reshape(batch, num_heads, head_dim).to(q.dtype)
    return attended if out is None else out.copy_(attended)


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
    """Causal attention of each row's last positions over all its paged keys; grouped heads (Ainslie et al., arXiv:2305.13245).

    q: [num_tokens, num_heads, head_dim], fp16|bf16|fp32; head h reads kv head h // (num_heads / num_kv_heads)
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]
    block_tables: [num_rows, max_blocks], int32; entries past the context are any valid block
    context_lens: [num_rows], int32: keys of each row, its queries included
    cu_seqlens_q: [num_rows + 1], int32: row i's queries are q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]; from 0 to num_tokens
    scale: > 0      sliding_window: keys that a query sees, itself included; 0: all
    out: of the result's shape and dtype, contiguous: filled and returned; None: a new tensor

    The query at position p sees keys max(0, p + 1 - window) <= key <= p. Scores, softmax and sum in fp32, rounded once.
    Returns [num_tokens, num_heads, head_dim] in q's dtype. num_tokens may be 0.
    """
    if out is None:
        out = torch.empty_like(q)
    bounds = cu_seqlens_q.tolist()
    for row, context_len in enumerate(context_lens.tolist()):
        queries = slice(bounds[row], bounds[row + 1])
        table = block_tables[row, : -(-context_len // k_cache.shape[2])]
        out[queries] = _attend_row(q[queries], k_cache, v_cache, table, context_len, scale, sliding_window)
    return out


def _attend_row(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """One row of the above. q: [num_queries, num_heads, head_dim]; block_table: [blocks of the context]."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    table = block_table.long()
    keys = k_cache.transpose(0, 1)[:, None, table].flatten(2, 3).float()  # [num_kv_heads, 1, >= context_len, head_dim]
    values = v_cache.transpose(0, 1)[:, None, table].flatten(2, 3).float()
    queries = q.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [num_kv_heads, group, num_queries, head_dim]
    position = torch.arange(context_len, device=q.device)
    out = torch.empty_like(q)
    tile = max(1, MAX_SCORES // (num_heads * context_len))
    for begin in range(0, num_queries, tile):
        end = min(begin + tile, num_queries)
        seen = context_len - num_queries + end  # keys up to the tile's last query
        at = position[context_len - num_queries + begin : seen, None]
        hidden = position[:seen] > at  # [tile, seen]
        if sliding_window > 0:
            hidden = hidden | (position[:seen] <= at - sliding_window)
        scores = (queries[:, :, begin:end].float() @ keys[:, :, :seen].transpose(-1, -2)) * scale
        weights = torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)
        part = weights @ values[:, :, :seen]  # [num_kv_heads, group, tile, head_dim]
        out[begin:end] = part.permute(2, 0, 1, 3).reshape(end - begin, num_heads, head_dim)
    return out
