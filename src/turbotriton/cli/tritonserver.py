"""`turbotriton serve tritonserver WORKSPACE`: starts tritonserver on a workspace, stays in front of it, stops it cleanly."""

import argparse
import logging
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

from turbotriton.contract.errors import ConfigError, WorkspaceError
from turbotriton.contract.ini import EngineConfig

from .leftovers import (
    adopt_orphans,
    end_children,
    end_with_parent,
    engine_processes,
    remove_shared_memory,
    shared_memory_prefix,
    sweep_dead_regions,
)
from .preflight import check_passed_on, check_ports
from .server_runtime import ServerRuntime, find_server
from .template_options import add_template_options, template_config

__all__ = [
    "BACKENDS",
    "ENGINE_FLAGS",
    "add_engine_options",
    "add_parser",
    "check_engine_options",
    "check_options",
    "server_command",
]

logger = logging.getLogger(__name__)

#: Flags that become TURBOTRITON_* variables: name -> (type, help).
ENGINE_FLAGS: dict[str, tuple[type, str]] = {
    "session_len": (int, "most tokens in one sequence, prompt and answer"),
    "max_batch_size": (int, "most requests running at once"),
    "cache_max_entry_count": (float, "KV cache: share of free memory below 1, number of blocks from 1 on"),
    "cache_block_seq_len": (int, "tokens a KV block"),
    "num_tokens_per_iter": (int, "token budget of one step"),
    "compute_dtype": (str, "auto, fp16, bf16 or fp32"),
    "device": (str, "auto, cpu, cuda or cuda:N"),
    "quant_policy": (int, "keys and values: 8 (int8), 16 (fp8), 4 (int4), or 0 for 16 bit"),
    "enable_prefix_caching": (int, "1 or 0"),
    "cuda_graphs": (int, "1 or 0: steps on a GPU replay captured graphs"),
    "rope_scaling_factor": (float, "0: the model's own"),
    "use_logn_attn": (int, "1 or 0"),
    "backend": (str, "turbomind: our kernels, without a GPU the reference ops; pytorch: the reference ops on any device"),
    "deterministic": (int, "1 or 0: outputs do not depend on what else runs, to the bit; slower"),
    "schedule_policy": (str, "which waiting request of a priority is next: fcfs, or lof, the longest output of all that wait"),
    "max_queued_requests": (int, "requests that may wait before new ones are refused"),
    "max_queued_tokens": (int, "prompt tokens that may wait"),
}
#: Of these, what is no field of EngineConfig: they change the model.
MODEL_FLAGS = ("rope_scaling_factor", "use_logn_attn", "backend")
BACKENDS = ("turbomind", "pytorch")
UNLOAD_S = 10  # what tritonserver gets to unload its models, when the requests have had their time
KILL_AFTER_S = 30.0  # after that
GRACE_S = 5.0  # after the server: stubs leave within 3 s, the engine process within 2 s


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "tritonserver",
        help="start tritonserver on a workspace",
        description="Start tritonserver (from PATH, else the PyPI server runtime) on WORKSPACE/model_repository. "
        "Flags that are not listed here are passed on to tritonserver.",
        allow_abbrev=False,  # a flag of tritonserver's is never taken for the beginning of one of ours
    )
    parser.add_argument("workspace", type=Path, help="folder written by 'turbotriton convert' (or its model_repository)")
    parser.add_argument("--http-port", type=int, default=8000, help="HTTP port")
    parser.add_argument("--grpc-port", type=int, default=8001, help="gRPC port")
    parser.add_argument("--metrics-port", type=int, default=8002, help="metrics port")
    parser.add_argument("--host", default="127.0.0.1", help="address that HTTP, gRPC and metrics listen on")
    parser.add_argument(
        "--model-control-mode", choices=("none", "explicit", "poll"), default="none", help="who may load and unload models"
    )
    parser.add_argument(
        "--exit-timeout-secs",
        type=int,
        default=10,
        help="how long running requests may take at a stop; then they end with an error",
    )
    add_engine_options(parser)
    add_template_options(parser)
    parser.set_defaults(run=run, accepts_unknown=True)


def add_engine_options(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    engine = parser.add_argument_group("engine", "override config.ini (see docs/weights.md); unset: what config.ini says")
    for name, (kind, text) in ENGINE_FLAGS.items():
        engine.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=text)
    return engine


def check_options(args: argparse.Namespace) -> dict[str, str]:
    """Names and values of TURBOTRITON_* variables for the engine and template options that were given. Raises ConfigError."""
    options = {name: str(value) for name in ENGINE_FLAGS if (value := getattr(args, name)) is not None}
    check_engine_options(options)
    template = template_config(args)
    if template is not None:
        if template.makes_row:
            template.row()
        options["chat_template"] = template.to_json()
    return options


def run(args: argparse.Namespace) -> int:
    options = check_options(args)
    runtime = find_server()
    command = server_command(runtime, args)
    check_passed_on(runtime, args.unknown)
    check_ports(args.host, _ports(args), args.unknown)
    environment = runtime.environment | {f"TURBOTRITON_{name.upper()}": value for name, value in options.items()}
    logger.info("starting %s", shlex.join(command))
    sweep_dead_regions()
    adopt_orphans()
    process = subprocess.Popen(command, env=environment, preexec_fn=end_with_parent)
    return _wait(process, args.exit_timeout_secs)


def _ports(args: argparse.Namespace) -> dict[str, int]:
    return {"http": args.http_port, "grpc": args.grpc_port, "metrics": args.metrics_port}


def check_engine_options(options: dict[str, str]) -> None:
    """Refuses a bad value now and not in the engine's log. session_len: the real one is in config.ini, any valid one serves here."""
    values: dict[str, object] = {name: ENGINE_FLAGS[name][0](value) for name, value in options.items() if name not in MODEL_FLAGS}
    if not float(options.get("rope_scaling_factor", 0)) >= 0:
        raise ConfigError(f"rope_scaling_factor is {options['rope_scaling_factor']}; it must be 0 (the model's own) or positive")
    if options.get("use_logn_attn", "0") not in ("0", "1"):
        raise ConfigError(f"use_logn_attn is {options['use_logn_attn']}; it must be 0 or 1")
    if options.get("backend", BACKENDS[0]) not in BACKENDS:
        raise ConfigError(f"backend is {options['backend']!r}; it must be {' or '.join(BACKENDS)}")
    EngineConfig(**({"session_len": 2048} | values))  # type: ignore[arg-type]


def server_command(runtime: ServerRuntime, args: argparse.Namespace) -> list[str]:
    """Raises WorkspaceError when there is no model repository."""
    workspace: Path = args.workspace
    repository = workspace / "model_repository"
    if not repository.is_dir():
        if any(workspace.glob("*/config.pbtxt")):
            repository = workspace
        else:
            raise WorkspaceError(f"{workspace} holds no model_repository: write one with 'turbotriton convert'")
    return [
        str(runtime.binary),
        *runtime.arguments,
        f"--model-repository={repository.resolve()}",
        *(f"--{name}-port={port}" for name, port in _ports(args).items()),
        *(f"--{name}-address={args.host}" for name in _ports(args)),
        f"--model-control-mode={args.model_control_mode}",
        f"--exit-timeout-secs={args.exit_timeout_secs + UNLOAD_S}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix()}",
        *args.unknown,  # last: the user's word counts
    ]


def _wait(process: "subprocess.Popen[bytes]", requests_s: float) -> int:
    """Passes SIGINT and SIGTERM on and waits; then ends what the server left behind.

    A stop lets running requests go on for requests_s. Then the engine ends them: tritonserver 24.10 unloads no model that still
    answers, and crashes at its own timeout. A second signal kills.
    Returns the server's exit code, 0 when we were asked to stop.
    """
    asked: list[float] = []  # when

    def stop(number: int, _frame: object) -> None:
        asked.append(time.monotonic())
        process.send_signal(signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    is_drained = False
    try:
        while (code := _code_within(process, 0.5)) is None:
            stopping_s = time.monotonic() - asked[0] if asked else -1.0
            if stopping_s >= requests_s and not is_drained:
                is_drained = True
                for pid in engine_processes(process.pid):
                    os.kill(pid, signal.SIGTERM)
            if stopping_s > requests_s + UNLOAD_S + KILL_AFTER_S:
                logger.error("tritonserver did not stop within %.0f s; killing it", stopping_s)
                process.kill()
    finally:
        end_children(GRACE_S)
        remove_shared_memory()
        for number, handler in old.items():
            signal.signal(number, handler)
    return 0 if asked and code in (0, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL) else abs(code)


def _code_within(process: "subprocess.Popen[bytes]", timeout_s: float) -> int | None:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
