"""A process that is slowed down, so that a test has the time to act while it works."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pytest

__all__ = ["Throttle", "in_parts", "throttled"]


Parts = TypeVar("Parts", bound=Sequence[object])


class Throttle:
    """Lets a process run `share` of the time only, in slices of 100 ms.

    A slice that lasts longer, since a busy machine woke the thread late, is followed by a longer stop.
    """

    def __init__(self, pid: int, share: float) -> None:
        self._pid, self._share = pid, share
        self._is_released = threading.Event()
        self._may_run = threading.Lock()
        self._thread = threading.Thread(target=self._alternate, daemon=True)
        self._thread.start()

    def _alternate(self) -> None:
        while not self._is_released.is_set():
            with self._may_run, contextlib.suppress(ProcessLookupError):  # it may end while it is throttled
                began = time.monotonic()
                os.kill(self._pid, signal.SIGCONT)
                time.sleep(0.1 * self._share)
                os.kill(self._pid, signal.SIGSTOP)
            self._is_released.wait((time.monotonic() - began) * (1 / self._share - 1))
        with self._may_run, contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGCONT)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing of the process runs inside the block."""
        with self._may_run:
            yield

    def release(self) -> None:
        """From now on the process runs as it likes."""
        self._is_released.set()
        self._thread.join()


@contextmanager
def throttled(pid: int, share: float = 0.01) -> Iterator[Throttle]:
    """The process is throttled until the block ends."""
    throttle = Throttle(pid, share)
    try:
        yield throttle
    finally:
        throttle.release()


def in_parts(pid: int, ask: Callable[[], Parts], num_parts: int = 2) -> Parts:
    """What `ask` gives, once that are at least so many parts; the process makes them slowly, and in each try more so.

    What is made faster than it is sent goes out together: a busy machine may do so with a whole answer, and all is as it should be.
    """
    for share in (0.1, 0.03, 0.01, 0.01):
        with throttled(pid, share):
            parts = ask()
        if len(parts) >= num_parts:
            return parts
    pytest.fail(f"it came in {len(parts)} parts each time")
