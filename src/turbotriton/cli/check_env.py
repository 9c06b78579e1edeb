"""`turbotriton check_env`: what this machine has, and what is missing for what."""

import argparse
import importlib.metadata
import json
import pickle
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbotriton import __version__
from turbotriton.contract import env
from turbotriton.contract.errors import ConfigError, TurbotritonError

__all__ = ["add_parser", "collect", "missing"]

#: Distribution -> what does not work without it.
PACKAGES = {
    "torch": "everything but clients",
    "triton": "the kernels on a GPU",
    "transformers": "convert, chat and pipeline from a checkpoint",
    "tokenizers": "everything but clients",
    "gradio": "serve gradio",
    "fastapi": "serve api_server",
    "pydantic": "serve api_server",
    "tritonclient": "serve triton_client, serve gradio, serve api_server",
    "numpy": "everything",
    "safetensors": "convert",
    "huggingface_hub": "models by hub id",
}
MIN_SHARED_MEMORY_BYTES = 256 << 20
NOT_FOUND = "not found"
DUMP_SUFFIXES = (".json", ".yml", ".yaml", ".pkl")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "check_env",
        help="print what this machine has, and what is missing for what",
        description="Print versions, devices and tools of this machine, which ops run as kernels, and what is missing for what.",
    )
    parser.add_argument("--dump-file", type=Path, help="write the same to a file too: *.json, *.yml or *.pkl")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    path: Path | None = args.dump_file
    if path is not None and path.suffix not in DUMP_SUFFIXES:
        raise ConfigError(
            f"--dump-file {path}: ends in {path.suffix or 'nothing'!r}; it must be one of {', '.join(DUMP_SUFFIXES)}"
        )
    found = collect()
    for name, value in found.items():
        lines = value if isinstance(value, list) else str(value).splitlines()
        print(f"{name}: {lines[0]}" if len(lines) == 1 else f"{name}:" + "".join(f"\n  {line}" for line in lines))
    if path is not None:
        _dump(path, found)
        print(f"written to {path}")
    return 0


def collect() -> dict[str, Any]:
    """Name -> text or list of texts, in the order they are printed; the last is `missing`."""
    found: dict[str, Any] = {
        "turbotriton": __version__,
        "platform": f"{sys.platform}, {platform.platform()}",
        "python": sys.version.replace("\n", " "),
    }
    found |= {name: _version(name) for name in PACKAGES}
    found |= _devices()
    found |= {
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "CUDA_HOME": env.environment().get("CUDA_HOME") or NOT_FOUND,
        "nvcc": _last_line(["nvcc", "--version"]),
        "gcc": _first_line(["gcc", "--version"]),
        "tritonserver": _tritonserver(),
        "free shared memory": f"{shutil.disk_usage('/dev/shm').free / 2**20:.0f} MiB in /dev/shm",
    }
    found["missing"] = missing(found) or ["nothing"]
    return found


def missing(found: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is not there: what, and what does not work without it."""
    lines = [f"{name}: needed for {purpose}" for name, purpose in PACKAGES.items() if found[name] == NOT_FOUND]
    if not found["gpus"]:
        reason = "torch was built without CUDA" if found["torch CUDA build"] == NOT_FOUND else "torch sees no device"
        lines.append(f"a CUDA GPU ({reason}): needed for the kernels; the reference ops run on the CPU")
    elif found["gcc"] == NOT_FOUND:
        lines.append("gcc: needed for the kernels, triton compiles its launchers with it")
    if found["tritonserver"].startswith(NOT_FOUND):
        lines.append(f"tritonserver ({found['tritonserver']}): needed for serve tritonserver and demo")
    if shutil.disk_usage("/dev/shm").free < MIN_SHARED_MEMORY_BYTES:
        lines.append(
            f"shared memory: {MIN_SHARED_MEMORY_BYTES >> 20} MiB in /dev/shm are needed for tritonserver's Python backend "
            "(docker run --shm-size=1g)"
        )
    return lines


def _devices() -> dict[str, Any]:
    try:
        from turbotriton.backend.runner.device_facts import device_facts
    except ImportError as error:
        return {"gpus": [], "torch CUDA build": NOT_FOUND, "torch build": f"torch cannot be imported: {error}"}
    facts = device_facts()
    ops = {kind: names if isinstance(names, str) else ", ".join(names) or "none" for kind, names in facts.reference_ops.items()}
    return {
        "torch CUDA build": facts.cuda_build or NOT_FOUND,
        "gpus": [
            f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB ({gpu.free_bytes / 2**30:.1f} free), compute capability {gpu.capability}"
            for gpu in facts.gpus
        ],
        "ops on the reference, CUDA": ops["cuda"],
        "ops on the reference, CPU": ops["cpu"],
        "torch build": facts.build,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_FOUND


def _tritonserver() -> str:
    """Which one `serve tritonserver` would start; nothing is downloaded."""
    from .server_runtime import installed_server

    try:
        return installed_server()
    except TurbotritonError as error:
        return f"{NOT_FOUND}: {error}"


def _lines(command: Sequence[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n") if done.returncode == 0 else []


def _first_line(command: Sequence[str]) -> str:
    return next((line.strip() for line in _lines(command) if line.strip()), NOT_FOUND)


def _last_line(command: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(_lines(command)) if line.strip()), NOT_FOUND)


def _dump(path: Path, found: Mapping[str, Any]) -> None:
    """Raises ConfigError when the file cannot be written."""
    try:
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(dict(found)))
        elif path.suffix == ".json":
            path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            import yaml

            path.write_text(yaml.safe_dump(dict(found), sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--dump-file {path}: cannot be written ({error.strerror}); choose another path") from None
