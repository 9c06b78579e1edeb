"""The thread that owns an engine: takes messages from an inbox, steps while there is work, hands deltas on once a step.

    other threads ── submit / cancel / drop ──> inbox ──> [engine thread] ──> deliver(owner, deltas), publish(stats)

`deliver` and `publish` run on the engine thread and must not block.
A step that raises, or that takes longer than `watchdog_s`, ends the process through `fail`: the device's state is unknown then.
"""

import faulthandler
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from turbotriton.contract.errors import TurbotritonError, UnavailableError
from turbotriton.contract.wire import EngineStats, FinishReason, GenerateRequest, TokenDelta

from .engine import DeltasByOwner, Engine

__all__ = ["EngineLoop"]

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.2
IDLE_WAIT_S = 0.2
WATCHDOG_S = 300.0


@dataclass(frozen=True, slots=True)
class _Submit:
    owner: object
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class _Cancel:
    owner: object
    request_id: int


@dataclass(frozen=True, slots=True)
class _CancelNamed:
    name: str


@dataclass(frozen=True, slots=True)
class _Drop:
    owner: object


@dataclass(frozen=True, slots=True)
class _Drain:
    error: UnavailableError


class EngineLoop:
    """`fail(reason)` is called once, from any thread, when the engine cannot go on."""

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[object, list[TokenDelta]], None],
        publish: Callable[[EngineStats], None],
        fail: Callable[[str], None],
        watchdog_s: float = WATCHDOG_S,
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._publish = publish
        self._fail = fail
        self._watchdog_s = watchdog_s
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _CancelNamed | _Drop | _Drain | None] = queue.SimpleQueue()
        self._refusal: UnavailableError | None = None  # of every request, once drained; of the engine thread
        self._step_began: float | None = None  # written by the engine thread, read by the watchdog
        self._is_stopping = threading.Event()
        self._may_fail = threading.Lock()
        engine.on_grammar(lambda: self._inbox.put(None))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()

    def submit(self, owner: object, request: GenerateRequest) -> None:
        self._inbox.put(_Submit(owner, request))

    def cancel(self, owner: object, request_id: int) -> None:
        self._inbox.put(_Cancel(owner, request_id))

    def cancel_named(self, name: str) -> None:
        """Cancels every request that was submitted under this name."""
        self._inbox.put(_CancelNamed(name))

    def drop(self, owner: object) -> None:
        """Cancels all of an owner that is gone."""
        self._inbox.put(_Drop(owner))

    def drain(self, error: UnavailableError) -> None:
        """Every request ends with `error`, and so does each that still comes. May be called from a signal handler."""
        self._inbox.put(_Drain(error))

    def stop(self) -> None:
        """Ends the thread after the step under way."""
        self._is_stopping.set()
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        last_stats, was_busy = 0.0, False
        try:
            while not self._is_stopping.is_set():
                self._take_messages()
                self._hand_on(self._engine.collect_grammars())
                if self._engine.has_work:
                    self._step_began = time.monotonic()
                    self._hand_on(self._engine.step())
                    self._step_began = None
                has_become_idle = was_busy and not self._engine.has_work  # told at once: that all is free again
                was_busy = self._engine.has_work
                if has_become_idle or time.monotonic() - last_stats >= STATS_INTERVAL_S:
                    self._publish(self._engine.stats())
                    last_stats = time.monotonic()
        except Exception:  # the border of the engine: whatever happened, its requests must end
            logger.exception("the engine stopped at an error")
            self._fail_once("the engine stopped at an internal error; its log has the traceback")

    def _take_messages(self) -> None:
        """Everything in the inbox; waits a little for it when there is nothing else to do."""
        try:
            message = self._inbox.get_nowait() if self._engine.has_work else self._inbox.get(timeout=IDLE_WAIT_S)
            while True:
                if isinstance(message, _Submit):
                    self._add(message)
                elif isinstance(message, _Cancel):
                    self._hand_on(self._engine.cancel(message.owner, message.request_id))
                elif isinstance(message, _CancelNamed):
                    self._hand_on(self._engine.cancel_named(message.name))
                elif isinstance(message, _Drop):
                    self._engine.cancel_owner(message.owner)
                elif isinstance(message, _Drain):
                    self._refusal = message.error
                    self._hand_on(self._engine.refuse_all(message.error))
                message = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _add(self, message: _Submit) -> None:
        try:
            if self._refusal is not None:
                raise self._refusal
            self._engine.add(message.owner, message.request)
        except TurbotritonError as error:
            refusal = TokenDelta(
                request_id=message.request.request_id,
                finish_reason=FinishReason.ERROR,
                error=str(error),
                error_status=error.triton_status,
                num_prompt_tokens=len(message.request.prompt_ids),
            )
            self._deliver(message.owner, [refusal])

    def _hand_on(self, by_owner: DeltasByOwner) -> None:
        for owner, deltas in by_owner.items():
            self._deliver(owner, deltas)

    def _watch(self) -> None:
        while not self._is_stopping.wait(min(1.0, self._watchdog_s / 4)):
            began = self._step_began
            if began is not None and time.monotonic() - began > self._watchdog_s:
                logger.critical("one step has taken over %.0f s; stacks of all threads follow", self._watchdog_s)
                faulthandler.dump_traceback(sys.stderr)
                self._fail_once(f"the engine was stuck in one step for {self._watchdog_s:.0f} s")
                return

    def _fail_once(self, reason: str) -> None:
        """A step that raises after the watchdog has spoken, or the other way round, is one failure."""
        if self._may_fail.acquire(blocking=False):  # never released
            self._fail(reason)
