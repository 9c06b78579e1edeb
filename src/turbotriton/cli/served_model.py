"""Options of commands whose X is a running server or a model that they serve themselves: engine and template by LMDeploy's names."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turbotriton.contract.errors import ConfigError, InvalidInputError

from .hub import MODEL_FORMATS, add_hub_options, resolve_model_path
from .running_server import RunningServer, served_path
from .template_options import add_template_options
from .tritonserver import add_engine_options, check_options

__all__ = ["add_served_model_options", "served_model"]

_CONVERSION = ("model_name", "model_format", "revision", "download_dir", "tp", "adapters", "max_prefill_iters")


def add_served_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", "where X is a checkpoint, which is converted first")
    group.add_argument("--model-name", help="name to convert and serve it under (default: the last part of X)")
    group.add_argument("--model-format", choices=MODEL_FORMATS, help="format of the checkpoint (default: by its files)")
    group.add_argument("--tp", type=int, help="GPUs; this version runs on 1")
    group.add_argument("--adapters", nargs="*", help="LoRA adapters; not part of this version")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="no effect: a checkpoint's code is neither needed nor run"
    )
    engine = add_engine_options(parser)
    engine.add_argument("--max-prefill-iters", type=int, help="1: prompts are always split by --num-tokens-per-iter")
    add_template_options(parser)
    add_hub_options(parser)


@contextmanager
def served_model(args: argparse.Namespace) -> Iterator[RunningServer | None]:
    """A tritonserver on `args.target` for as long as the block runs; None where that is the address of one that runs already.

    Raises InvalidInputError for options that the address of a server leaves no use for, ConfigError for values that cannot be had.
    """
    target: str = args.target
    flags = server_flags(args)
    if ":" in target and not Path(target).exists():
        unused = [f"--{name.replace('_', '-')}" for name in _CONVERSION if getattr(args, name) is not None]
        if left_over := [*flags, *unused]:
            name = left_over[0].partition("=")[0]
            raise InvalidInputError(f"{name} is for a model that is served from here; {target} runs already: leave it out")
        yield None
        return
    _refuse_what_is_not_there(args)
    check_options(args)
    path = resolve_model_path(target, args)
    with served_path(path, flags, model_name=args.model_name, asked=target, model_format=args.model_format) as server:
        yield server


def server_flags(args: argparse.Namespace) -> list[str]:
    """Those of `serve tritonserver` that were given, for its command line."""
    probe = argparse.ArgumentParser()
    add_engine_options(probe)
    add_template_options(probe)
    names = sorted(vars(probe.parse_args([])))
    return [f"--{name.replace('_', '-')}={value}" for name in names if (value := getattr(args, name)) is not None]


def _refuse_what_is_not_there(args: argparse.Namespace) -> None:
    if args.adapters:
        raise ConfigError(f"--adapters is {' '.join(args.adapters)!r}; LoRA adapters are not part of this version, merge them")
    if args.tp not in (None, 1):
        raise ConfigError(f"--tp is {args.tp}; this version runs on one device (a workspace of more ranks is joined at load)")
    if args.max_prefill_iters not in (None, 1):
        raise ConfigError(f"--max-prefill-iters is {args.max_prefill_iters}; it must be 1: use --num-tokens-per-iter")
