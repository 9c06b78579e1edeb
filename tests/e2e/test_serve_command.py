"""`turbotriton serve tritonserver` as a user runs it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from .server import free_ports

pytestmark = pytest.mark.e2e


def test_serve_answers_and_sigterm_stops_it_cleanly(demo_workspace: Path, tmp_path: Path) -> None:
    http, grpc, metrics = free_ports(3)
    command = [sys.executable, "-m", "turbotriton", "serve", "tritonserver", str(demo_workspace)]
    command += [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--session-len=512"]
    command += ["--log-verbose=0"]  # not ours: passed on
    log_path = tmp_path / "log"
    run_dir = tempfile.mkdtemp(prefix="tt-")  # a socket's path is short
    environment = os.environ | {"TURBOTRITON_RUNTIME_DIR": run_dir}
    with open(log_path, "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None, log_path.read_text()[-3000:]
            assert time.monotonic() < end, log_path.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/models/demo/ready", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    log_text = log_path.read_text(errors="replace")
    assert "Non-graceful" not in log_text, log_text[-2000:]
    assert not list(Path(run_dir).glob("*.sock"))


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
