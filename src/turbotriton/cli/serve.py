"""`turbotriton serve ...`: groups the server and its clients."""

import argparse
import importlib

__all__ = ["add_parser"]

#: Modules of this package, each with add_parser(subparsers).
SERVE_COMMANDS: tuple[str, ...] = ("tritonserver", "api_server", "api_client", "triton_client", "gradio_app")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("serve", help="run tritonserver on a workspace, or a client of one")
    children = parser.add_subparsers(title="serve commands", metavar="COMMAND", required=True)
    for name in SERVE_COMMANDS:
        importlib.import_module(f".{name}", __package__).add_parser(children)
