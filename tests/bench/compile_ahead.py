"""Compiles what a sweep is about to time, in several processes: a sweep waits for hundreds of kernels otherwise, one after the other.

`in_processes()` starts this very program again, once a process, each with a share of the work. There every timing calls
`compiles(calls)` first, which in a share runs one call in so many, once, and says that there is nothing to time. Compiled kernels stay in
triton's cache on the disk.
"""

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch

__all__ = ["compiles", "in_processes"]

SHARE = "SWEEP_SHARE"  # environment variable: "INDEX/COUNT"
MOST_PROCESSES = 14
_timings = itertools.count()


def in_processes() -> None:
    """Returns when all have ended; what they print is lost, and what did not compile fails again where it is timed."""
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    if SHARE in os.environ or count < 2:
        return
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env=os.environ | {SHARE: f"{index}/{count}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index in range(count)
    ]
    for process in processes:
        process.wait()


def compiles(calls: Sequence[Callable[[], object]]) -> bool:
    """True in a share, where the first of `calls` has run if its turn was this process's; what it raises is for the timing to raise."""
    if SHARE not in os.environ:
        return False
    index, count = map(int, os.environ[SHARE].split("/"))
    if next(_timings) % count == index:
        with contextlib.suppress(Exception):
            calls[0]()
            torch.cuda.synchronize()
    return True
