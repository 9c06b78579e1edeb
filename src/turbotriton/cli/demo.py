"""`turbotriton demo`: the whole path with the bundled model: convert, serve with tritonserver, ask, chat."""

import argparse
import sys
from pathlib import Path

from turbotriton.contract import env
from turbotriton.contract.errors import ServerError

from .running_server import running_server

__all__ = ["add_parser"]

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
    log_path = workspace.parent / "tritonserver.log"
    print(f"starting tritonserver (log: {log_path})", flush=True)
    try:
        with running_server(workspace, log_path) as server:
            print(f"tritonserver is ready: gRPC {server.grpc}, HTTP {server.http}", flush=True)
            return _talk(server.grpc, args)
    finally:
        print("tritonserver is stopped", flush=True)


def _convert() -> Path:
    """Every time anew: it takes a second, and never leaves a demo of another version."""
    from turbotriton.cli.main import main
    from turbotriton.demo import checkpoint_path

    workspace = env.cache_dir() / "demo" / "workspace"
    print(f"converting the bundled model into {workspace}", flush=True)
    workspace.parent.mkdir(parents=True, exist_ok=True)
    code = main(["convert", "demo", str(checkpoint_path()), "--dst-path", str(workspace), "--overwrite"])
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise ServerError("the bundled model could not be converted; see above")
    return workspace


def _talk(url: str, args: argparse.Namespace) -> int:
    from turbotriton.client.terminal import TerminalOptions, run_terminal

    print(f"\n>>> {args.question}", flush=True)
    code = run_terminal(url, TerminalOptions(once=args.question))
    if code or args.no_chat or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return code
    print()
    return run_terminal(url, TerminalOptions())
