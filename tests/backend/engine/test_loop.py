"""The engine thread: what a failing or stuck step does, how refusals and deltas reach their owner."""

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.backend.scheduling.fakes import FakeRunner, model_config, oracle

from turbotriton.backend.engine.engine import Engine
from turbotriton.backend.engine.loop import EngineLoop
from turbotriton.backend.scheduling.plan import StepPlan, StepResult
from turbotriton.contract.errors import UnavailableError
from turbotriton.contract.ini import EngineConfig
from turbotriton.contract.wire import FinishReason, GenerateRequest, SamplingParams, TokenDelta

#: Seconds until what has to happen counts as missing: only a test that fails waits for so long.
PATIENCE_S = 60.0


class Harness:
    def __init__(self, execute: Callable[[StepPlan], StepResult] | None = None, watchdog_s: float = 60.0) -> None:
        runner = FakeRunner(num_blocks=16, block_size=4)
        if execute is not None:
            runner.execute = execute  # type: ignore[method-assign]
        self.engine = Engine(model_config(), EngineConfig(session_len=64, max_batch_size=2, num_tokens_per_iter=8), runner)
        self.deltas: queue.SimpleQueue[tuple[object, TokenDelta]] = queue.SimpleQueue()
        self.failures: list[str] = []
        self.has_failed = threading.Event()
        self.loop = EngineLoop(self.engine, self._deliver, lambda stats: None, self._fail, watchdog_s)
        self.loop.start()

    def _deliver(self, owner: object, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            self.deltas.put((owner, delta))

    def _fail(self, reason: str) -> None:
        self.failures.append(reason)
        self.has_failed.set()

    def submit(self, request_id: int, prompt: tuple[int, ...], max_new_tokens: int, owner: str = "test", **fields: Any) -> None:
        self.loop.submit(owner, GenerateRequest(request_id, prompt, SamplingParams(max_new_tokens=max_new_tokens), **fields))

    def collect(self, request_id: int) -> tuple[list[int], TokenDelta]:
        tokens: list[int] = []
        while True:
            _, delta = self.deltas.get(timeout=PATIENCE_S)
            if delta.request_id == request_id:
                tokens += delta.token_ids
                if delta.finish_reason is not None:
                    return tokens, delta


def test_deltas_come_in_order_and_end_with_the_figures() -> None:
    harness = Harness()
    harness.submit(1, (1, 2, 3, 4, 5), 6)
    tokens, last = harness.collect(1)
    harness.loop.stop()
    assert tokens == oracle((1, 2, 3, 4, 5), 6)
    assert (last.finish_reason, last.num_prompt_tokens, last.num_cached_tokens) == (FinishReason.LENGTH, 5, 0)
    assert last.timings is not None
    assert last.timings.time_to_first_token_s is not None
    assert 0 <= last.timings.queue_s <= last.timings.time_to_first_token_s <= last.timings.e2e_s


@pytest.mark.parametrize(
    ("prompt", "fields", "words"),
    [((), {}, "no token"), ((1000,), {}, "outside the vocabulary"), ((1,), {"sample_index": -1}, "sample_index is -1")],
)
def test_refusal_comes_as_the_last_delta_and_the_engine_serves_on(prompt: tuple[int, ...], fields: Any, words: str) -> None:
    harness = Harness()
    harness.submit(1, prompt, 6, **fields)
    _, last = harness.collect(1)
    assert (last.finish_reason, last.error_status) == (FinishReason.ERROR, "INVALID_ARG")
    assert last.error is not None
    assert words in last.error
    harness.submit(2, (1,), 2)
    assert harness.collect(2)[0] == oracle((1,), 2)
    harness.loop.stop()


def test_request_waiting_for_a_slot_can_be_cancelled_and_one_whose_deadline_is_over_ends() -> None:
    harness = Harness()
    for request_id in (1, 2):
        harness.submit(request_id, (request_id,), 60)
    harness.submit(3, (3,), 60)
    harness.loop.cancel("test", 3)
    harness.submit(4, (4,), 60, deadline_ms=0)
    ends = {}
    while len(ends) < 4:
        _, delta = harness.deltas.get(timeout=PATIENCE_S)
        if delta.finish_reason is not None:
            ends[delta.request_id] = delta.finish_reason
    harness.loop.stop()
    assert ends == {1: FinishReason.LENGTH, 2: FinishReason.LENGTH, 3: FinishReason.CANCELLED, 4: FinishReason.DEADLINE}


def test_owner_that_is_dropped_gets_nothing_more_and_the_other_goes_on() -> None:
    gate, is_stepping = threading.Event(), threading.Event()
    runner = FakeRunner(16, 4)

    def execute(plan: StepPlan) -> StepResult:
        is_stepping.set()
        gate.wait(PATIENCE_S)
        return runner.execute(plan)

    harness = Harness(execute)
    harness.submit(1, (1,), 50, owner="gone")
    harness.submit(2, (2,), 20, owner="stays")
    assert is_stepping.wait(PATIENCE_S)
    harness.loop.drop("gone")
    gate.set()
    tokens, _ = harness.collect(2)
    harness.loop.stop()
    assert tokens == oracle((2,), 20)
    assert harness.engine.stats().requests_total == {"cancelled": 1, "length": 1}
    assert harness.engine.stats().num_used_blocks == 0


def test_drained_engine_ends_running_and_waiting_requests_and_refuses_those_that_come() -> None:
    gate, runner = threading.Event(), FakeRunner(16, 4)

    def execute(plan: StepPlan) -> StepResult:
        gate.wait(PATIENCE_S)
        return runner.execute(plan)

    harness = Harness(execute)
    for request_id in (1, 2, 3):  # two slots: the third waits
        harness.submit(request_id, (request_id,), 60)
    harness.loop.drain(UnavailableError("the server is stopping"))
    harness.submit(4, (4,), 60)
    gate.set()
    lasts = [harness.collect(request_id)[1] for request_id in (1, 2, 3, 4)]
    harness.loop.stop()
    assert {(last.finish_reason, last.error_status, last.error) for last in lasts} == {
        (FinishReason.ERROR, "UNAVAILABLE", "the server is stopping")
    }
    assert harness.engine.stats().num_used_blocks == 0


def test_runner_that_raises_ends_the_engine_once(caplog: pytest.LogCaptureFixture) -> None:
    def execute(plan: StepPlan) -> StepResult:
        raise RuntimeError("illegal memory access")

    harness = Harness(execute)
    harness.submit(1, (1,), 5)
    assert harness.has_failed.wait(PATIENCE_S)
    harness.loop._watchdog_s = 0.0  # the step that raised counts as stuck from now on
    harness.loop._watchdog.join(PATIENCE_S)  # it has found so
    assert not harness.loop._watchdog.is_alive()
    harness.loop.stop()
    assert len(harness.failures) == 1
    assert "internal error" in harness.failures[0]
    assert "illegal memory access" in caplog.text


def test_stuck_step_trips_the_watchdog_once(capfd: pytest.CaptureFixture[str]) -> None:
    gate = threading.Event()

    def execute(plan: StepPlan) -> StepResult:
        gate.wait(PATIENCE_S)
        raise RuntimeError("late")

    harness = Harness(execute, watchdog_s=0.2)
    harness.submit(1, (1,), 5)
    assert harness.has_failed.wait(PATIENCE_S)
    gate.set()
    harness.loop.stop()
    assert len(harness.failures) == 1
    assert "stuck in one step" in harness.failures[0]
    assert "execute" in capfd.readouterr().err  # the stacks of all threads
