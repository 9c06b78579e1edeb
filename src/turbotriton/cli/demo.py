"""`turbotriton demo`: the whole path with the bundled model: convert, serve with tritonserver, ask, chat."""

import argparse
import logging
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from turbotriton.contract import env
from turbotriton.contract.errors import ServerError

__all__ = ["add_parser"]

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 180.0
QUESTION = "Hello! What can you do?"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "demo",
        help="convert the bundled model, serve it with tritonserver, ask it, chat",
        description="Convert the bundled model into the cache, start tritonserver on free ports, ask one question over gRPC and, "
        "in a terminal, go on as a chat. Everything is stopped at the end.",
    )
    parser.add_argument("--question", default=QUESTION, help="what is asked first (default: %(default)s)")
    parser.add_argument("--no-chat", action="store_true", help="leave after the first answer, also in a terminal")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    workspace = _convert()
    http, grpc, metrics = _free_ports(3)
    log_path = workspace.parent / "tritonserver.log"
    print(f"starting tritonserver on gRPC port {grpc}, HTTP port {http} (log: {log_path})", flush=True)
    command = [sys.executable, "-m", "turbotriton", "serve", "tritonserver", str(workspace)]
    command += [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    with open(log_path, "wb") as log:
        # its own group: Ctrl-C in the chat stops an answer, not the server
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_ready(server, http, ("turbomind", "preprocessing", "postprocessing", "demo"), log_path)
        return _talk(f"localhost:{grpc}", args)
    finally:
        server.terminate()
        server.wait(90)
        print("tritonserver is stopped", flush=True)


def _convert() -> Path:
    """Every time anew: it takes a second, and never leaves a demo of another version."""
    from turbotriton.cli.main import main
    from turbotriton.demo import checkpoint_path

    workspace = env.cache_dir() / "demo" / "workspace"
    print(f"converting the bundled model into {workspace}", flush=True)
    workspace.parent.mkdir(parents=True, exist_ok=True)
    code = main(["convert", "demo", str(checkpoint_path()), "--dst-path", str(workspace), "--overwrite"])
    if code:
        raise ServerError("the bundled model could not be converted; see above")
    return workspace


def _wait_ready(server: "subprocess.Popen[bytes]", http_port: int, models: Sequence[str], log_path: Path) -> None:
    end = time.monotonic() + READY_TIMEOUT_S
    waiting = list(models)
    while waiting:
        if server.poll() is not None:
            raise ServerError(f"tritonserver did not start: {_last_error(log_path)} (log: {log_path})")
        if time.monotonic() > end:
            raise ServerError(f"{', '.join(waiting)} not ready after {READY_TIMEOUT_S:.0f} s (log: {log_path})")
        try:
            with urllib.request.urlopen(f"http://localhost:{http_port}/v2/models/{waiting[0]}/ready", timeout=2):
                waiting.pop(0)
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)


def _last_error(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").splitlines()
    marked = [line for line in lines if "error:" in line.lower()]
    return (marked or lines or ["it said nothing"])[-1].strip()


def _talk(url: str, args: argparse.Namespace) -> int:
    from turbotriton.client.terminal import TerminalOptions, run_terminal

    print(f"\n>>> {args.question}", flush=True)
    code = run_terminal(url, TerminalOptions(once=args.question))
    if code or args.no_chat or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return code
    print()
    return run_terminal(url, TerminalOptions())


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
