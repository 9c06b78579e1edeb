"""Attention of a mixed batch over the paged KV cache. The contract is the Protocol `Attention` of `ops/table.py`."""

import dataclasses
from collections.abc import Callable

import torch

from ..operands import AttentionBatch, KvPages
from .kv_pages import gathered_pages, page_shape
from .primitives import paged_decode_attention as reference_paged_decode_attention
from .primitives import paged_prefill_attention as reference_paged_prefill_attention

__all__ = ["attention", "quantized_attention"]

PagedAttention = Callable[..., torch.Tensor]
QuantizedAttention = Callable[..., torch.Tensor]


def quantized_attention(
    q: torch.Tensor,
    k_cache: KvPages,
    v_cache: KvPages,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """Attention over quantised pages is attention over their values: the blocks in use are widened to fp32, then as ever."""
    assert not isinstance(k_cache, torch.Tensor)
    assert not isinstance(v_cache, torch.Tensor)
    used, place = torch.unique(batch.block_tables, return_inverse=True)
    dense = dataclasses.replace(batch, block_tables=place.int())
    return attention(q, gathered_pages(k_cache, used.long()), gathered_pages(v_cache, used.long()), dense, scale, sliding_window)


def attention(
    q: torch.Tensor,
    k_cache: KvPages,
    v_cache: KvPages,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int,
    *,
    paged_decode_attention: PagedAttention = reference_paged_decode_attention,
    paged_prefill_attention: PagedAttention = reference_paged_prefill_attention,
    quantized_attention: QuantizedAttention = quantized_attention,
) -> torch.Tensor:
    if not isinstance(k_cache, torch.Tensor):
        return quantized_attention(q, k_cache, v_cache, batch, scale, sliding_window)
    n = batch.num_decodes
    tables, lens = batch.block_tables, batch.context_lens
    parts = []
    if n:
        num_blocks = -(-batch.max_decode_context // page_shape(k_cache)[2])
        parts.append(paged_decode_attention(q[:n], k_cache, v_cache, tables[:n, :num_blocks], lens[:n], scale, sliding_window))
    if batch.prefills:
        starts = batch.cu_seqlens_q
        parts.append(paged_prefill_attention(q[n:], k_cache, v_cache, tables[n:], lens[n:], starts, scale, sliding_window))
    return torch.cat(parts) if len(parts) != 1 else parts[0]
