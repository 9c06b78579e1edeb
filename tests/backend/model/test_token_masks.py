"""The mask of a guided row: bit i % 32 of word i // 32 allows token i; other rows and the raw logits stay as they are."""

import numpy as np
import torch

from turbotriton.backend.model.token_masks import masked_logits


def test_guided_rows_keep_the_allowed_tokens_and_the_rest_is_untouched() -> None:
    logits = torch.arange(3 * 70, dtype=torch.float32).reshape(3, 70)
    before = logits.clone()
    words = np.zeros((2, 3), np.int32)
    for row, token in ((0, 0), (0, 31), (0, 32), (1, 63), (1, 69)):
        words[row : row + 1].view(np.uint32)[0, token // 32] |= np.uint32(1 << token % 32)
    masked = masked_logits(logits, [2, 0], words)
    assert torch.equal(logits, before)
    assert torch.equal(masked[1], logits[1])
    for row, tokens in ((2, [0, 31, 32]), (0, [63, 69])):
        assert torch.isfinite(masked[row]).nonzero().flatten().tolist() == tokens
        assert torch.equal(masked[row, tokens], logits[row, tokens])
