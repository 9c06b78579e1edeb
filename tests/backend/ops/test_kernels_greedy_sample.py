"""The greedy_sample kernel: exactly torch's first largest logit, since nothing is computed but comparisons."""

import pytest
import torch

from turbotriton.backend.ops.kernels.greedy_sample import greedy_sample


def expected(logits, banned=None):
    logits = logits.float().clone()
    for row, ids in enumerate(banned or []):
        logits[row, ids] = float("-inf")
    return torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])


def bans(target, banned):
    starts = torch.tensor([0, *torch.tensor([len(ids) for ids in banned]).cumsum(0).tolist()])
    return starts.to(target.device), torch.tensor([token for ids in banned for token in ids], dtype=torch.int64).to(target.device)


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (3, 50), (2, 4097), (5, 9000), (1, 40_000)])
def test_the_largest_logit_wins(target, num_rows, vocab_size):
    logits = target.randn(num_rows, vocab_size)
    before = logits.clone()
    assert torch.equal(greedy_sample(logits), expected(logits))
    assert torch.equal(logits, before)


def test_ties_go_to_the_smaller_id(target):
    logits = target.randn(3, 9000).clamp(max=1.0)  # hundreds of ones in every tile
    assert torch.equal(greedy_sample(logits), expected(logits))
    assert greedy_sample(torch.zeros_like(logits)).tolist() == [0, 0, 0]


def test_banned_ids_are_passed_over_row_by_row(target):
    logits = target.randn(4, 9000)
    order = logits.float().argsort(dim=1, descending=True)
    banned = [order[0, :3].tolist(), [], order[2, :1].tolist(), [8999]]
    assert torch.equal(greedy_sample(logits, *bans(target, banned)), expected(logits, banned))


def test_rows_may_be_strided_and_absent(target):
    wide = target.randn(6, 600)
    assert torch.equal(greedy_sample(wide[::2, 100:400]), expected(wide[::2, 100:400]))
    assert greedy_sample(wide[:0]).shape == (0,)


def test_rows_of_nothing_finite_give_an_id_of_the_vocabulary(target):
    logits = torch.full((2, 5000), float("-inf"), dtype=target.dtype, device=target.device)
    logits[1] = float("nan")
    found = greedy_sample(logits)
    assert bool(((found >= 0) & (found < 5000)).all())


@pytest.mark.gpu
def test_real_sizes():
    logits = torch.randn(256, 128_256, device="cuda").bfloat16()
    assert torch.equal(greedy_sample(logits), expected(logits))
