"""Draws depend on (seed, position, sample index) and logits alone; penalties, bans and logprobs follow the request."""

import math

import numpy as np
import pytest
import torch

from turbotriton.backend.model.logprobs import raw_logprobs
from turbotriton.backend.model.sampler import SamplerState, uniform_numbers
from turbotriton.backend.ops.table import REFERENCE
from turbotriton.contract.wire import SamplingParams

VOCAB = 12
EOS = (2,)
LOGITS = torch.linspace(0, 1.1, VOCAB)[None]  # the last id is the most likely


def state_with(params, *, tokens=(5, 6), num_prompt=2, seed=0, sample_index=0, slot=1):
    state = SamplerState(4, VOCAB, EOS, torch.device("cpu"))
    state.join(slot, params, tokens, num_prompt, seed, sample_index)
    return state


def draw(state, logits=LOGITS, slots=(1,), positions=None):
    at = np.array(slots, np.int64)
    where = np.array(positions or [len(state.slots[s].tokens) for s in slots], np.int64)
    return REFERENCE.sample(logits.expand(len(slots), -1), state.batch(at, where)).tolist()


def greedy(**keys):
    return SamplingParams(temperature=0.0, **keys)


def test_philox_gives_the_published_known_answers():
    def words(seed, position, sample_index):
        value = uniform_numbers(*(np.array([v], np.uint64) for v in (seed, position, sample_index)))[0]
        return int(value * 2**52)

    # Random123's known-answer vector for philox4x32-10 with key and counter zero starts 6627e8d5 e169c58d
    assert words(0, 0, 0) == (0x6627E8D5 << 20) | (0xE169C58D >> 12)


def test_uniform_numbers_are_spread_and_differ_by_each_of_their_three_inputs():
    n = 20_000
    seeds = np.full(n, 2**64 - 1, np.uint64)
    values = uniform_numbers(seeds, np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64))
    assert values.min() >= 0
    assert values.max() < 1
    assert np.histogram(values, bins=20, range=(0, 1))[0] == pytest.approx(np.full(20, n / 20), rel=0.15)
    base = uniform_numbers(*(np.array([v], np.uint64) for v in (1, 2, 3)))[0]
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**32, 2, 3)):
        assert uniform_numbers(*(np.array([v], np.uint64) for v in other))[0] != base


def test_draws_follow_the_distribution():
    state = state_with(SamplingParams())
    wanted = torch.softmax(LOGITS[0], -1)
    n = 1000
    found = torch.bincount(torch.tensor([draw(state, positions=[p])[0] for p in range(n)]), minlength=VOCAB) / n
    assert (found - wanted).abs().max() < 4 * math.sqrt(0.15 * 0.85 / n)


def test_a_draw_is_the_same_in_any_batch_and_slot():
    params = SamplingParams(temperature=0.9, top_p=0.9)
    alone = [draw(state_with(params, seed=77, sample_index=3), positions=[p])[0] for p in range(20)]
    state = state_with(params, seed=77, sample_index=3, slot=3)
    state.join(0, greedy(), (5,), 1, 1, 0)
    state.join(2, SamplingParams(repetition_penalty=1.5), (5, 7), 1, 9, 0)
    together = [draw(state, slots=(0, 3, 2), positions=[4, p, 8])[1] for p in range(20)]
    assert together == alone
    assert len(set(alone)) > 2
    other = [draw(state_with(params, seed=77, sample_index=4), positions=[p])[0] for p in range(20)]
    assert other != alone


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(top_k=3), {9, 10, 11}),
        (SamplingParams(top_k=1), {11}),
        (SamplingParams(top_k=500), set(range(12))),
        (SamplingParams(top_p=0.2), {10, 11}),
        (SamplingParams(top_p=1e-6), {11}),
        (SamplingParams(min_p=0.8), {9, 10, 11}),
        (SamplingParams(min_p=1.0), {11}),
        (SamplingParams(top_k=4, top_p=0.5), {10, 11}),
        (SamplingParams(temperature=0.01), {11}),
        (SamplingParams(temperature=0.0), {11}),
    ],
)
def test_filters_keep_exactly_their_tokens(params, allowed):
    state = state_with(params)
    assert {draw(state, positions=[p])[0] for p in range(600)} == allowed


def test_tied_logits_at_the_top_k_border_are_all_kept():
    state = state_with(SamplingParams(top_k=1, temperature=1.0))
    logits = torch.tensor([[1.0, 3.0, 3.0] + [0.0] * 9])
    assert draw(state, logits) == [1]  # greedy: the first of them
    state = state_with(SamplingParams(top_k=2))
    logits = torch.tensor([[9.0, 3.0, 3.0] + [0.0] * 9]) * 0.1
    assert {draw(state, logits, positions=[p])[0] for p in range(200)} == {0, 1, 2}


def test_repetition_penalty_counts_prompt_and_output_and_signs():
    logits = torch.tensor([[0.0] * 5 + [4.0, -1.0, 3.0, -1.5] + [-9.0] * 3])
    assert draw(state_with(greedy(repetition_penalty=1.0), tokens=(5, 6)), logits) == [5]
    assert draw(state_with(greedy(repetition_penalty=2.0), tokens=(5, 6)), logits) == [7]
    negative = torch.tensor([[-8.0] * 6 + [-1.0, -9.0, -1.5] + [-9.0] * 3])
    assert draw(state_with(greedy(repetition_penalty=2.0), tokens=(5, 6)), negative) == [8]


def test_presence_and_frequency_penalties_count_the_output_only():
    logits = torch.tensor([[0.0] * 5 + [4.0, 3.5, 3.0] + [0.0] * 4])
    params = greedy(presence_penalty=0.8)
    assert draw(state_with(params, tokens=(5, 6), num_prompt=2), logits) == [5]
    assert draw(state_with(params, tokens=(6, 5), num_prompt=1), logits) == [6]
    assert draw(state_with(greedy(frequency_penalty=0.4), tokens=(6, 5), num_prompt=1), logits) == [5]
    assert draw(state_with(greedy(frequency_penalty=0.4), tokens=(6, 5, 5), num_prompt=1), logits) == [6]


def test_counts_grow_with_each_drawn_token_and_start_anew_with_the_slot():
    state = state_with(greedy(frequency_penalty=0.15), tokens=(5,), num_prompt=1)
    drawn = []
    for _ in range(5):
        (token,) = draw(state)
        state.append(np.array([1]), torch.tensor([token]))([token])
        drawn.append(token)
    assert drawn == [11, 10, 11, 9, 10]
    state.leave(1)
    state.join(1, greedy(frequency_penalty=0.15), (5,), 1, 0, 0)
    assert draw(state) == [11]


def test_min_new_tokens_bans_eos_stop_ids_and_the_end_of_stop_sequences():
    logits = torch.tensor([[0.0, 0.0, 9.0, 8.0, 7.0, 6.0] + [0.0] * 6])
    params = greedy(min_new_tokens=2, stop_token_ids=(3,), stop_sequences=((4,), (6, 5)))
    state = state_with(params, tokens=(6,), num_prompt=1)
    assert draw(state, logits) == [0]  # 2 is EOS, 3 a stop id, 4 a stop sequence, 5 would complete (6, 5)
    state.append(np.array([1]), torch.tensor([7]))([7])
    assert draw(state, logits) == [5]
    state.append(np.array([1]), torch.tensor([7]))([7])
    assert draw(state, logits) == [2]


def test_ignore_eos_bans_eos_throughout():
    logits = torch.tensor([[0.0, 0.0, 9.0, 8.0] + [0.0] * 8])
    state = state_with(greedy(ignore_eos=True), tokens=(1, 1, 1, 1), num_prompt=1)
    assert draw(state, logits) == [3]


def test_bad_sequences_are_never_completed():
    state = state_with(greedy(bad_sequences=((11,), (6, 10), (5, 6, 9))), tokens=(5, 6))
    assert draw(state) == [8]
    state.append(np.array([1]), torch.tensor([4]))([4])
    assert draw(state) == [10]


def test_bad_sequences_longer_than_what_is_known_do_nothing():
    state = state_with(greedy(bad_sequences=((1, 1, 1, 11),)), tokens=(1,), num_prompt=1)
    assert draw(state) == [11]


def test_ids_outside_the_vocabulary_are_ignored_in_bans():
    state = state_with(greedy(bad_sequences=((VOCAB,), (VOCAB + 5, 11))), tokens=(5, 6))
    assert draw(state) == [11]


def test_logprobs_are_the_models_own_distribution():
    logits = torch.stack((LOGITS[0], LOGITS[0].flip(0), LOGITS[0]))
    wanted = torch.log_softmax(logits, -1)
    first, second, third = raw_logprobs(logits, torch.tensor([3, 0, 1]), [2, None, 0])()
    assert second is None
    assert first.token_logprob == pytest.approx(float(wanted[0, 3]), abs=1e-6)
    assert [token for token, _ in first.top] == [11, 10]
    assert [value for _, value in first.top] == pytest.approx(wanted[0, [11, 10]].tolist(), abs=1e-6)
    assert third.top == ()
    assert third.token_logprob == pytest.approx(float(wanted[2, 1]), abs=1e-6)


def test_more_logprobs_than_the_vocabulary_gives_the_whole_vocabulary():
    (found,) = raw_logprobs(LOGITS, torch.tensor([3]), [1000])()
    assert len(found.top) == VOCAB


@pytest.mark.gpu
def test_draws_are_the_same_on_gpu_and_cpu():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    found = []
    for name in ("cpu", "cuda"):
        state = SamplerState(4, VOCAB, EOS, torch.device(name))
        for slot in range(4):
            state.join(slot, SamplingParams(top_p=0.9, top_k=8, repetition_penalty=1.2), (5, 6), 1, slot, 0)
        at = np.arange(4, dtype=np.int64)
        found.append([REFERENCE.sample(logits.to(name), state.batch(at, at + p)).tolist() for p in range(50)])
    assert found[0] == found[1]
