"""What guided rows may draw: the host's bit masks over the logits."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .transfer import to_device

__all__ = ["masked_logits"]


def masked_logits(logits: torch.Tensor, rows: Sequence[int], words: npt.NDArray[np.int32]) -> torch.Tensor:
    """A copy of `logits` where the guided rows keep their allowed tokens and have -inf elsewhere.

    logits: [num_rows, vocab_size];  words: [len(rows), >= vocab_size / 32], bit i % 32 of word i // 32 allows token i.
    """
    device = logits.device
    bits = to_device(words, device)[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device)
    forbidden = (bits & 1 == 0).flatten(1)[:, : logits.shape[1]]  # [len(rows), vocab_size]
    at = to_device(np.array(rows, np.int64), device)
    masked = logits.clone()
    masked[at] = logits[at].masked_fill(forbidden, float("-inf"))
    return masked
