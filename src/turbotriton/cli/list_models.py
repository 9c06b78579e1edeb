"""`turbotriton list`: the names of the chat templates."""

import argparse

from turbotriton.contract.chat_templates import listed_template_names

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "list",
        help="print the names of the chat templates",
        description="Print the names of the chat templates, one a line: LMDeploy's of v0.3 and v0.4. They are good for MODEL_NAME of "
        "convert and --model-name; another name does as well where the checkpoint brings a template of its own.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    print("\n".join(listed_template_names()))
    return 0
