"""Time that is ours: what a limit of the product is held against on a machine that others use too."""

import contextlib
import os
import time
from pathlib import Path

from .server import TritonServer

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Stopwatch:
    """Seconds since it was made, less those in which other programs had the CPUs that this process may use.

    A server with all CPUs to itself would have needed no more: while others hold a share of them, ours wait for that long, on every
    CPU together at most. Ours are this process and all that `server` started.
    """

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self._cpus = os.sched_getaffinity(0)
        self._ticks: dict[int, int] = {}  # pid -> what it has used, also of one that has ended
        self._foreign_began = self._foreign_s()
        self._began = time.monotonic()

    def seconds(self) -> float:
        wall_s = time.monotonic() - self._began
        return wall_s - max(0.0, self._foreign_s() - self._foreign_began) / len(self._cpus)

    def _foreign_s(self) -> float:
        """Seconds that the CPUs have worked for others, from no moment in particular."""
        busy = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *ticks = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self._cpus:
                user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, ticks)
                busy += user + nice + system + irq + softirq + steal
        for pid in (os.getpid(), *self._server.processes()):
            with contextlib.suppress(OSError):
                self._ticks[pid] = _ticks(pid)
        return (busy - sum(self._ticks.values())) / TICKS_A_SECOND


def wait_quiet(server: TritonServer) -> None:
    """Until tritonserver itself has hardly worked for a second."""
    while True:
        before = _ticks(server.pid)
        time.sleep(1)
        if _ticks(server.pid) - before <= 2:
            return


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])
