"""The processes behind a running server, found through /proc."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .server import TritonServer

#: The demo model's likeliest answer has 119 tokens, whatever the conversation was before: half a minute of a throttled engine.
#: Sampled answers are no substitute, since one in thirty ends within five tokens.
LONG_STORY = "Tell me a long story."


def children(pid: int) -> dict[int, str]:
    """Every living descendant of a process: pid -> command line."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found: dict[int, str] = {}
    front = {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front and child not in found}
        found.update({child: commands[child] for child in front})
    return found


def engine_pid(server: TritonServer) -> int:
    """The one engine process that was started for this server (it may have its own process group and parent)."""
    owner = f"--owner-pid {server.pid} "
    pids = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and owner in _command(entry) + " " and "turbotriton.backend.engine" in _command(entry)
    ]
    assert len(pids) == 1, f"expected one engine process of server {server.pid}, found {pids}"
    return pids[0]


def _command(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


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
