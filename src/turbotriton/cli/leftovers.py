"""What a tritonserver leaves behind when it is killed or crashes: its stubs, the engine process, shared memory.

A stub of a killed server can wait for ever on a lock in shared memory while it holds the interpreter's lock, so no code of ours
in it can end it. The process in front of the server can: orphans become its children (a subreaper), and the server's shared
memory carries a prefix that names the process in front, so a later start knows whose region is whose.
"""

import ctypes
import logging
import os
import re
import signal
import time
from pathlib import Path

__all__ = [
    "adopt_orphans",
    "end_children",
    "end_with_parent",
    "engine_processes",
    "remove_shared_memory",
    "shared_memory_prefix",
    "sweep_dead_regions",
]

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_REGION = re.compile(r"turbotriton_(\d+)_(\d+)_")


def adopt_orphans() -> None:
    """From now on, orphaned descendants of this process become its children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """To run in a new child, before exec: SIGTERM when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def end_children(grace_s: float) -> None:
    """Waits up to grace_s for every child of this process to leave by itself, then kills what is left."""
    deadline = time.monotonic() + grace_s
    while _reap():
        if time.monotonic() > deadline:
            for pid in _children():
                logger.warning("killing process %d, left behind by tritonserver", pid)
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def engine_processes(server_pid: int) -> list[int]:
    """The engines of a tritonserver: they carry its pid, whoever their parent is by now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_engine = b"turbotriton.backend.engine" in arguments and b"--owner-pid" in arguments
        if is_engine and arguments[arguments.index(b"--owner-pid") + 1] == str(server_pid).encode():
            found.append(int(entry.name))
    return found


def _reap() -> bool:
    """Collects children that ended; False when there is no child any more."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _children() -> list[int]:
    """Our children that have not ended: only we could reap them, so no id in the list is somebody else's."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in text.split()]


def shared_memory_prefix() -> str:
    """Names this process, in its pid namespace: containers may share /dev/shm without sharing process ids."""
    return f"turbotriton_{_pid_namespace()}_{os.getpid()}_"


def remove_shared_memory() -> None:
    """This process's regions; call it when no child is left."""
    for region in SHARED_MEMORY.glob(f"{shared_memory_prefix()}*"):
        region.unlink(missing_ok=True)
        logger.info("removed %s, left by a stub that was killed", region)


def sweep_dead_regions() -> None:
    """Regions of this user whose owner (shared_memory_prefix) is gone and that no living process maps."""
    mapped: set[str] | None = None
    for region in SHARED_MEMORY.glob("turbotriton_*"):
        named = _REGION.match(region.name)
        if named is None or int(named[1]) != _pid_namespace() or Path(f"/proc/{named[2]}").exists():
            continue
        mapped = _mapped_regions() if mapped is None else mapped
        try:
            if region.stat().st_uid == os.getuid() and str(region) not in mapped:
                region.unlink()
                logger.info("removed %s, left by process %s, which is gone", region, named[2])
        except FileNotFoundError:
            continue


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _mapped_regions() -> set[str]:
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped.update(line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if f"{SHARED_MEMORY}/" in line)
        except OSError:
            continue  # gone, or another user's: regions of other users are not ours to remove either
    return mapped
