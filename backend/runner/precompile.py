"""Compiles a workspace's kernels into triton's cache in several processes, without reading its weights.

    python -m turbotriton.backend.runner.precompile --weights DIR --share I/N     one process: its share of the steps, on zeros

`turbotriton warmup` runs all shares ahead of time. An engine that finds no mark of that starts them itself, and they compile while it
reads its weights: compilation takes one processor core a kernel, and most of a cold start. What they leave out, the engine compiles.

    <triton's cache>/turbotriton-<key>      the mark; key: kernels' sources, versions, GPU, shapes and options
"""

import argparse
import dataclasses
import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from turbotriton.contract import env
from turbotriton.contract.errors import ConfigError, ServerError, TurbotritonError
from turbotriton.contract.ini import EngineConfig, ModelConfig, read_workspace_config

from .decode_graphs import batch_buckets
from .model_runner import ModelRunner, resolve_compute_dtype, resolve_device
from .warm_up import warm_up_plans
from .weights import DTYPES, empty_weights

__all__ = ["Precompilation", "compile_share", "mark_path", "num_processes_for", "num_steps", "start_process"]

logger = logging.getLogger(__name__)

MAX_PROCESSES = 8
CONTEXT_BYTES = 2**30  # of a process on the GPU, without its tensors
MAX_SECONDS = 300.0


def num_steps(engine: EngineConfig) -> int:
    """How often all shares together call `note_done`."""
    sizes, num_blocks = batch_buckets(engine.max_batch_size), -(-engine.session_len // engine.cache_block_seq_len)
    groups = sum(1 for _ in warm_up_plans(sizes, engine.session_len, engine.cache_block_seq_len, num_blocks))
    return groups + (len(sizes) if engine.cuda_graphs else 0)


def compile_share(
    model: ModelConfig,
    engine: EngineConfig,
    weights_dir: Path,
    share: int = 0,
    num_shares: int = 1,
    note_done: Callable[[], None] = lambda: None,
) -> None:
    """Runs every num_shares-th of the steps that loading a runner consists of, from the share-th on."""
    model = dataclasses.replace(model, num_layers=min(2, model.num_layers))  # the first has no residual, others are alike
    num_blocks = -(-engine.session_len // engine.cache_block_seq_len)
    device = resolve_device(engine.device)
    dtype = DTYPES[resolve_compute_dtype(engine.compute_dtype, model.float_type, device)]
    with torch.inference_mode():
        weights = empty_weights(model, weights_dir, device, dtype, for_kernels=True)
    small = dataclasses.replace(engine, cache_max_entry_count=float(num_blocks))
    runner = ModelRunner(model, small, weights_dir, weights=weights, prepare=False)
    if engine.cuda_graphs:
        for num_rows in batch_buckets(engine.max_batch_size)[share::num_shares]:
            runner.run_uncaptured(num_rows)
            note_done()
    runner.warm_up(engine, share, num_shares, note_done)
    runner.close()


def mark_path(model: ModelConfig, engine: EngineConfig) -> Path:
    """Raises ConfigError where the device is no GPU."""
    from turbotriton.backend.ops.kernels.compiled import cache_folder, triton_version

    device = resolve_device(engine.device)
    if device.type != "cuda":
        raise ConfigError(f"kernels are compiled on a CUDA GPU, and device is {engine.device!r} here: {device}")
    sources = sorted(Path(__file__).parents[1].glob("ops/**/*.py")) + sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    shapes = dataclasses.replace(engine, cache_max_entry_count=0.8, max_queued_requests=1, max_queued_tokens=1)
    for part in (triton_version, torch.__version__, torch.cuda.get_device_name(device), model, shapes):
        digest.update(repr(part).encode())
    return cache_folder() / f"turbotriton-{digest.hexdigest()[:16]}"


class Precompilation:
    """The processes that compile. `wait` before the GPU's memory is shared out: each holds some of it."""

    def __init__(self, processes: "list[subprocess.Popen[bytes]]", mark: Path | None) -> None:
        self._processes = processes
        self._mark = mark
        self._begun = time.monotonic()

    @classmethod
    def none(cls) -> "Precompilation":
        return cls([], None)

    @classmethod
    def start(cls, model: ModelConfig, engine: EngineConfig, weights_dir: Path) -> "Precompilation":
        """None are started without a GPU, when all was compiled before, or where memory for them may lack."""
        if resolve_device(engine.device).type != "cuda":
            return cls([], None)
        mark = mark_path(model, engine)
        num_processes = 0 if mark.exists() else num_processes_for(model, engine)
        if num_processes:
            logger.info("no kernel was compiled for this model yet: %d processes do it while the weights load", num_processes)
        return cls([start_process(weights_dir, share, num_processes) for share in range(num_processes)], mark)

    def wait(self) -> None:
        """What failed is said, and compiled by the engine."""
        codes = []
        for process in self._processes:
            try:
                codes.append(process.wait(max(0.0, self._begun + MAX_SECONDS - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        if any(codes):
            logger.warning("compiling ahead ended with codes %s: the engine compiles what is missing", codes)
        elif codes and self._mark is not None:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.touch()
            logger.info("kernels were compiled in %.1f s", time.monotonic() - self._begun)


def num_processes_for(model: ModelConfig, engine: EngineConfig) -> int:
    """As many as half of the cores and half of what memory is left beside the weights allow; 0: not even one."""
    free = torch.cuda.mem_get_info(resolve_device(engine.device))[0]
    vocabulary = 2 * 2 * model.vocab_size * model.hidden_size
    layer = 2 * (4 * model.hidden_size * model.num_heads * model.head_dim + 3 * model.hidden_size * model.inter_size)
    left = free - vocabulary - model.num_layers * layer
    logits = 4 * engine.max_batch_size * model.vocab_size * 4  # sampling over all slots
    each = CONTEXT_BYTES + vocabulary + 5 * layer + logits
    return max(0, min(MAX_PROCESSES, (os.cpu_count() or 2) // 2, left // 2 // each))


def start_process(
    weights_dir: Path, share: int, num_shares: int, options: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """options: config.ini keys to override, beside those of the environment. Its stdout is a pipe with a byte for each step done."""
    command = [sys.executable, "-m", __spec__.name, "--weights", str(weights_dir), "--share", f"{share}/{num_shares}"]
    environment = env.environment() | {env.ENGINE_OPTION_PREFIX + name.upper(): value for name, value in (options or {}).items()}
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder with config.ini")
    parser.add_argument("--share", required=True, metavar="I/N", help="which of how many")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        share, num_shares = (int(part) for part in args.share.split("/"))
        workspace = read_workspace_config(args.weights / "config.ini")
        model, engine = workspace.model_config(), workspace.engine_config(env.engine_option)
        if resolve_device(engine.device).type != "cuda":
            raise ServerError("there is no CUDA GPU here to compile kernels for")
        compile_share(model, engine, args.weights, share, num_shares, lambda: print(".", end="", flush=True))
    except TurbotritonError as error:
        print(f"turbotriton: error: {error}", file=sys.stderr)
        return error.exit_code
    sys.stderr.flush()
    os._exit(0)  # no teardown: the engine waits for this


if __name__ == "__main__":
    sys.exit(main())
