"""What a process of ours finds or sets for itself before its work: its cores, what it logs, how often it collects garbage."""

import gc
import logging
import os
import sys
from pathlib import Path

__all__ = ["collect_seldom", "set_up_logging", "usable_cores"]

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds in a period, or "max"


def usable_cores() -> int:
    """Those that this process may run on, or as many as its container's quota pays for; 1 where the system does not tell."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    try:
        quota, period = map(int, CPU_QUOTA.read_text().split())
    except (OSError, ValueError):
        return num_cores
    return max(1, min(num_cores, quota // period))


def set_up_logging() -> None:
    """Our own lines from INFO on, others' from WARNING on: their INFO is a line a request, or statistics at the end."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("turbotriton").setLevel(logging.INFO)


def collect_seldom() -> None:
    """For a server that is set up now: it never looks again at what is there, and at what comes after each 10,000 new objects.

    A request of the OpenAI server makes thousands, so Python's 700 cost 6 % of its CPU time (docs/perf-log.md, 2026-11-28).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
