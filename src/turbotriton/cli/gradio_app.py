"""`turbotriton serve gradio X`: a chat page for a running tritonserver, or for a workspace or model that is served on the way."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turbotriton.contract.errors import InvalidInputError

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "gradio",
        help="serve a chat page",
        description="Serve a chat page. X is the address of a running tritonserver, or a workspace, or a model folder: then everything "
        "behind the page is started first and stopped with it. Nothing is sent to other hosts.",
    )
    parser.add_argument("target", metavar="X", help="HOST:PORT of tritonserver's gRPC, a workspace, or a model folder")
    parser.add_argument("--model", help="the text door's name (default: the only one that the server has)")
    parser.add_argument(
        "--server-name", default="127.0.0.1", help="address that the page listens on (default: %(default)s); 0.0.0.0: every one"
    )
    parser.add_argument("--server-port", type=int, default=6006, help="port that the page listens on (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from turbotriton.client.demo import serve_page

    with _served(args.target) as url:
        return serve_page(url, model=args.model, server_name=args.server_name, server_port=args.server_port)


@contextmanager
def _served(target: str) -> Iterator[str]:
    """The gRPC address behind the page: `target` itself, or that of a server which runs for as long as the page does."""
    from .running_server import served_path

    path = Path(target)
    if path.is_dir():
        with served_path(path) as server:
            yield server.grpc
    elif "/" in target or ":" not in target:
        raise InvalidInputError(
            f"{target}: is no folder here and no HOST:PORT; give a folder or the address of tritonserver's gRPC"
        )
    else:
        yield target
