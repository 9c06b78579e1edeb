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
    no logprobs at all). The call that is returned waits for the device and gives one entry a row.
    """
    wanted = [row for row, count in enumerate(counts) if count is not None]
    if not wanted:
        return lambda: (None,) * len(counts)
    rows = to_device(np.array(wanted, np.int64), logits.device)
    logprobs = torch.log_softmax(logits[rows].float(), dim=-1)
    own = to_host(logprobs.gather(1, drawn[rows][:, None]).squeeze(1))
    num_top = min(max(counts[row] or 0 for row in wanted), logits.shape[1])
    top = logprobs.topk(num_top, dim=-1)
    top_values, top_ids = to_host(top.values), to_host(top.indices)

    def collect() -> Logprobs:
        found: dict[int, TokenLogprobs] = {}
        for row, value, ids, values in zip(wanted, own().tolist(), top_ids().tolist(), top_values().tolist(), strict=True):
            count = counts[row] or 0
            found[row] = TokenLogprobs(value, tuple(zip(ids[:count], values[:count], strict=True)))
        return tuple(found.get(row) for row in range(len(counts)))

    return collect
