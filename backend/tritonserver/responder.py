"""Carries deltas to clients: a mailbox a request, a few sender threads, one thread that looks for cancelled requests.

    engine's receive thread ── put ──> mailbox ──> ready queue ──> sender thread: answer.take(all waiting deltas) -> send

One response carries all that waits for a request, so a slow response path costs granularity and never throughput. A request's
first delta overtakes the others' later ones.

Invariants: one sender at a time works on a mailbox, so responses of a request keep their order. A request's sender is never asked
is_cancelled() once FINAL may have been sent: tritonserver 24.10 then looks into freed memory and dies. `poll_lock` keeps the two
apart.
"""

import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import triton_python_backend_utils as pb_utils

from turbotriton.backend.engine.client import EngineClient
from turbotriton.contract.errors import TurbotritonError
from turbotriton.contract.wire import FinishReason, GenerateRequest, TokenDelta

from .errors import error_response

__all__ = ["Answer", "Mailbox", "Responder"]

logger = logging.getLogger(__name__)

NUM_SENDERS = 3
MAX_POLLS_PER_S = 300
POLL_INTERVAL_S = 0.05
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Answer(Protocol):
    """Turns deltas into responses. Called by one thread at a time."""

    def take(self, deltas: Sequence[TokenDelta]) -> tuple[list[Any], bool]:
        """(InferenceResponses to send, whether the request is over). Raises TurbotritonError: sent, and over."""


class Mailbox:
    """Deltas waiting for one client. request_ids: at `engine`, one a sample."""

    def __init__(self, sender: Any, answer: Answer, engine: EngineClient, request_ids: Sequence[int]) -> None:
        self.sender = sender
        self.answer = answer
        self.engine = engine
        self.request_ids = tuple(request_ids)
        self.deltas: list[TokenDelta] = []  # under the responder's lock
        self.is_queued = False  # under the responder's lock
        self.has_sent = False  # written by its sender thread
        self.is_broken = False  # a send failed: deltas are still taken, nothing but FINAL is sent; written by its sender thread
        self.is_over = False  # written by its sender thread, under poll_lock
        self.poll_lock = threading.Lock()
        self.is_cancelled = False  # written by the poll thread

    def cancel(self) -> None:
        """Tells the engine that nobody waits any more. Idempotent."""
        for request_id in self.request_ids:
            self.engine.cancel(request_id)


class _ReadyQueue:
    """Mailboxes that have something to send, those that have sent nothing yet first. No lock of its own: it is passed for every token."""

    def __init__(self) -> None:
        self._first: deque[Mailbox | None] = deque()
        self._later: deque[Mailbox | None] = deque()
        self._tickets: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each entry, put after it

    def put(self, mailbox: Mailbox | None, *, is_first: bool = False) -> None:
        (self._first if is_first else self._later).append(mailbox)
        self._tickets.put(None)

    def get(self) -> Mailbox | None:
        """Waits for the next one."""
        self._tickets.get()
        while True:
            for entries in (self._first, self._later):
                try:
                    return entries.popleft()
                except IndexError:  # others were quicker there; this ticket's entry is in one of the two
                    continue


class Responder:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready = _ReadyQueue()
        self._open: dict[int, Mailbox] = {}  # id(mailbox) -> mailbox, under the lock
        self._is_closing = threading.Event()
        self._threads = [threading.Thread(target=self._send, name=f"send-{i}", daemon=True) for i in range(NUM_SENDERS)]
        self._threads.append(threading.Thread(target=self._poll, name="poll-cancelled", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def num_open(self) -> int:
        with self._lock:
            return len(self._open)

    def open(self, mailbox: Mailbox) -> None:
        """From now on the client is watched; every opened mailbox must get a last delta."""
        with self._lock:
            self._open[id(mailbox)] = mailbox

    def submit(self, mailbox: Mailbox, request: GenerateRequest) -> None:
        """Sends a request of an opened mailbox to its engine; an engine that is gone answers through the mailbox too."""
        try:
            mailbox.engine.submit(request, functools.partial(self.put, mailbox))
        except TurbotritonError as error:
            failed = TokenDelta(
                request.request_id, finish_reason=FinishReason.ERROR, error=str(error), error_status=error.triton_status
            )
            self.put(mailbox, failed)

    def put(self, mailbox: Mailbox, delta: TokenDelta) -> None:
        """Never blocks: it runs on the engine's receive thread."""
        with self._lock:
            mailbox.deltas.append(delta)
            if not mailbox.is_queued:
                mailbox.is_queued = True
                self._ready.put(mailbox, is_first=not mailbox.has_sent)

    def close(self, timeout_s: float = 3.0) -> None:
        """Sends what waits, then ends the threads."""
        end = time.monotonic() + timeout_s
        while self.num_open and time.monotonic() < end:
            time.sleep(0.02)
        self._is_closing.set()
        for _ in range(NUM_SENDERS):
            self._ready.put(None)
        for thread in self._threads:
            thread.join(max(0.05, end - time.monotonic()))

    def _send(self) -> None:
        while (mailbox := self._ready.get()) is not None:
            with self._lock:
                deltas, mailbox.deltas = mailbox.deltas, []
            try:
                self._deliver(mailbox, deltas)
            except Exception:  # one client's trouble must not end the thread that serves the others
                logger.exception("a response could not be sent")
                mailbox.is_broken = True
                mailbox.cancel()  # its last delta still comes, and ends it
            with self._lock:
                mailbox.is_queued = bool(mailbox.deltas)
                if mailbox.is_queued:
                    self._ready.put(mailbox)

    def _deliver(self, mailbox: Mailbox, deltas: Sequence[TokenDelta]) -> None:
        if mailbox.is_over or not deltas:
            return
        try:
            responses, is_over = mailbox.answer.take(deltas)
        except TurbotritonError as error:
            mailbox.cancel()
            responses, is_over = [error_response(error)], True
        except Exception as error:
            logger.exception("an answer could not be built")
            mailbox.cancel()
            responses, is_over = [error_response(TurbotritonError(f"the door failed: {error}"))], True
        if is_over:
            self._end(mailbox)
        if mailbox.is_broken:
            responses = []
        for index, response in enumerate(responses):
            is_last = is_over and index == len(responses) - 1
            mailbox.sender.send(response, flags=FINAL if is_last else 0)
            mailbox.has_sent = True
        if is_over and not responses:
            mailbox.sender.send(flags=FINAL)

    def _end(self, mailbox: Mailbox) -> None:
        """Called before FINAL is sent: no poll is under way then, and none begins any more."""
        with mailbox.poll_lock:
            mailbox.is_over = True
        with self._lock:
            self._open.pop(id(mailbox), None)

    def _poll(self) -> None:
        while not self._is_closing.is_set():
            with self._lock:
                mailboxes = list(self._open.values())
            began = time.monotonic()
            for mailbox in mailboxes:
                with mailbox.poll_lock:
                    is_cancelled = not (mailbox.is_over or mailbox.is_cancelled) and mailbox.sender.is_cancelled()
                if is_cancelled:
                    mailbox.is_cancelled = True
                    mailbox.cancel()
            pause = max(POLL_INTERVAL_S, len(mailboxes) / MAX_POLLS_PER_S) - (time.monotonic() - began)
            self._is_closing.wait(max(pause, 0.005))
