"""`turbotriton demo` as `make demo` runs it: without a terminal it answers once and stops everything."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from turbotriton.contract import env

pytestmark = pytest.mark.e2e

COMMAND = [sys.executable, "-m", "turbotriton", "demo"]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A cache of its own but for the server runtime, and a runtime folder by which its processes are found."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for runtime in env.cache_dir().glob("server-runtime-*"):
        (cache / runtime.name).symlink_to(runtime)
    with tempfile.TemporaryDirectory(prefix="turbotriton-", dir="/tmp") as run_folder:  # short: sockets lie in it
        yield os.environ | {"TURBOTRITON_CACHE": str(cache), "TURBOTRITON_RUNTIME_DIR": run_folder}


def processes(environment: dict[str, str]) -> dict[int, str]:
    mark = f"TURBOTRITON_RUNTIME_DIR={environment['TURBOTRITON_RUNTIME_DIR']}\0".encode()
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def test_answers_once_and_leaves_nothing_running(environment: dict[str, str]) -> None:
    command = [*COMMAND, "--question", "Spell cat."]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    before, _, after = done.stdout.partition(">>> Spell cat.\n")
    assert "tritonserver is ready: gRPC localhost:" in before
    answer, _, rest = after.partition("\ntritonserver is stopped\n")
    assert answer.strip(), done.stdout
    assert rest == ""
    assert "tokens/s" in done.stderr
    assert not processes(environment)


def test_sigterm_while_it_runs_leaves_nothing_running(environment: dict[str, str]) -> None:
    with subprocess.Popen(COMMAND, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: any("stub" in command for command in processes(environment).values()), 120)
        process.send_signal(signal.SIGTERM)
    wait_until(lambda: not processes(environment), 60)


def wait_until(condition, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.1)
