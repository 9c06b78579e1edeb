"""`turbotriton warmup WORKSPACE`: compiles ahead what serving it with these options needs, so that the first start is a quick one."""

import argparse
import subprocess
import time
from pathlib import Path

from turbotriton.contract import env
from turbotriton.contract.errors import ConfigError, InvalidInputError, ServerError

from .tritonserver import ENGINE_FLAGS, check_engine_options

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "warmup",
        help="compile a workspace's kernels ahead of time",
        description="Compile every kernel that serving WORKSPACE with these options needs into triton's cache (TRITON_CACHE_DIR, default "
        "~/.triton/cache), on the GPU that will serve it. No weights are read. Options must be those of the server: they choose kernels.",
    )
    parser.add_argument("workspace", type=Path, help="folder written by 'turbotriton convert'")
    parser.add_argument(
        "--jobs", type=int, default=None, help="processes that compile (default: what cores and GPU memory allow)"
    )
    parser.add_argument("--force", action="store_true", help="compile again what was compiled before")
    engine = parser.add_argument_group("engine", "override config.ini; unset: what config.ini says")
    for name, (kind, text) in ENGINE_FLAGS.items():
        engine.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError without a GPU, ServerError when a process fails."""
    from turbotriton.backend.runner.precompile import gpu_to_compile_for, mark_path, num_processes_for, start_process
    from turbotriton.backend.runner.weights import find_weights_dir
    from turbotriton.contract.ini import read_workspace_config

    if args.jobs is not None and args.jobs < 1:
        raise InvalidInputError(f"--jobs is {args.jobs}; it must be 1 or more")
    options = {name: str(value) for name in ENGINE_FLAGS if (value := getattr(args, name)) is not None}
    check_engine_options(options)
    weights = find_weights_dir(args.workspace)

    def option(name: str) -> str | None:
        return options.get(name) or env.engine_option(name)

    workspace = read_workspace_config(weights / "config.ini").with_model_options(option)
    model, engine = workspace.model_config(), workspace.engine_config(option)
    gpu = gpu_to_compile_for(engine)
    if gpu is None:
        raise ConfigError(f"kernels are compiled on a CUDA GPU; device is {engine.device!r}, and there is none")
    mark = mark_path(model, engine, gpu.name)
    if mark.exists() and not args.force:
        print(f"compiled already: {mark.parent} has all kernels of {args.workspace} with these options")
        return 0
    jobs = args.jobs or max(1, num_processes_for(model, engine, gpu.free_bytes))
    begun = time.monotonic()
    _watch(start_process(weights, jobs, options))
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    print(f"compiled in {time.monotonic() - begun:.1f} s by {jobs} processes into {mark.parent}")
    return 0


def _watch(process: "subprocess.Popen[bytes]") -> None:
    """A bar of the kernels that are compiled. Raises ServerError when the process fails."""
    from tqdm import tqdm

    from turbotriton.backend.runner.precompile import end_process

    assert process.stdout is not None
    try:
        with tqdm(total=int(process.stdout.readline() or 0), desc="compiling", unit="kernel") as bar:
            while process.stdout.read(1):
                bar.update()
        code = process.wait()
    finally:
        end_process(process)
    if code:
        raise ServerError(f"compiling ended with code {code}; the message stands above")
