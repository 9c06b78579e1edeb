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
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from turbotriton.contract import env
from turbotriton.contract.errors import ServerError, TurbotritonError
from turbotriton.contract.ini import MODEL_OPTIONS, EngineConfig, ModelConfig, read_workspace_config

from .cuda_driver import Gpu, device_index, open_gpu
from .quick_imports import quick_imports

__all__ = ["Precompilation", "end_process", "gpu_to_compile_for", "mark_path", "num_processes_for", "start_process"]

logger = logging.getLogger(__name__)

MAX_PROCESSES = 16  # a few kernels take longer than all others divided among so many
SPARED_CORES = 2  # the engine's, which reads weights
CONTEXT_BYTES = 2**30  # of a process on the GPU, without its tensors
MAX_SECONDS = 300.0


def mark_path(model: ModelConfig, engine: EngineConfig, gpu_name: str) -> Path:
    sources = sorted(Path(__file__).parents[1].glob("ops/**/*.py")) + sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    shapes = dataclasses.replace(
        engine, cache_max_entry_count=0.8, max_queued_requests=1, max_queued_tokens=1, schedule_policy="fcfs"
    )
    for part in (_version("triton"), _version("torch"), gpu_name, model, shapes):
        digest.update(repr(part).encode())
    return env.triton_cache_dir() / f"turbotriton-{digest.hexdigest()[:16]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on a path without what pip writes beside it
        return "unknown"


def gpu_to_compile_for(engine: EngineConfig) -> Gpu | None:
    """None: the engine's device is no GPU, or torch was built for none."""
    index = device_index(engine.device)
    return None if index is None or _version("torch").endswith("+cpu") else open_gpu(index)


class Precompilation:
    """The process that compiles, if there is one. `wait` before the GPU's memory is shared out: it holds some of it."""

    def __init__(self, process: "subprocess.Popen[bytes] | None" = None, mark: Path | None = None) -> None:
        self._process = process
        self._mark = mark
        self._begun = time.monotonic()
        self._starting: threading.Thread | None = None

    @classmethod
    def start(
        cls,
        model: ModelConfig,
        engine: EngineConfig,
        weights_dir: Path,
        override: Callable[[str], str | None] = lambda name: None,
    ) -> "Precompilation":
        """Returns at once; a thread makes the GPU's context, and starts the process unless all was compiled before or memory may lack.

        override: what made `model` and `engine` other than config.ini says, as for `load_engine`.
        """
        names = (*MODEL_OPTIONS, *(field.name for field in dataclasses.fields(EngineConfig)))
        options = {name: text for name in names if (text := override(name)) is not None}
        started = cls()
        started._starting = threading.Thread(target=started._start, args=(model, engine, weights_dir, options), daemon=True)
        started._starting.start()
        return started

    def _start(self, model: ModelConfig, engine: EngineConfig, weights_dir: Path, options: Mapping[str, str]) -> None:
        gpu = gpu_to_compile_for(engine)
        if gpu is None:
            return
        mark = mark_path(model, engine, gpu.name)
        num_processes = 0 if mark.exists() else num_processes_for(model, engine, gpu.free_bytes)
        if num_processes:
            logger.info("no kernel was compiled for this model yet: %d processes do it while the weights load", num_processes)
            self._mark, self._process = mark, start_process(weights_dir, num_processes, options)

    def wait(self) -> None:
        """What failed is said, and compiled by the engine."""
        if self._starting is not None:
            self._starting.join()
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

    def end(self) -> None:
        """Of what loads and has failed: nobody needs the kernels now."""
        if self._starting is not None:
            self._starting.join()
        if self._process is not None:
            end_process(self._process)


def num_processes_for(model: ModelConfig, engine: EngineConfig, free_bytes: int) -> int:
    """As many as there are cores but for the engine's. 0: half of what memory is left beside the weights does not do for zeros in the place
    of two layers."""
    vocabulary = 2 * 2 * model.vocab_size * model.hidden_size
    layer = 2 * (4 * model.hidden_size * model.num_heads * model.head_dim + 3 * model.hidden_size * model.inter_size)
    left = free_bytes - vocabulary - model.num_layers * layer
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
        workspace = read_workspace_config(args.weights / "config.ini").with_model_options(env.engine_option)
        model, engine = workspace.model_config(), workspace.engine_config(env.engine_option)
        with ThreadPoolExecutor(1) as beside, quick_imports():
            gpu = beside.submit(gpu_to_compile_for, engine)
            from turbotriton.backend.ops.kernels.compile_pool import compile_all, gathered

            from .all_steps import run_all_steps
        if gpu.result() is None:
            raise ServerError("there is no CUDA GPU here to compile kernels for")
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
