"""Entry point: builds the parser, runs the chosen sub-command, turns our errors into one line and an exit code."""

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from turbotriton import __version__
from turbotriton.contract.errors import TurbotritonError

from .help_format import CommandParser
from .process_setup import set_up_logging

__all__ = ["main"]

#: Modules of this package in the order that `--help` lists them; each has add_parser(subparsers), which sets `run`.
COMMANDS: tuple[str, ...] = ("chat", "convert", "lite", "serve", "warmup", "demo", "bench", "plan", "list_models", "check_env")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="turbotriton",
        description="Convert a model, serve it with a stock tritonserver, chat with it.",
    )
    parser.add_argument("-v", "--version", action="version", version=f"turbotriton {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f".{name}", __package__).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed while running, 2 wrong input or usage, 130 interrupted, 143 terminated."""
    try:
        args = _parse(argv)
        set_up_logging()
        with _terminated_as_by_exit():
            return int(args.run(args) or 0)
    except TurbotritonError as error:
        print(f"turbotriton: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = build_parser().parse_known_args(argv)
    if unknown and not getattr(args, "accepts_unknown", False):
        build_parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    args.unknown = unknown
    return args


@contextmanager
def _terminated_as_by_exit() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that temporary folders and servers of ours go; commands that serve set their own handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


if __name__ == "__main__":
    sys.exit(main())
