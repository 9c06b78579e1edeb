"""`turbotriton serve tritonserver` as a user runs it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.throttle import throttled

from turbotriton.cli.running_server import held_ports
from turbotriton.client import Client, Delta
from turbotriton.contract.errors import UnavailableError

from .engine import PATIENCE_S, wait_until
from .server import CRASHES, READY_TIMEOUT_S, START_TRIES

pytestmark = pytest.mark.e2e


@pytest.fixture
def run_folder() -> Iterator[Path]:
    """For sockets: tmp_path would be too long for theirs."""
    with tempfile.TemporaryDirectory(prefix="turbotriton-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def ports() -> Iterator[list[int]]:
    """HTTP, gRPC, metrics."""
    with held_ports(3) as ports:
        yield ports


@pytest.fixture
def served(demo_workspace: Path, tmp_path: Path, run_folder: Path, ports: list[int]) -> Iterator["subprocess.Popen[bytes]"]:
    """`serve` with every model ready; log at tmp_path/log."""
    http, grpc, metrics = ports
    command = [sys.executable, "-m", "turbotriton", "serve", "tritonserver", str(demo_workspace)]
    command += [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--session-len=512"]
    command += ["--log-verbose=0"]  # not ours: passed on
    environment = os.environ | {"TURBOTRITON_RUNTIME_DIR": str(run_folder)}
    with _started(command, environment, tmp_path / "log", http) as process:
        yield process


@contextmanager
def _started(
    command: list[str], environment: dict[str, str], log_path: Path, http_port: int
) -> Iterator["subprocess.Popen[bytes]"]:
    """The process of `command` when the server is ready; one that crashes at its start is started again (see server.py)."""
    for _ in range(START_TRIES):
        with open(log_path, "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            if _is_ready_in_time(process, http_port, log_path):
                yield process
                return
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    pytest.fail("tritonserver crashed at each start")


def _is_ready_in_time(process: "subprocess.Popen[bytes]", http_port: int, log_path: Path) -> bool:
    """False when it has crashed instead."""
    end = time.monotonic() + READY_TIMEOUT_S
    while not _ready(http_port):
        if -(process.poll() or 0) in CRASHES:
            return False
        assert process.poll() is None, log_path.read_text()[-3000:]
        assert time.monotonic() < end, log_path.read_text()[-3000:]
        time.sleep(0.1)
    return True


def _ready(http_port: int) -> bool:
    """All models: with model control off, the server is ready when each of them is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/v2/health/ready", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _processes(run_folder: Path) -> dict[int, str]:
    """pid -> command line of every process that was started with this runtime folder."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"TURBOTRITON_RUNTIME_DIR={run_folder}\0".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def _regions(process: "subprocess.Popen[bytes]") -> list[Path]:
    return list(Path("/dev/shm").glob(f"turbotriton_*_{process.pid}_*"))


def test_sigterm_stops_everything_cleanly(served: "subprocess.Popen[bytes]", tmp_path: Path, run_folder: Path) -> None:
    assert _regions(served), "no shared memory found, so its removal would prove nothing"
    served.send_signal(signal.SIGTERM)
    assert served.wait(2 * PATIENCE_S) == 0
    log_text = (tmp_path / "log").read_text(errors="replace")
    assert "Non-graceful" not in log_text, log_text[-2000:]
    assert "left behind" not in log_text, log_text[-2000:]
    assert not list(run_folder.glob("*.sock"))
    assert not _processes(run_folder)
    assert not _regions(served)


def test_stop_ends_answers_that_take_longer_than_they_may_and_is_clean(
    demo_workspace: Path, tmp_path: Path, run_folder: Path, ports: list[int]
) -> None:
    """Without the engine's help tritonserver 24.10 unloads no model that still answers, and crashes or hangs at its exit timeout."""
    http, grpc, metrics = ports
    command = [sys.executable, "-m", "turbotriton", "serve", "tritonserver", str(demo_workspace), "--max-batch-size=12"]
    command += [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--exit-timeout-secs=1"]
    environment = os.environ | {"TURBOTRITON_RUNTIME_DIR": str(run_folder), "OMP_NUM_THREADS": "1"}
    with _started(command, environment, tmp_path / "log", http) as process:
        with Client(f"127.0.0.1:{grpc}") as client, ThreadPoolExecutor(16) as pool:
            (engine,) = (pid for pid, command in _processes(run_folder).items() if "turbotriton.backend.engine" in command)
            with throttled(engine, share=0.1):
                streams = [client.stream("Once", max_tokens=2000, ignore_eos=True) for _ in range(16)]  # four of them wait
                ended = [pool.submit(_error_of, stream) for stream in streams]
                wait_until(lambda: _running(metrics) == 12, "twelve answers running")
            process.send_signal(signal.SIGTERM)
            texts = {future.result(2 * PATIENCE_S) for future in ended}
        assert process.wait(2 * PATIENCE_S) == 0
    assert texts == {"the server is stopping; send the request again when it is back"}
    log_text = (tmp_path / "log").read_text(errors="replace")
    for sign in ("Non-graceful", "left behind", "Exit timeout expired", "Signal (11)", "starting it again"):
        assert sign not in log_text, log_text[-3000:]
    assert not _processes(run_folder)
    assert not _regions(process)


def _error_of(stream: Iterator[Delta]) -> str:
    try:
        return f"ended with {sum(len(delta.output_ids) for delta in stream)} tokens"
    except UnavailableError as error:
        return str(error)


def _running(metrics_port: int) -> float:
    page = urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=PATIENCE_S).read().decode()
    found = re.search(r"^turbotriton_requests_running\{.*\} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_killed_server_leaves_no_process_and_no_shared_memory(served: "subprocess.Popen[bytes]", run_folder: Path) -> None:
    processes = _processes(run_folder)
    assert sum("triton_python_backend_stub" in command for command in processes.values()) >= 4
    server = next(pid for pid, command in processes.items() if "--model-repository=" in command)
    os.kill(server, signal.SIGKILL)
    assert served.wait(2 * PATIENCE_S) == signal.SIGKILL
    assert not _processes(run_folder)
    assert not _regions(served)


def test_serve_refuses_what_is_no_workspace_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "turbotriton", "serve", "tritonserver", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"turbotriton: error: {tmp_path} holds no model_repository: write one with 'turbotriton convert'"
    ]


@pytest.mark.parametrize("flag", ["--session-len=1", "--compute-dtype=fp8", "--max-batch-size=0", "--cache-block-seq-len=48"])
def test_serve_refuses_bad_engine_options_before_it_starts(flag: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "turbotriton", "serve", "tritonserver", str(tmp_path), flag]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert flag[2:].split("=")[0].replace("-", "_") in done.stderr
