"""Attention of a mixed batch over the paged KV cache. The contract is the Protocol `Attention` of `ops/table.py`."""

from collections.abc import Callable

import torch

from ..operands import AttentionBatch
from .primitives import paged_decode_attention as reference_paged_decode_attention
from .primitives import paged_prefill_attention as reference_paged_prefill_attention

__all__ = ["attention"]

PagedAttention = Callable[..., torch.Tensor]


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int,
    *,
    paged_decode_attention: PagedAttention = reference_paged_decode_attention,
    paged_prefill_attention: PagedAttention = reference_paged_prefill_attention,
) -> torch.Tensor:
    n = batch.num_decodes
    tables, lens = batch.block_tables, batch.context_lens
    parts = []
    if n:
        num_blocks = -(-batch.max_decode_context // k_cache.shape[2])
        parts.append(paged_decode_attention(q[:n], k_cache, v_cache, tables[:n, :num_blocks], lens[:n], scale, sliding_window))
    if batch.prefills:
        starts = batch.cu_seqlens_q
        parts.append(paged_prefill_attention(q[n:], k_cache, v_cache, tables[n:], lens[n:], starts, scale, sliding_window))
    return torch.cat(parts) if len(parts) != 1 else parts[0]
