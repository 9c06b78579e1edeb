"""Attention of a mixed batch over the paged KV cache. The contract is the Protocol `Attention` of `ops/table.py`."""

from collections.abc import Callable, Sequence

import torch

from ..operands import AttentionBatch, KvPages, QkvBeforeRotary
from .kv_pages import gathered_pages, page_shape
from .primitives import paged_decode_attention as reference_paged_decode_attention
from .primitives import paged_prefill_attention as reference_paged_prefill_attention

__all__ = ["attention", "quantized_decode_attention", "quantized_prefill_attention"]

PagedAttention = Callable[..., torch.Tensor]


def quantized_decode_attention(
    q: torch.Tensor,
    k_pages: KvPages,
    v_pages: KvPages,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `paged_decode_attention`, over the values that the pages stand for, in fp32."""
    k, v, tables = dense_pages(k_pages, v_pages, block_tables, torch.float32)
    return reference_paged_decode_attention(q, k, v, tables, context_lens, scale, sliding_window, out)


def quantized_prefill_attention(
    q: torch.Tensor,
    k_pages: KvPages,
    v_pages: KvPages,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    scale: float,
    sliding_window: int,
    prefills: Sequence[tuple[int, int]],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `paged_prefill_attention`, over the values that the pages stand for, rounded to q's dtype.

    prefills: (num_query_tokens, context_len) of each row
    """
    k, v, tables = dense_pages(k_pages, v_pages, block_tables, q.dtype)
    return reference_paged_prefill_attention(q, k, v, tables, context_lens, cu_seqlens_q, scale, sliding_window, out)


def dense_pages(
    k_pages: KvPages, v_pages: KvPages, block_tables: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The blocks that the tables name, as pages in `dtype`, and tables of their new places."""
    assert not isinstance(k_pages, torch.Tensor)
    assert not isinstance(v_pages, torch.Tensor)
    used, place = torch.unique(block_tables, return_inverse=True)
    k, v = (gathered_pages(pages, used.long()).to(dtype) for pages in (k_pages, v_pages))
    return k, v, place.int()


def attention(
    q: torch.Tensor | QkvBeforeRotary,
    k_cache: KvPages,
    v_cache: KvPages,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int,
    out: torch.Tensor | None = None,
    *,
    paged_decode_attention: PagedAttention = reference_paged_decode_attention,
    paged_prefill_attention: PagedAttention = reference_paged_prefill_attention,
    quantized_decode_attention: PagedAttention = quantized_decode_attention,
    quantized_prefill_attention: PagedAttention = quantized_prefill_attention,
) -> torch.Tensor:
    assert isinstance(q, torch.Tensor), "QkvBeforeRotary is a column's own"
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    is_dense = isinstance(k_cache, torch.Tensor)
    n = batch.num_decodes
    if n:
        tables, lens = batch.decode_rows
        num_blocks = -(-batch.max_decode_context // page_shape(k_cache)[2])
        of_decodes = paged_decode_attention if is_dense else quantized_decode_attention
        of_decodes(q[:n], k_cache, v_cache, tables[:, :num_blocks], lens, scale, sliding_window, out[:n])
    if batch.prefills:
        chunks = q[n:], k_cache, v_cache, *batch.prefill_rows, batch.cu_seqlens_q, scale, sliding_window
        if is_dense:
            paged_prefill_attention(*chunks, out[n:])
        else:
            quantized_prefill_attention(*chunks, batch.prefills, out[n:])
    return out
