"""How long a start takes: from the start of the engine's process to its first token, with and without compiled kernels.

    PYTHONPATH=src python3 tests/bench/make_workspace.py --shape 8b --out /dev/shm/8b-workspace
    PYTHONPATH=src python3 tests/bench/bench_startup.py --workspace /dev/shm/8b-workspace

    cold      triton's cache is an empty folder
    warm      the same folder once more, --repeats times
    warmup    an empty folder that 'turbotriton warmup' fills, which is timed too; then a start

A start is `python -m turbotriton.backend.engine`, a connection to its socket and one request of 16 tokens in and 1 out. Weights come out
of the page cache: every file is read once before. What the engine's log says of its phases is printed with each start.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from turbotriton import __version__
from turbotriton.backend.engine.client import EngineClient
from turbotriton.backend.runner.weights import find_weights_dir
from turbotriton.contract.wire import GenerateRequest, SamplingParams, TokenDelta

GOALS = {"warm_s": 10.0, "cold_s": 25.0, "gb_s": 3.0}
TIMEOUT_S = 300.0
PHASES = re.compile(r"GB/s|CUDA graphs|compile|compiled|ready on|KV cache")
RATE = re.compile(r"([\d.]+) GB/s")


def start(weights: Path, cache: Path, options: dict[str, str]) -> dict[str, Any]:
    """Seconds to the socket and to the first token, and GB/s of the weights."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)} | {f"TURBOTRITON_{k.upper()}": v for k, v in options.items()}
    with tempfile.TemporaryDirectory(prefix="tt", dir="/tmp") as folder:
        socket_path = Path(folder) / "engine.sock"
        command = [sys.executable, "-m", "turbotriton.backend.engine", "--weights", str(weights), "--socket", str(socket_path)]
        begun = time.monotonic()
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        log: list[tuple[float, str]] = []
        reader = threading.Thread(target=_note, args=(process, begun, log))
        reader.start()
        try:
            client = _connect(process, socket_path, begun, log)
            ready_s = time.monotonic() - begun
            first: list[float] = []
            arrived = threading.Event()

            def take(delta: TokenDelta) -> None:
                first.append(time.monotonic() - begun)
                if delta.error is not None:
                    print(f"void: {delta.error}")
                arrived.set()

            sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
            client.submit(GenerateRequest(client.next_request_id(), tuple(range(3, 19)), sampling), take)
            if not arrived.wait(TIMEOUT_S):
                raise SystemExit("void: no token came")
            client.close()
            process.wait(60)
        finally:
            process.kill()
            reader.join()
    for at, line in log:
        if PHASES.search(line):
            print(f"    {at:6.2f} s  {line.split(': ', 1)[-1][:150]}")
    rates = [float(found.group(1)) for _, line in log if (found := RATE.search(line))]
    return {"ready_s": round(ready_s, 2), "first_token_s": round(first[0], 2), "gb_s": rates[0] if rates else None}


def _note(process: "subprocess.Popen[str]", begun: float, log: list[tuple[float, str]]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        log.append((time.monotonic() - begun, line.rstrip()))


def _connect(process: "subprocess.Popen[str]", path: Path, begun: float, log: list[tuple[float, str]]) -> EngineClient:
    while True:
        try:
            return EngineClient.connect(path)
        except OSError:
            if process.poll() is not None or time.monotonic() - begun > TIMEOUT_S:
                tail = "\n".join(line for _, line in log[-20:])
                raise SystemExit(f"the engine did not start (code {process.poll()}):\n{tail}") from None
            time.sleep(0.01)


def read_all(folder: Path) -> float:
    """Into the page cache. GB."""
    size = 0
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while data := file.read(2**24):
                size += len(data)
    return size / 1e9


def warmup(workspace: Path, cache: Path, options: dict[str, str]) -> float:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    begun = time.monotonic()
    command = [sys.executable, "-m", "turbotriton", "warmup", str(workspace), *flags]
    subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": str(cache)}, check=True)
    return round(time.monotonic() - begun, 2)


def measure(args: argparse.Namespace, options: dict[str, str]) -> dict[str, Any]:
    weights = find_weights_dir(args.workspace)
    results: dict[str, Any] = {"gb": round(read_all(weights), 2)}
    has_gpu = torch.cuda.is_available() and options.get("device") != "cpu"
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
        cache = Path(folder) / "cache"
        print("cold", flush=True)
        results["cold"] = start(weights, cache, options)
        runs = []
        for _ in range(args.repeats):
            print("warm", flush=True)
            runs.append(start(weights, cache, options))
        median = sorted(runs, key=lambda run: run["first_token_s"])[len(runs) // 2]
        results["warm"] = median | {"all": [run["first_token_s"] for run in runs]}
        if has_gpu and not args.no_warmup:
            filled = Path(folder) / "filled"
            print("warmup, then a start", flush=True)
            results["warmup_s"] = warmup(args.workspace, filled, options)
            results["after_warmup"] = start(weights, filled, options)
    rates = [run["gb_s"] for run in runs if run["gb_s"] is not None]
    results["gb_s"] = statistics.median(rates) if rates else None
    if has_gpu:
        warm_s, cold_s = results["warm"]["first_token_s"], results["cold"]["first_token_s"]
        results["meets_goals"] = warm_s <= GOALS["warm_s"] and cold_s <= GOALS["cold_s"] and results["gb_s"] >= GOALS["gb_s"]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, required=True, help="of make_workspace.py or 'turbotriton convert'")
    parser.add_argument("--repeats", type=int, default=3, help="warm starts (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="engine option, as in config.ini")
    parser.add_argument("--no-warmup", action="store_true", help="leave out 'turbotriton warmup'")
    args = parser.parse_args()
    options = {"max_batch_size": "256", "session_len": "8192"} | dict(option.split("=", 1) for option in args.option)
    results = measure(args, options)
    print(f"{'':14s}{'socket, s':>10s}{'first token, s':>16s}{'GB/s':>8s}")
    for name in ("cold", "warm", "after_warmup"):
        if name in results:
            row = results[name]
            print(f"{name:14s}{row['ready_s']:10.2f}{row['first_token_s']:16.2f}{row['gb_s'] or 0:8.2f}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    facts = {
        "bench": "startup", "workspace": args.workspace.name, "options": options, "num_cpus": os.cpu_count(), "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "version": __version__,
        "commit": commit.stdout.strip(),
    }  # fmt: skip
    print(json.dumps(facts | results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
