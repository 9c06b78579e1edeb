"""Compiles a workspace's kernels into triton's cache in several processes, without reading its weights.

    python -m turbotriton.backend.runner.precompile --weights DIR --jobs N

        all steps that loading runs, over zeros and without launches: which kernel variants there are
        N forked processes: compile them, each once (ops/kernels/compile_pool.py)

`turbotriton warmup` runs this ahead of time. An engine that finds no mark of that starts it itself, and kernels are compiled while it reads
its weights: compilation takes one processor core a kernel, and most of a cold start. What is left out, the engine compiles.

    <triton's cache>/turbotriton-<key>      the mark; key: kernels' sources, versions, GPU, shapes and options
"""

import argparse
import contextlib
import dataclasses
import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from turbotriton.contract import env
from turbotriton.contract.errors import ConfigError, ServerError, TurbotritonError
from turbotriton.contract.ini import EngineConfig, ModelConfig, read_workspace_config

from .decode_graphs import batch_buckets
from .model_runner import ModelRunner, resolve_compute_dtype, resolve_device
from .weights import DTYPES, empty_weights

__all__ = ["Precompilation", "end_process", "mark_path", "num_processes_for", "run_all_steps", "start_process"]

logger = logging.getLogger(__name__)

MAX_PROCESSES = 16  # a few kernels take longer than all others divided among so many
SPARED_CORES = 2  # the engine's, which reads weights
CONTEXT_BYTES = 2**30  # of a process on the GPU, without its tensors
MAX_SECONDS = 300.0


def run_all_steps(model: ModelConfig, engine: EngineConfig, weights_dir: Path) -> None:
    """Everything that loading a runner launches, with a cache of one request and zeros for weights."""
    model = dataclasses.replace(model, num_layers=min(2, model.num_layers))  # the first has no residual, others are alike
    num_blocks = -(-engine.session_len // engine.cache_block_seq_len)
    device = resolve_device(engine.device)
    dtype = DTYPES[resolve_compute_dtype(engine.compute_dtype, model.float_type, device)]
    with torch.inference_mode():
        weights = empty_weights(model, weights_dir, device, dtype, for_kernels=True)
    small = dataclasses.replace(engine, cache_max_entry_count=float(num_blocks))
    runner = ModelRunner(model, small, weights_dir, weights=weights, prepare=False)
    if engine.cuda_graphs:
        for num_rows in batch_buckets(engine.max_batch_size):
            runner.run_uncaptured(num_rows)
    runner.warm_up(engine)
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
    """The process that compiles, if there is one. `wait` before the GPU's memory is shared out: it holds some of it."""

    def __init__(self, process: "subprocess.Popen[bytes] | None" = None, mark: Path | None = None) -> None:
        self._process = process
        self._mark = mark
        self._begun = time.monotonic()

    @classmethod
    def start(cls, model: ModelConfig, engine: EngineConfig, weights_dir: Path) -> "Precompilation":
        """None is started without a GPU, when all was compiled before, or where memory for it may lack."""
        if resolve_device(engine.device).type != "cuda":
            return cls()
        mark = mark_path(model, engine)
        num_processes = 0 if mark.exists() else num_processes_for(model, engine)
        if not num_processes:
            return cls()
        logger.info("no kernel was compiled for this model yet: %d processes do it while the weights load", num_processes)
        return cls(start_process(weights_dir, num_processes), mark)

    def wait(self) -> None:
        """What failed is said, and compiled by the engine."""
        if self._process is None:
            return
        try:
            code = self._process.wait(max(0.0, self._begun + MAX_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = end_process(self._process)
        if code:
            logger.warning("compiling ahead ended with code %d: the engine compiles what is missing", code)
        elif self._mark is not None:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.touch()
            logger.info("kernels were compiled in %.1f s", time.monotonic() - self._begun)


def num_processes_for(model: ModelConfig, engine: EngineConfig) -> int:
    """As many as there are cores but for the engine's. 0: half of what memory is left beside the weights does not do for zeros in the place
    of two layers."""
    free = torch.cuda.mem_get_info(resolve_device(engine.device))[0]
    vocabulary = 2 * 2 * model.vocab_size * model.hidden_size
    layer = 2 * (4 * model.hidden_size * model.num_heads * model.head_dim + 3 * model.hidden_size * model.inter_size)
    left = free - vocabulary - model.num_layers * layer
    logits = 4 * engine.max_batch_size * model.vocab_size * 4  # sampling over all slots
    if left // 2 < CONTEXT_BYTES + vocabulary + 5 * layer + logits:
        return 0
    return max(1, min(MAX_PROCESSES, len(os.sched_getaffinity(0)) - SPARED_CORES))


def start_process(weights_dir: Path, num_processes: int, options: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """options: config.ini keys to override, beside those of the environment. `end_process` ends it before its time.

    Its stdout is a pipe: a line with the number of kernels, then a byte for each that is compiled.
    """
    command = [sys.executable, "-m", __spec__.name, "--weights", str(weights_dir), "--jobs", str(num_processes)]
    environment = env.environment() | {env.ENGINE_OPTION_PREFIX + name.upper(): value for name, value in (options or {}).items()}
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)


def end_process(process: "subprocess.Popen[bytes]") -> int:
    """Kills it and all that it has forked, if it still runs. Its code."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder with config.ini")
    parser.add_argument("--jobs", type=int, required=True, help="processes that compile")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        workspace = read_workspace_config(args.weights / "config.ini")
        model, engine = workspace.model_config(), workspace.engine_config(env.engine_option)
        if resolve_device(engine.device).type != "cuda":
            raise ServerError("there is no CUDA GPU here to compile kernels for")
        from turbotriton.backend.ops.kernels.compile_pool import compile_all, gathered

        with gathered() as variants:
            run_all_steps(model, engine, args.weights)
        print(len(variants), flush=True)
        compile_all(variants, args.jobs, lambda: print(".", end="", flush=True))
    except TurbotritonError as error:
        print(f"turbotriton: error: {error}", file=sys.stderr)
        return error.exit_code
    sys.stderr.flush()
    os._exit(0)  # no teardown: the engine waits for this


if __name__ == "__main__":
    sys.exit(main())
