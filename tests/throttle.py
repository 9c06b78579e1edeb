"""A process that is slowed down, so that a test has the time to act while it works."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Throttle", "throttled"]


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
