"""Options of every command that takes a MODEL_PATH: a hub id is as good as a folder there."""

import argparse
from pathlib import Path

__all__ = ["MODEL_FORMATS", "MODEL_PATH_HELP", "add_hub_options", "resolve_model_path"]

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
