"""Attention of a mixed batch over the paged KV cache. The contract is the Protocol `Attention` of `ops/table.py`."""

from collections.abc import Callable

import torch

from ..operands import AttentionBatch
from .primitives import paged_decode_attention as reference_paged_decode_attention

__all__ = ["attention", "prefill_attention"]

#: Scores held at once (fp32 elements): 256 MiB, so that a long chunk over a long context fits beside the KV cache.
MAX_SCORES = 2**26

PagedDecodeAttention = Callable[..., torch.Tensor]


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int,
    *,
    paged_decode_attention: PagedDecodeAttention = reference_paged_decode_attention,
) -> torch.Tensor:
    n = batch.num_decodes
    parts = []
    if n:
        num_blocks = -(-batch.max_decode_context // k_cache.shape[2])
        tables = batch.block_tables[:n, :num_blocks]
        parts.append(paged_decode_attention(q[:n], k_cache, v_cache, tables, batch.context_lens[:n], scale, sliding_window))
    begin = n
    for row, (num_queries, context_len) in enumerate(batch.prefills, start=n):
        table = batch.block_tables[row, : -(-context_len // k_cache.shape[2])]
        queries = q[begin : begin + num_queries]
        parts.append(prefill_attention(queries, k_cache, v_cache, table, context_len, scale, sliding_window))
        begin += num_queries
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """Causal attention of one sequence's last `num_queries` positions over all its paged keys.

    q: [num_queries, num_heads, head_dim]      block_table: [blocks of the context], int32

    Query i stands at position p = context_len - num_queries + i and sees keys max(0, p + 1 - window) <= key <= p.
    Scores, softmax and sum in fp32, rounded once. Returns [num_queries, num_heads, head_dim].
    """
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
