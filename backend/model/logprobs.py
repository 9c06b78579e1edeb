"""Log-probabilities of drawn tokens, computed on the device at once and read when they are wanted."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from turbotriton.contract.wire import TokenLogprobs

from .transfer import to_device, to_host

__all__ = ["raw_logprobs"]

Logprobs = tuple[TokenLogprobs | None, ...]


def raw_logprobs(logits: torch.Tensor, drawn: torch.Tensor, counts: Sequence[int | None]) -> Callable[[], Logprobs]:
    """Natural-log probabilities of the model's own distribution: before bans, temperature, penalties and filters.

    logits: [num_rows, vocab_size]; drawn: [num_rows], the drawn ids; counts: how many of the most likely each row wants (None:
    no logprobs at all). The call that is returned waits for the device and gives one entry a row, equal ones by ascending id.
    """
    wanted = [row for row, count in enumerate(counts) if count is not None]
    if not wanted:
        return lambda: (None,) * len(counts)
    rows = to_device(np.array(wanted, np.int64), logits.device)
    vocab_size = logits.shape[1]
    # rows of whole vectors: where a row begins would change in which order a GPU adds it up
    wide = torch.nn.functional.pad(logits[rows].float(), (0, -vocab_size % 8), value=float("-inf"))
    logprobs = torch.log_softmax(wide, dim=-1)[:, :vocab_size]
    own = to_host(logprobs.gather(1, drawn[rows][:, None]).squeeze(1))
    num_top = min(max(counts[row] or 0 for row in wanted), vocab_size)
    ids = _most_likely(logprobs, num_top)
    top_values, top_ids = to_host(logprobs.gather(1, ids)), to_host(ids)

    def collect() -> Logprobs:
        found: dict[int, TokenLogprobs] = {}
        for row, value, ids, values in zip(wanted, own().tolist(), top_ids().tolist(), top_values().tolist(), strict=True):
            count = counts[row] or 0
            found[row] = TokenLogprobs(value, tuple(zip(ids[:count], values[:count], strict=True)))
        return tuple(found.get(row) for row in range(len(counts)))

    return collect


def _most_likely(logprobs: torch.Tensor, num_top: int) -> torch.Tensor:
    """Ids of the num_top largest of each row, descending, [num_rows, num_top]. No two keys are equal, so torch cannot choose among ties."""
    bits = logprobs.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = logprobs.shape[1] - 1
    keys = (ordered.long() << 32) + torch.arange(last, -1, -1, device=logprobs.device)
    return last - (keys.topk(num_top, dim=-1).values & 0xFFFFFFFF)
