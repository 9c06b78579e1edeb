"""Leftovers end, living servers' regions stay. Each case runs in a process of its own: adopting orphans changes the process."""

import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from turbotriton.cli.leftovers import SHARED_MEMORY, shared_memory_prefix, sweep_dead_regions

PID_NAMESPACE = os.stat("/proc/self/ns/pid").st_ino


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def region() -> Iterator[Path]:
    """A region of a server that is gone."""
    path = SHARED_MEMORY / f"turbotriton_{PID_NAMESPACE}_{dead_pid()}_{uuid.uuid4()}"
    path.write_bytes(bytes(4096))
    yield path
    path.unlink(missing_ok=True)


def test_orphan_that_ignores_signals_is_killed_after_the_grace() -> None:
    pid, seconds = run_python(
        """
        import subprocess, time
        from turbotriton.cli.leftovers import adopt_orphans, end_children
        adopt_orphans()
        # like tritonserver: starts a child in a session of its own, which ignores SIGTERM, and ends without it
        middle = subprocess.run(
            ["sh", "-c", "trap '' TERM INT; setsid sleep 60 >/dev/null & echo $!"], stdout=subprocess.PIPE, text=True
        )
        started = time.monotonic()
        end_children(0.3)
        print(middle.stdout.strip(), time.monotonic() - started)
        """
    ).split()
    assert 0.3 <= float(seconds) < 50
    assert not Path(f"/proc/{pid}").exists()


def test_children_that_leave_by_themselves_are_not_waited_for_longer() -> None:
    seconds = run_python(
        """
        import subprocess, time
        from turbotriton.cli.leftovers import adopt_orphans, end_children
        adopt_orphans()
        subprocess.run(["sh", "-c", "sleep 0.2 &"])
        started = time.monotonic()
        end_children(30)
        print(time.monotonic() - started)
        """
    )
    assert float(seconds) < 25


def test_region_of_a_dead_server_is_swept(region: Path) -> None:
    sweep_dead_regions()
    assert not region.exists()


def test_region_that_a_process_still_maps_stays(region: Path) -> None:
    """It gets its name when it is mapped: a server that starts meanwhile may sweep it before."""
    unnamed = region.with_name(f"unnamed_{uuid.uuid4()}")
    unnamed.write_bytes(bytes(4096))
    code = f"import mmap; f = open({str(unnamed)!r}, 'r+b'); m = mmap.mmap(f.fileno(), 0); print('mapped', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "mapped\n"
        unnamed.replace(region)
        sweep_dead_regions()
        assert region.exists()
        process.stdin.close()
    sweep_dead_regions()
    assert not region.exists()


@pytest.mark.parametrize("whose", ["a living process", "another pid namespace", "nobody"])
def test_other_regions_stay(whose: str) -> None:
    name = {
        "a living process": shared_memory_prefix() + "of-a-living-process",
        "another pid namespace": f"turbotriton_1_{dead_pid()}_of-another-pid-namespace",
        "nobody": "turbotriton_without_an_owner",
    }[whose]
    path = SHARED_MEMORY / f"{name}{uuid.uuid4()}"
    path.touch()
    try:
        sweep_dead_regions()
        assert path.exists()
    finally:
        path.unlink()


def test_server_ends_with_the_process_in_front_of_it() -> None:
    """kill -9 of `turbotriton serve` must not leave a server that nobody sees."""
    code = """
        import os, signal, subprocess
        from turbotriton.cli.leftovers import end_with_parent
        process = subprocess.Popen(["sleep", "60"], preexec_fn=end_with_parent)
        print(process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    pid = int(done.stdout)
    watched = None
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import select

    assert select.select([watched], [], [], 50)[0], "the child outlived its parent"
    os.close(watched)
