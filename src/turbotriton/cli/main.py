"""Entry point: builds the parser, runs the chosen sub-command, turns our errors into one line and an exit code."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from turbotriton import __version__
from turbotriton.contract.errors import TurbotritonError

from .help_format import CommandParser

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
    """Exit codes: 0 done, 1 failed while running, 2 wrong input or usage, 130 interrupted."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown and not getattr(args, "accepts_unknown", False):
        build_parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    args.unknown = unknown
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for name in ("httpx", "httpx2"):  # a line a request
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return int(args.run(args) or 0)
    except TurbotritonError as error:
        print(f"turbotriton: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1


if __name__ == "__main__":
    sys.exit(main())
