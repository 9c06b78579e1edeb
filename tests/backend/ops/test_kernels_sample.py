"""The kernels of a random draw: exactly the reference's token, since both add up the same whole numbers."""

import dataclasses

import pytest
import torch

from turbotriton.backend.ops.kernels import sample as module
from turbotriton.backend.ops.kernels.sample import sample
from turbotriton.backend.ops.operands import SamplingBatch
from turbotriton.backend.ops.reference.sample import integer_weights
from turbotriton.backend.ops.reference.sample import sample as reference

VOCAB = 5003  # two tiles, the last of them short; each size is compiled anew, so there are few

# (top_k, top_p, min_p); 0: off
FILTERS = (
    (0, 1, 0),
    (1, 1, 0),
    (40, 1, 0),
    (0, 0.9, 0),
    (3, 0.5, 0),
    (2000, 0.8, 0.01),
    (0, 1, 0.2),
    (0, 0.999, 0),
    (0, 0.05, 0),
)


def numbers(values, device, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).to(device)


def batch(target, vocab_size, filters=FILTERS, temperature=None, **fields):
    n = len(filters)
    top_k = [min(k, vocab_size) or vocab_size for k, _, _ in filters]
    generator = target.generator
    return SamplingBatch(
        temperature=numbers([temperature or 0.5 + torch.rand(1, generator=generator).item() for _ in filters], target.device),
        top_k=numbers(top_k, target.device, torch.int64),
        top_p=numbers([p for _, p, _ in filters], target.device),
        min_p=numbers([p for _, _, p in filters], target.device),
        uniform=torch.rand(n, generator=generator, dtype=torch.float64).to(target.device),
        max_top_k=max(top_k),
        has_top_k=any(1 < k < vocab_size for k in top_k),
        has_top_p=any(p < 1 and k == 0 for k, p, _ in filters),
        **fields,
    )


def penalties(target, num_rows, vocab_size):
    counts = torch.randint(0, 3, (num_rows + 2, vocab_size), generator=target.generator, dtype=torch.int32)
    seen = (counts > 0) | (torch.rand(counts.shape, generator=target.generator) < 0.3)
    return {
        "repetition_penalty": numbers([1.0 + 0.1 * row for row in range(num_rows)], target.device),
        "presence_penalty": numbers([0.3 * row - 1 for row in range(num_rows)], target.device),
        "frequency_penalty": numbers([0.7 - 0.2 * row for row in range(num_rows)], target.device),
        "slots": torch.randperm(num_rows + 2, generator=target.generator)[:num_rows].to(target.device),
        "output_counts": counts.to(target.device),
        "seen": seen.to(target.device),
    }


def entries(target, num_rows, vocab_size, prefix, most):
    """Up to `most` distinct ids a row, some rows without."""
    ids = [torch.randperm(vocab_size, generator=target.generator)[: (row * most) // num_rows].tolist() for row in range(num_rows)]
    starts = torch.tensor([0, *map(len, ids)]).cumsum(0)
    return {
        f"{prefix}_ids": numbers([i for row in ids for i in row], target.device, torch.int64),
        f"{prefix}_starts": starts.to(target.device),
    }


@pytest.mark.parametrize(("vocab_size", "scale"), [(5, 1.0), (301, 0.0), (301, 30.0), (VOCAB, 8.0), (VOCAB, 1.0), (VOCAB, 0.01)])
def test_every_filter_draws_the_references_token(target, vocab_size, scale):
    logits = target.randn(len(FILTERS), vocab_size, scale=scale)
    before = logits.clone()
    given = batch(target, vocab_size)
    assert torch.equal(sample(logits, given), reference(logits, given))
    assert torch.equal(logits, before)
    assert not module.workspace(logits.device)[1].any(), "the next launch counts from zero"


@pytest.mark.parametrize("kinds", ["penalties", "bans", "all", "greedy with all"])
def test_shaped_logits_draw_the_references_token(target, kinds):
    n, vocab_size = len(FILTERS), VOCAB
    fields = {}
    if kinds != "bans":
        fields |= penalties(target, n, vocab_size)
    if kinds != "penalties":
        fields |= entries(target, n, vocab_size, "banned", 150)
    if kinds not in ("penalties", "bans"):
        fields |= entries(target, n, vocab_size, "bias", 200)
        fields["bias"] = (torch.randn(len(fields["bias_ids"]), generator=target.generator) * 5).double().to(target.device)
    given = batch(target, vocab_size, **fields)
    if kinds.startswith("greedy"):
        given = dataclasses.replace(given, top_k=None, top_p=None, min_p=None, uniform=None, has_top_k=False, has_top_p=False)
    logits = target.randn(n, vocab_size, scale=3.0)
    assert torch.equal(sample(logits, given), reference(logits, given))


def test_brackets_with_more_weights_than_a_copy_holds_are_searched_in_place(target, monkeypatch):
    chosen = module.sample_config
    monkeypatch.setattr(module, "sample_config", lambda *shape: dataclasses.replace(chosen(*shape), max_copied=7))
    logits = target.randn(len(FILTERS), VOCAB, scale=2.0)
    given = batch(target, VOCAB)
    assert torch.equal(sample(logits, given), reference(logits, given))


def test_rows_do_not_depend_on_each_other(target):
    logits, given = target.randn(len(FILTERS), VOCAB, scale=2.0), batch(target, VOCAB)
    together = sample(logits, given).tolist()
    for row in (3, 5):
        alone = {f: getattr(given, f)[row : row + 1] for f in ("temperature", "top_k", "top_p", "min_p", "uniform")}
        assert sample(logits[row : row + 1], dataclasses.replace(given, **alone)).tolist() == together[row : row + 1]


def test_ties_at_the_border_are_kept(target):
    logits = target.randn(2, VOCAB).clamp(max=0.25)
    logits[:, 77] = 5.0
    found = set()
    for uniform in torch.linspace(0, 0.999, 5).tolist():
        given = batch(target, VOCAB, filters=((2, 1, 0), (40, 0.5, 0)), temperature=1.0)
        given = dataclasses.replace(given, uniform=numbers([uniform] * 2, target.device))
        drawn = sample(logits, given)
        assert torch.equal(drawn, reference(logits, given))
        found.add(drawn.tolist()[0])
    assert len(found) == 5, "the second largest logit is that of hundreds of tokens"


def test_strange_rows_give_an_id_of_the_vocabulary(target):
    filters = ((0, 1, 0), (5, 1, 0), (0, 0.9, 0), (5, 0.9, 0), (0, 1, 0.5), (0, 0.9, 0))
    logits = target.randn(len(filters), VOCAB)
    logits[0], logits[1] = float("nan"), float("-inf")
    logits[2, 10::2] = float("nan")
    logits[3, 4321] = float("inf")
    logits[4, 5:] = float("-inf")
    logits[5, 1:] = float("-inf")  # one token is possible
    given = batch(target, VOCAB, filters=filters)
    found = sample(logits, given)
    assert torch.equal(found, reference(logits, given))
    assert found.tolist()[:2] == [0, 0]
    assert found.tolist()[3] == 4321
    assert found.tolist()[4] < 5
    assert found.tolist()[5] == 0


def test_rows_may_be_strided_and_absent(target):
    wide = target.randn(2 * len(FILTERS), 602)
    given = batch(target, 301)
    assert torch.equal(sample(wide[::2, 100:401], given), reference(wide[::2, 100:401], given))
    assert sample(wide[:0], given).shape == (0,)


def test_weights_are_those_of_softmax():
    """The definition itself, against float64: 2^-44 of the largest is 0, the rest is off by a ten millionth."""
    logits = torch.cat((torch.linspace(-32, 0, 20_001), torch.tensor([float("-inf"), -1e-7, -1e30]))).view(1, -1)
    found = integer_weights(logits).double() / 2**44
    exact = torch.exp(logits.double())
    assert (found - exact).abs().max() < 3e-7
    near = exact > 1e-4
    assert ((found - exact) / exact)[near].abs().max() < 1.5e-6  # the rounding of x log2(e), up to 2^-20 there
    assert int(integer_weights(logits).max()) == 2**44


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("num_rows", [1, 64, 256])
def test_real_sizes_draw_the_cpus_token(num_rows, scale):
    """A CPU's reference, so that the reference's own arithmetic is compared over devices too."""
    from tests.backend.ops.conftest import Target

    target = Target("cuda", torch.bfloat16, torch.Generator().manual_seed(num_rows))
    vocab_size = 128_256
    filters = [FILTERS[row % len(FILTERS)] if num_rows > 1 else (40, 0.9, 0) for row in range(num_rows)]
    logits = target.randn(num_rows, vocab_size, scale=scale)
    fields = penalties(target, num_rows, vocab_size) if num_rows <= 64 else {}
    given = batch(target, vocab_size, filters=filters, **fields)
    found = sample(logits, given)
    assert torch.equal(found, reference(logits, given))
    if num_rows <= 64:
        on_cpu = {
            field.name: value.cpu() if isinstance(value := getattr(given, field.name), torch.Tensor) else value
            for field in dataclasses.fields(given)
        }
        assert torch.equal(found.cpu(), reference(logits.cpu(), SamplingBatch(**on_cpu)))
