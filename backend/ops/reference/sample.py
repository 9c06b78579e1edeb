"""Drawing the next token. The contract is the Protocol `Sample` of `ops/table.py`."""

import torch

from ..operands import SamplingBatch

__all__ = ["sample"]


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    logits = _processed_logits(logits.float(), batch)
    token_ids = logits.argmax(dim=-1)
    if batch.random_rows is not None:
        token_ids[batch.random_rows] = _draw(logits[batch.random_rows], batch)
    return token_ids


def _processed_logits(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    if batch.bias_rows is not None and batch.bias_ids is not None and batch.bias is not None:
        logits = logits.index_put((batch.bias_rows, batch.bias_ids), batch.bias, accumulate=True)
    if batch.banned_rows is not None and batch.banned_ids is not None:
        never = torch.full((), float("-inf"), dtype=logits.dtype, device=logits.device)  # filled there: nothing is copied over
        logits = logits.index_put((batch.banned_rows, batch.banned_ids), never)
    if batch.temperature is not None:
        logits = logits / batch.temperature
    if batch.output_counts is not None and batch.seen is not None:
        assert batch.repetition_penalty is not None
        assert batch.presence_penalty is not None
        assert batch.frequency_penalty is not None
        penalised = torch.where(logits < 0, logits * batch.repetition_penalty, logits / batch.repetition_penalty)
        logits = torch.where(batch.seen, penalised, logits)
        logits = logits - batch.presence_penalty * (batch.output_counts > 0) - batch.frequency_penalty * batch.output_counts
    return logits


def _draw(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Inverse of the cumulative distribution over token ids in ascending order, at the row's uniform number."""
    assert batch.uniform is not None
    if batch.filters:
        logits = logits.masked_fill(logits < _filter_threshold(logits, batch), float("-inf"))
    cumulative = torch.softmax(logits, dim=-1).double().cumsum(dim=-1)
    token_ids = torch.searchsorted(cumulative, batch.uniform * cumulative[:, -1:], right=True).squeeze(1)
    return token_ids.clamp(max=logits.shape[1] - 1)  # only a row without one finite logit gets past the end


def _filter_threshold(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Smallest logit that top-k, then top-p, then min-p keep: [num_random, 1]."""
    assert batch.top_k is not None
    assert batch.top_p is not None
    assert batch.min_p is not None
    values = logits.topk(batch.max_top_k, dim=-1).values  # [num_random, max_top_k], descending
    rank = torch.arange(batch.max_top_k, device=logits.device)
    values = values.masked_fill(rank >= batch.top_k, float("-inf"))
    probs = torch.softmax(values, dim=-1)
    before = probs.cumsum(dim=-1) - probs
    kept = (before < batch.top_p) & (probs >= batch.min_p * probs[:, :1]) & (rank < batch.top_k)
    kept[:, 0] = True
    return values.masked_fill(~kept, float("inf")).amin(dim=-1, keepdim=True)
