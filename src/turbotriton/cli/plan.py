"""`turbotriton plan MODEL`: what fits on a GPU, how fast it will be and how fast it can be at best, before anything is loaded."""

import argparse
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from turbotriton.contract.errors import InvalidInputError

from .hub import add_hub_options, resolve_model_path

if TYPE_CHECKING:
    from turbotriton.backend.capacity import ModelShape
    from turbotriton.contract.ini import ModelConfig
    from turbotriton.converter.raw_config import CheckpointConfig

__all__ = ["add_parser"]

BATCHES = (1, 4, 16, 64, 256)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from turbotriton.backend.capacity import GPUS, KV_BITS, WEIGHT_BITS

    parser = subparsers.add_parser(
        "plan",
        help="what fits on a GPU, and how fast it can be",
        description="Weights, KV tokens and sessions that fit, and the least time of prefill and decode by the roofline (bytes over "
        "bandwidth, operations over rate). Reads config files only.",
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder with config.json, a workspace, or a hub id")
    parser.add_argument("--gpu", choices=("auto", *GPUS), default="auto", help="auto: the one that nvidia-smi names")
    parser.add_argument("--tp", type=int, choices=(1, 2, 4, 8), default=1, help="GPUs that share the model")
    parser.add_argument("--quant", choices=tuple(WEIGHT_BITS), default="none", help="format of the linears' weights")
    parser.add_argument(
        "--quant-policy", type=int, choices=tuple(KV_BITS), default=0, help="KV cache: 0: 16 bit, 8: int8, 16: fp8, 4: int4"
    )
    parser.add_argument("--session-len", type=int, default=None, help="longest sequence in tokens (unset: the model's)")
    parser.add_argument(
        "--cache-max-entry-count", type=float, default=0.8, help="KV cache: share of the memory beside the weights"
    )
    parser.add_argument("--input-len", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of an answer")
    add_hub_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from turbotriton.backend.capacity import (
        GIB,
        GPUS,
        decode_step_s,
        expected_decode_step_s,
        expected_prefill_s,
        mean_context,
        plan,
        prefill_s,
    )

    for name in ("input_len", "output_len"):
        if getattr(args, name) < 1:
            raise InvalidInputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 1 or more")
    if not 0 < args.cache_max_entry_count < 1:
        raise InvalidInputError(f"--cache-max-entry-count is {args.cache_max_entry_count}; it must be between 0 and 1")
    gpu = GPUS[_gpu_here()] if args.gpu == "auto" else GPUS[args.gpu]
    model = read_model(resolve_model_path(args.model, args, config_only=True), args.session_len)
    fits = plan(model, gpu, tp=args.tp, quant=args.quant, quant_policy=args.quant_policy, cache_share=args.cache_max_entry_count)
    first_s = expected_prefill_s(model, gpu, args.input_len, tp=args.tp, quant=args.quant)
    print(f"{args.tp} x {gpu.title}, {gpu.memory / GIB:.1f} GiB each")
    print(f"  weights        {_size(fits.weight_bytes):>12} a GPU, linears {args.quant if args.quant != 'none' else '16 bit'}")
    print(
        f"  KV cache       {_size(fits.kv_bytes):>12} a GPU = {fits.kv_tokens} tokens = {fits.num_sessions} x {model.session_len}"
    )
    print(
        f"Expected, and at best (roofline; {'rates measured on this GPU' if gpu.is_measured else 'rates from the data sheet'}):"
    )
    best = args.input_len / prefill_s(model, gpu, args.input_len, tp=args.tp, quant=args.quant)
    print(
        f"  prefill        {args.input_len / first_s:8.0f} of {best:.0f} tokens/s, {args.input_len} tokens in {1e3 * first_s:.1f} ms"
    )
    context = mean_context(args.input_len, args.output_len)
    for batch in BATCHES:
        if batch > 1 and batch * (args.input_len + args.output_len) > fits.kv_tokens:
            print(f"  decode x {batch:<5} does not fit: {batch} x ({args.input_len} + {args.output_len}) tokens of KV cache")
            break
        step = (model, gpu, batch, context)
        step_s, best_s = (
            function(*step, tp=args.tp, quant=args.quant, quant_policy=args.quant_policy)
            for function in (expected_decode_step_s, decode_step_s)
        )
        print(f"  decode x {batch:<5} {batch / step_s:8.0f} of {batch / best_s:.0f} tokens/s, {1 / step_s:.0f} for each")
    return 0


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def read_model(path: Path, session_len: int | None) -> "ModelShape":
    """Sizes from a workspace's config.ini or a checkpoint's config.json. Raises InvalidInputError."""
    from turbotriton.backend.capacity import ModelShape
    from turbotriton.contract.ini import read_workspace_config
    from turbotriton.converter.repository import find_weights
    from turbotriton.converter.shape import read_shape

    if session_len is not None and session_len < 1:
        raise InvalidInputError(f"--session-len is {session_len}; it must be 1 or more")
    weights = find_weights(path)
    config: CheckpointConfig | ModelConfig
    if weights is None:
        config = read_shape(path)
        longest = config.max_position_embeddings or 2048
    else:
        workspace = read_workspace_config(weights / "config.ini")
        config, longest = workspace.model_config(), workspace.engine_config().session_len
    return ModelShape.of(config, session_len or longest)


def _gpu_here() -> str:
    """The row of GPUS that nvidia-smi's name belongs to. Raises InvalidInputError."""
    from turbotriton.backend.capacity import GPUS

    known = ", ".join(GPUS)
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        raise InvalidInputError(f"--gpu auto finds no GPU here (nvidia-smi); name one of {known}") from None
    name, _, memory = asked.stdout.splitlines()[0].rpartition(",")
    found = match_gpu(name, float(memory) / 1024)
    if found is None:
        raise InvalidInputError(f"--gpu auto: {name} is no GPU that plan knows; name the nearest of {known}")
    return found


def match_gpu(name: str, memory_gib: float) -> str | None:
    """name as nvidia-smi says it, such as "NVIDIA A100-SXM4-80GB" -> key of GPUS; the memory decides between equal names."""
    from turbotriton.backend.capacity import GIB, GPUS

    letters = name.lower().replace(" ", "").replace("-", "")
    fitting = [key for key in GPUS if key.split("-")[0] in letters]
    longest = max((len(key.split("-")[0]) for key in fitting), default=0)
    fitting = [key for key in fitting if len(key.split("-")[0]) == longest]
    return min(fitting, key=lambda key: abs(GPUS[key].memory / GIB - memory_gib), default=None)
