"""A real tritonserver for tests: ports of its own, ready per model, stopped without leftovers."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from turbotriton.cli.running_server import held_ports
from turbotriton.cli.server_runtime import find_server

READY_TIMEOUT_S = 120
#: 24.10's stub now and then reads an address that nobody wrote while it starts, and tritonserver goes down with it.
START_TRIES = 3
CRASHES = (-signal.SIGABRT, -signal.SIGBUS, -signal.SIGSEGV)
STOP_TIMEOUT_S = 120


class TritonServer:
    """tritonserver on `model_repository`. As a context manager: started, ready, and stopped with its leftovers asserted away.

    grpc_url: host:port;  http_url, metrics_url: http://...;  pid;  log_path;  shm_prefix: of its stubs' shared memory.
    `options`: engine options, config.ini keys.
    """

    def __init__(self, model_repository: Path, *, options: dict[str, str] | None = None) -> None:
        self.model_repository = model_repository
        self._options = options or {}
        self._held = contextlib.ExitStack()  # its ports, also between a stop and another start
        http, grpc, metrics = self._held.enter_context(held_ports(3))
        self._ports = {"http": http, "grpc": grpc, "metrics": metrics}
        self.http_url = f"http://127.0.0.1:{http}"
        self.grpc_url = f"127.0.0.1:{grpc}"
        self.metrics_url = f"http://127.0.0.1:{metrics}/metrics"
        self.shm_prefix = f"turbotriton_test_{os.getpid()}_{grpc}"
        self.folder = Path(tempfile.mkdtemp(prefix="turbotriton-server-"))
        self.log_path = self.folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def model_names(self) -> list[str]:
        return sorted(path.parent.name for path in self.model_repository.glob("*/config.pbtxt"))

    def start(self) -> Self:
        runtime = find_server()
        environment = runtime.environment | {f"TURBOTRITON_{name.upper()}": value for name, value in self._options.items()}
        environment |= {"TURBOTRITON_RUNTIME_DIR": str(self.folder / "run"), "OMP_NUM_THREADS": "1"}
        command = [
            str(runtime.binary),
            *runtime.arguments,
            f"--model-repository={self.model_repository}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            "--disable-auto-complete-config",
            "--exit-timeout-secs=10",
            *(f"--{name}-port={port}" for name, port in self._ports.items()),
            *(f"--{name}-address=127.0.0.1" for name in self._ports),
            "--model-control-mode=explicit",  # unload and load are then allowed
            *(f"--load-model={name}" for name in self.model_names),
        ]
        for num_left in reversed(range(START_TRIES)):
            with open(self.log_path, "wb") as log:
                self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                for name in self.model_names:
                    self.wait_model_ready(name)
                return self
            except BaseException:
                has_crashed = self._process.poll() in CRASHES
                self.end_processes()
                if not (has_crashed and num_left):
                    self._release()
                    raise
        raise AssertionError("the last try returns or raises")

    def wait_model_ready(self, name: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            assert self._process is not None
            code = self._process.poll()
            assert code is None, f"tritonserver ended with code {code} while loading:\n{self.log[-6000:]}"
            try:
                with urllib.request.urlopen(f"{self.http_url}/v2/models/{name}/ready", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise AssertionError(f"model {name} was not ready within {timeout_s} s:\n{self.log[-6000:]}")

    def model_config(self, name: str) -> dict[str, object]:
        with urllib.request.urlopen(f"{self.http_url}/v2/models/{name}/config", timeout=5) as reply:
            config: dict[str, object] = json.load(reply)
            return config

    def stop(self) -> None:
        """SIGTERM; asserts a clean exit, no process of ours left, no shared memory left."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.end_processes()
            raise AssertionError(f"tritonserver did not stop within {STOP_TIMEOUT_S} s:\n{self.log[-4000:]}") from None
        assert code in (0, -signal.SIGTERM), f"tritonserver ended with code {code}:\n{self.log[-4000:]}"
        end = time.monotonic() + 60
        while (left := self._leftovers()) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left, f"left behind after the stop: {left}"

    def processes(self) -> dict[int, bytes]:
        """pid -> command line of every process that was started with this server's runtime folder."""
        own_folder = f"TURBOTRITON_RUNTIME_DIR={self.folder / 'run'}\0".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if own_folder in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
        return found

    def _leftovers(self) -> list[str]:
        left = [str(path) for path in Path("/dev/shm").glob(f"*{self.shm_prefix}*")]
        return left + [f"pid {pid}: {command[:120]!r}" for pid, command in self.processes().items()]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.stop()
            else:  # the test failed already; its message matters more than a clean stop
                self.end_processes()
                print(self.log[-6000:])
        finally:
            self._release()

    def kill(self) -> None:
        """The server and all that it started, for good."""
        self.end_processes()
        self._release()

    def _release(self) -> None:
        self._held.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def end_processes(self) -> None:
        """Kills the server and all that it started: a stub of a killed server may never leave by itself."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for region in Path("/dev/shm").glob(f"*{self.shm_prefix}*"):
            region.unlink(missing_ok=True)
