"""Options of every command that takes a MODEL_PATH: a hub id is as good as a folder there."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from turbotriton.contract.errors import InvalidInputError

if TYPE_CHECKING:
    from .running_server import RunningServer

__all__ = [
    "MODEL_FORMATS",
    "MODEL_PATH_HELP",
    "add_hub_options",
    "add_served_model_options",
    "resolve_model_path",
    "served_model",
]

MODEL_FORMATS = ("hf", "llama", "awq", "gptq", "smooth_quant", "fp8")
MODEL_PATH_HELP = "workspace, folder of a checkpoint, or hub id such as Qwen/Qwen1.5-1.8B-Chat"


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hub", "where MODEL_PATH is no local path")
    group.add_argument("--revision", help="branch, tag or commit of the hub's repository (default: its main branch)")
    group.add_argument("--download-dir", type=Path, help="folder for downloads (default: the hub client's cache)")


def resolve_model_path(model_path: str | Path, args: argparse.Namespace, *, config_only: bool = False) -> Path:
    """The local folder; downloads with a progress bar where it is a hub id. Raises CheckpointError.

    `config_only`: the configuration is enough.
    """
    from turbotriton.converter.hub import local_model_path

    return local_model_path(model_path, revision=args.revision, download_dir=args.download_dir, config_only=config_only)


def add_served_model_options(parser: argparse.ArgumentParser) -> None:
    """For commands whose X may be a running server, or a model that they serve themselves."""
    group = parser.add_argument_group("model", "where X is a checkpoint, which is converted first")
    group.add_argument("--model-name", help="name to convert and serve it under (default: the last part of X)")
    group.add_argument("--model-format", choices=MODEL_FORMATS, help="format of the checkpoint (default: by its files)")
    add_hub_options(parser)


@contextmanager
def served_model(args: argparse.Namespace, engine_flags: Sequence[str] = ()) -> "Iterator[RunningServer | None]":
    """A tritonserver on `args.target` for as long as the block runs; None where that is the address of one that runs already.

    Raises InvalidInputError for options that the address of a server leaves no use for.
    """
    from .running_server import served_path

    target: str = args.target
    if ":" in target and not Path(target).exists():
        unused = [f"--{name.replace('_', '-')}" for name in ("model_name", "model_format", "revision", "download_dir")
                  if getattr(args, name) is not None]  # fmt: skip
        if left_over := [*engine_flags, *unused]:
            raise InvalidInputError(
                f"{left_over[0]} is for a model that is served from here; {target} runs already: leave it out"
            )
        yield None
        return
    path = resolve_model_path(target, args)
    with served_path(path, engine_flags, model_name=args.model_name, asked=target, model_format=args.model_format) as server:
        yield server
