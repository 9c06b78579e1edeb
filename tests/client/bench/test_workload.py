"""Workloads: lengths, arrivals and files, good and bad."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from turbotriton.client.bench.workload import LengthRange, poisson_arrivals, random_items, sharegpt_items, trace_items
from turbotriton.contract.errors import InvalidInputError

SHAREGPT = [
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "one two three"}]},
    {"conversations": [{"from": "human", "value": "alone"}]},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "because"}]},
]


@pytest.mark.parametrize(("text", "expected"), [("128", (128, 128)), ("64:1024", (64, 1024))])
def test_length_range_reads_one_number_or_two(text: str, expected: tuple[int, int]) -> None:
    found = LengthRange.parse(text)
    assert (found.low, found.high) == expected
    assert str(found) == text


@pytest.mark.parametrize("text", ["", "0", "9:3", "-1", "a", "1:b"])
def test_wrong_length_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        LengthRange.parse(text)


def test_random_items_repeat_with_the_seed_and_stay_in_their_ranges() -> None:
    items = random_items(50, LengthRange(5, 9), LengthRange(1, 3), (10, 20), seed=3)
    assert items == random_items(50, LengthRange(5, 9), LengthRange(1, 3), (10, 20), seed=3)
    assert items != random_items(50, LengthRange(5, 9), LengthRange(1, 3), (10, 20), seed=4)
    assert {len(item.input_ids or ()) for item in items} == set(range(5, 10))
    assert {item.max_tokens for item in items} == {1, 2, 3}
    assert {token for item in items for token in item.input_ids or ()} == set(range(10, 20))


def test_poisson_gaps_have_the_mean_and_the_spread_of_an_exponential() -> None:
    items = poisson_arrivals(random_items(4000, LengthRange(1, 1), LengthRange(1, 1), (1, 2), 0), rate=20, seed=1)
    times = [item.arrival_s or 0.0 for item in items]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1)


def test_infinite_rate_sends_all_at_once() -> None:
    items = poisson_arrivals(random_items(5, LengthRange(1, 1), LengthRange(1, 1), (1, 2), 0), math.inf, seed=1)
    assert [item.arrival_s for item in items] == [0.0] * 5


def test_sharegpt_asks_the_first_question_for_as_many_tokens_as_the_reply_has(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(SHAREGPT))
    items = sharegpt_items(path, 4, LengthRange(7, 7), lambda text: len(text.split()), seed=0)
    assert sorted((item.prompt, item.max_tokens) for item in items) == [("Hello", 3)] * 2 + [("Why?", 1)] * 2
    assert {item.max_tokens for item in sharegpt_items(path, 4, LengthRange(7, 7), None, seed=0)} == {7}


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '[{"conversations": 3}]', "[1]"])
def test_file_that_is_no_sharegpt_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=r"wrong\.json"):
        sharegpt_items(path, 1, LengthRange(1, 1), None, seed=0)


def test_trace_keeps_its_lengths_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,48,10\n2023-11-16 18:17:04.0319600,31,8\n2023-11-16 18:18:03.9799600,5,1\n"
    )
    items = trace_items(path, None, 2.0, (1, 9), seed=0)
    assert [(len(item.input_ids or ()), item.max_tokens) for item in items] == [(48, 10), (31, 8), (5, 1)]
    assert [item.arrival_s for item in items] == pytest.approx([0, 0.026, 30], abs=1e-6)
    assert len(trace_items(path, 2, 1.0, (1, 9), seed=0)) == 2


def test_wrong_line_of_a_trace_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n1.5,4,x\n")
    with pytest.raises(InvalidInputError, match="line 2"):
        trace_items(path, None, 1.0, (1, 9), seed=0)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        trace_items(tmp_path / "none.csv", None, 1.0, (1, 9), seed=0)
