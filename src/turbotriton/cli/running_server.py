"""A tritonserver of our own for as long as a command runs: `with running_server(workspace, log_path) as server: ...`."""

import logging
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from turbotriton.contract.errors import CheckpointError, ConfigError, ServerError

from .leftovers import end_with_parent

__all__ = ["RunningServer", "held_ports", "running_server", "served_path"]

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 600.0  # a large model is read from disk once
STOP_TIMEOUT_S = 90.0
START_TRIES = 3
#: Exit codes of `serve tritonserver` that are the signal which its server died of.
CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Addresses as HOST:PORT; every model of the workspace is ready."""

    grpc: str
    http: str
    metrics: str


@contextmanager
def running_server(workspace: Path, log_path: Path, options: Sequence[str] = ()) -> Iterator[RunningServer]:
    """Starts `turbotriton serve tritonserver` on free ports, waits until all its models are ready, stops it at the end.

    options: more flags of that command. The server's output goes to `log_path`. Raises ServerError with the log's last error
    when it does not come up.
    """
    with held_ports(3) as (http, grpc, metrics):
        command = [sys.executable, "-m", "turbotriton", "serve", "tritonserver", str(workspace), *options]
        command += [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
        models = sorted(path.parent.name for path in (workspace / "model_repository").glob("*/config.pbtxt"))
        process = _started(command, http, models, log_path)
        try:
            yield RunningServer(f"localhost:{grpc}", f"localhost:{http}", f"localhost:{metrics}")
        finally:
            _stop(process)


@contextmanager
def served_path(
    path: Path, options: Sequence[str] = (), *, model_name: str | None = None, asked: str = "", model_format: str | None = None
) -> Iterator[RunningServer]:
    """As `running_server`, for a workspace or for a model folder, which is converted into a temporary workspace first.

    asked: the path as the user wrote it (a hub id), whose last part is the name where `model_name` is None.
    Raises CheckpointError, ConfigError.
    """
    from turbotriton.converter.repository import is_workspace

    if not path.is_dir():
        raise CheckpointError(f"{path}: is no folder; give a workspace, a checkpoint's folder, or a hub id")
    with tempfile.TemporaryDirectory(prefix="turbotriton-serve-") as folder:
        if is_workspace(path):
            for name, value in (("model-name", model_name), ("model-format", model_format)):
                if value is not None:
                    raise ConfigError(
                        f"--{name} is {value!r}, but {path} is a workspace, whose conversion fixed it; leave it out"
                    )
            workspace = path
        else:
            name = model_name or re.sub(r"[^A-Za-z0-9._-]", "-", Path(asked or path).resolve().name).lstrip("._-") or "model"
            workspace = _converted(path, Path(folder) / "workspace", name, model_format)
        log_path = Path(folder) / "tritonserver.log"
        logger.info("starting tritonserver on %s (log: %s)", workspace, log_path)
        with running_server(workspace, log_path, options) as server:
            yield server


def _converted(model_path: Path, workspace: Path, name: str, model_format: str | None) -> Path:
    from turbotriton.converter.convert import ConvertOptions, convert_checkpoint

    logger.info("converting %s", model_path)
    convert_checkpoint(ConvertOptions(model_name=name, model_path=model_path, dst_path=workspace, model_format=model_format))
    return workspace


def _started(command: Sequence[str], http_port: int, models: Sequence[str], log_path: Path) -> "subprocess.Popen[bytes]":
    """The server, when all its models are ready.

    One that crashes before is started again, START_TRIES times in all: 24.10's stub now and then reads an address that nobody wrote, and
    tritonserver goes down with it. Raises ServerError.
    """
    for num_left in reversed(range(START_TRIES)):
        with open(log_path, "wb") as log:
            # its own group: Ctrl-C in a chat stops an answer, not the server
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent
            )
        try:
            _wait_ready(process, http_port, models, log_path)
        except BaseException as error:
            has_crashed = process.poll() in CRASHES
            _stop(process)
            if not (has_crashed and num_left and isinstance(error, ServerError)):
                raise
            logger.warning("tritonserver crashed while it started (signal %d); starting it again", process.returncode)
        else:
            return process
    raise AssertionError("the last try returns or raises")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    process.wait(STOP_TIMEOUT_S)


def _wait_ready(process: "subprocess.Popen[bytes]", http_port: int, models: Sequence[str], log_path: Path) -> None:
    end = time.monotonic() + READY_TIMEOUT_S
    waiting = list(models)
    with tqdm(total=len(models), desc="tritonserver", unit="model", file=sys.stderr, disable=None) as bar:
        while waiting:
            if (code := process.poll()) is not None:
                reason = f"it crashed (signal {code})" if code in CRASHES else _last_error(log_path)
                raise ServerError(f"tritonserver did not start: {reason} (log: {log_path})")
            if time.monotonic() > end:
                raise ServerError(f"{', '.join(waiting)} not ready after {READY_TIMEOUT_S:.0f} s (log: {log_path})")
            try:
                with urllib.request.urlopen(f"http://localhost:{http_port}/v2/models/{waiting[0]}/ready", timeout=2):
                    waiting.pop(0)
                    bar.update()
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
                bar.refresh()


def _last_error(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").splitlines()
    marked = [line for line in lines if "error:" in line.lower()]
    return (marked or lines or ["it said nothing"])[-1].strip()


@contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Free ports of 127.0.0.1 for servers that are started meanwhile; until the end of the block nobody else is given them.

    Each is bound by a socket that never listens. A server that sets SO_REUSEADDR, as tritonserver, uvicorn and gradio do, listens
    beside it; a program that asks the kernel for any free port gets another, and so does a connection for its own end.
    """
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", 0))
        yield [int(sock.getsockname()[1]) for sock in sockets]
