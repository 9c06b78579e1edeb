"""The load generator against a target of known behaviour: who is sent when, and what the figures say."""

import asyncio
import csv
import json
import selectors
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from turbotriton.client.bench import load
from turbotriton.client.bench.load import Record, run_load
from turbotriton.client.bench.plot import ticks
from turbotriton.client.bench.report import format_summary, write_report
from turbotriton.client.bench.summary import parse_slo, summarise
from turbotriton.client.bench.targets import Progress
from turbotriton.client.bench.workload import Item
from turbotriton.contract.errors import ServerError


class Selector(selectors.DefaultSelector):
    """Instead of waiting it moves the clock: by as much as the loop would have waited for."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.Runner]:
    """Runs coroutines in a time that passes only while all of them wait, however slow the machine is."""
    selector = Selector()

    def make_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.SelectorEventLoop(selector)
        monkeypatch.setattr(loop, "time", lambda: selector.now)
        return loop

    monkeypatch.setattr(load, "time", SimpleNamespace(perf_counter=lambda: selector.now))
    with asyncio.Runner(loop_factory=make_loop) as runner:
        yield runner


class SteadyTarget:
    """A first token after `first_s`, another each `gap_s`; the items whose max_tokens is 13 fail after their first."""

    def __init__(self, first_s: float, gap_s: float) -> None:
        self.first_s, self.gap_s = first_s, gap_s
        self.running = self.most = 0

    async def stream(self, item: Item) -> AsyncIterator[Progress]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.first_s)
            for count in range(1, item.max_tokens + 1):
                yield Progress(count, len(item.input_ids or ()))
                if item.max_tokens == 13:
                    raise ServerError("the queue is full")
                if count < item.max_tokens:
                    await asyncio.sleep(self.gap_s)
        finally:
            self.running -= 1

    async def close(self) -> None: ...


def items(num: int, max_tokens: int = 4, every_s: float | None = None) -> list[Item]:
    return [Item(None, (1, 2, 3), max_tokens, None if every_s is None else index * every_s) for index in range(num)]


def record(sent: float, times: list[float], tokens: list[int], error: str | None = None) -> Record:
    responses = list(zip(times, tokens, strict=True))
    return Record(0, sent, sent, times[-1] if times else sent, 10, tokens[-1] if tokens else 0, error, responses)


def test_closed_loop_keeps_exactly_the_asked_number_under_way(clockwork: asyncio.Runner) -> None:
    target = SteadyTarget(0.01, 0.002)
    ended: list[Record] = []
    records = clockwork.run(run_load(target, items(20), 5, ended.append))
    assert target.most == 5
    assert [one.index for one in records] == list(range(20))
    assert len(ended) == 20
    assert {one.num_output_tokens for one in records} == {4}
    assert summarise(records, {}).most_at_once == 5


def test_open_loop_sends_by_the_clock_though_answers_are_slow(clockwork: asyncio.Runner) -> None:
    target = SteadyTarget(0.5, 0.0)
    records = clockwork.run(run_load(target, items(10, 1, every_s=0.02), None))
    assert target.most == 10
    assert [one.due_s for one in records] == pytest.approx([0.02 * index for index in range(10)])
    assert [one.sent_s - one.due_s for one in records] == pytest.approx([0.0] * 10, abs=1e-6)
    assert [one.ended_s - one.sent_s for one in records] == pytest.approx([0.5] * 10, abs=1e-6)


def test_failed_request_is_counted_and_the_run_goes_on(clockwork: asyncio.Runner) -> None:
    target = SteadyTarget(0.001, 0.001)
    mixed = [*items(3), *items(2, 13), *items(3)]
    summary = summarise(clockwork.run(run_load(target, mixed, 2)), {"ttft": 1000})
    assert (summary.num_requests, summary.num_failed) == (8, 2)
    assert summary.errors == {"the queue is full": 2}
    assert summary.output_tokens == 24
    assert "2 x the queue is full" in format_summary(summary)


def test_figures_follow_from_the_times() -> None:
    """Two requests: 4 tokens in 3 responses from 0 s to 1 s, and 1 token from 1 s to 2 s."""
    records = [record(0.0, [0.2, 0.6, 1.0], [1, 3, 4]), record(1.0, [2.0], [1])]
    summary = summarise(records, {"ttft": 500, "tpot": 300})
    assert summary.duration_s == 2.0
    assert summary.output_tokens_per_s == 2.5
    assert summary.total_tokens_per_s == 12.5
    assert summary.ttft_ms is not None
    assert (summary.ttft_ms.p50, summary.ttft_ms.max) == (pytest.approx(200), pytest.approx(1000))
    assert summary.tpot_ms is not None
    assert summary.tpot_ms.mean == pytest.approx(800 / 3)
    assert summary.itl_ms is not None
    assert summary.itl_ms.p99 == pytest.approx(400)
    assert summary.goodput_requests_per_s == 0.5  # the second's first token is late
    assert summarise(records, {}).goodput_requests_per_s is None


def test_percentiles_are_ranks_of_the_sorted_values() -> None:
    records = [record(0.0, [(index + 1) / 1000], [1]) for index in range(101)]
    ttft = summarise(list(reversed(records)), {}).ttft_ms
    assert ttft is not None
    assert (ttft.p50, ttft.p90, ttft.p99, ttft.max) == (
        pytest.approx(51),
        pytest.approx(91),
        pytest.approx(100),
        pytest.approx(101),
    )


def test_report_files_hold_every_request_and_no_foreign_markup(tmp_path: Path) -> None:
    records = [record(0.0, [0.2, 0.6], [1, 3]), record(0.1, [], [], "<script>alert(1)</script>")]
    summary = summarise(records, {"e2e": 700})
    write_report(tmp_path / "out", records, summary, {"model": "<b>", "seed": 1})
    rows = list(csv.DictReader((tmp_path / "out" / "requests.csv").open()))
    assert [row["num_output_tokens"] for row in rows] == ["3", "0"]
    assert float(rows[0]["ttft_s"]) == pytest.approx(0.2)
    assert rows[1]["ttft_s"] == ""
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert content["summary"]["goodput_requests_per_s"] == pytest.approx(1 / 0.6)
    assert content["settings"]["model"] == "<b>"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("<svg") == 4


@pytest.mark.parametrize(
    ("end", "expected"),
    [(1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (7, [0, 2, 4, 6]), (0.03, [0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03])],
)
def test_ticks_are_round(end: float, expected: list[float]) -> None:
    assert ticks(end) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["ttft", "ttft=", "ttft=-1", "speed=3", "=3"])
def test_wrong_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_slo(text)
