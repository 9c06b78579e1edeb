"""Drawing the next token. The contract is the Protocol `Sample` of `ops/table.py`.

Weights of a draw are whole numbers, made with single fp32 operations that every device rounds alike: their sums do not depend on an
order, so a CPU and a GPU that have the same logits draw the same token.
"""

import torch

from ..operands import SamplingBatch

__all__ = ["LOG2_E", "POWER_OF_2_COEFFICIENTS", "WEIGHT_BITS", "integer_weights", "sample"]

#: The largest weight is 2^44: vocabularies below 2^19 tokens sum up inside of 63 bits.
WEIGHT_BITS = 44
LOG2_E = 1.4426950216293335
#: 2^f on [0, 1] to 9e-8, monotonous, exact at both ends; lowest power first, each a number that fp32 holds.
POWER_OF_2_COEFFICIENTS = (
    1.0,
    0.6931470632553101,
    0.2402293086051941,
    0.055485282093286514,
    0.009675451554358006,
    0.0012467845808714628,
    0.0002161291631637141,
)


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    logits = _shaped_logits(logits.float(), batch)
    token_ids = logits.argmax(dim=-1)
    if batch.top_k is None:
        return token_ids
    is_greedy = (batch.top_k == 1) | logits.isneginf().all(dim=-1)
    return torch.where(is_greedy, token_ids, _draw(integer_weights(logits), batch))


def _shaped_logits(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    logits = torch.where(logits.isnan(), float("-inf"), logits)
    if batch.bias_ids is not None and batch.bias is not None:
        at = (_rows_of(batch.bias_starts, batch.bias_ids), batch.bias_ids)
        logits = logits.index_put(at, batch.bias.float(), accumulate=True)
    if batch.banned_ids is not None:
        never = torch.full((), float("-inf"), device=logits.device)  # filled there: nothing is copied over
        logits = logits.index_put((_rows_of(batch.banned_starts, batch.banned_ids), batch.banned_ids), never)
    if batch.temperature is not None:
        logits = logits / batch.temperature.float()[:, None]
    if batch.output_counts is not None and batch.seen is not None:
        repetition, presence, frequency = (
            penalty.float()[:, None]
            for penalty in (batch.repetition_penalty, batch.presence_penalty, batch.frequency_penalty)
            if penalty is not None
        )
        counts, seen = batch.output_counts[batch.slots], batch.seen[batch.slots]
        penalised = torch.where(logits < 0, logits * repetition, logits / repetition)
        logits = torch.where(seen, penalised, logits)
        logits = logits - presence * (counts > 0)
        logits = logits - frequency * counts
    return logits


def _rows_of(starts: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """The row of each entry."""
    assert starts is not None, "ids come with their rows' starts"
    return torch.repeat_interleave(torch.arange(len(starts) - 1, device=ids.device), starts.diff(), output_size=len(ids))


def integer_weights(logits: torch.Tensor) -> torch.Tensor:
    """floor(2^44 e^(l - largest l)) of each row, to the accuracy of the polynomial. logits: [n, vocab_size], fp32. Returns int64."""
    largest = logits.amax(dim=-1, keepdim=True)
    x = torch.where(logits == largest, 0.0, logits - largest)  # also where the largest is infinite
    t = (x * LOG2_E).clamp(min=-64.0)  # 2^-64 of the largest weighs nothing
    whole = t.floor()
    fraction = t - whole
    power = torch.full_like(fraction, POWER_OF_2_COEFFICIENTS[-1])
    for coefficient in reversed(POWER_OF_2_COEFFICIENTS[:-1]):
        power = power * fraction + coefficient
    scale = ((whole.int() + (127 + WEIGHT_BITS)) << 23).view(torch.float32)
    return (power * scale).long()


def _draw(weights: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Inverse of the running sums over token ids in ascending order, at the row's uniform number."""
    assert batch.uniform is not None
    assert batch.min_p is not None
    smallest = (batch.min_p * 2.0**WEIGHT_BITS).ceil().long()[:, None]
    if batch.has_top_k or batch.has_top_p:
        smallest = torch.maximum(smallest, _smallest_kept(weights, batch))
    sums = torch.where(weights >= smallest, weights, 0).cumsum(dim=-1)
    last = sums[:, -1:]
    target = torch.minimum((batch.uniform[:, None] * last.double()).long(), last - 1)
    return torch.searchsorted(sums, target, right=True).squeeze(1).clamp(max=weights.shape[1] - 1)


def _smallest_kept(weights: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Smallest weight that top-k, then top-p keep: [n, 1]."""
    assert batch.top_k is not None
    assert batch.top_p is not None
    values = weights.topk(batch.max_top_k, dim=-1).values  # descending
    is_in = torch.arange(batch.max_top_k, device=weights.device) < batch.top_k[:, None]
    values = torch.where(is_in, values, 0)
    sums = values.cumsum(dim=-1)
    bound = batch.top_p[:, None] * sums[:, -1:].double()
    kept = is_in & ((sums - values).double() < bound)
    return torch.where(kept, values, 1 << WEIGHT_BITS).amin(dim=-1, keepdim=True)
