"""What the way through tritonserver costs: the work `thr` of bench_engine.py in process, then by gRPC through both doors.

    PYTHONPATH=src python3 tests/bench/make_workspace.py --shape 1.8b --out /dev/shm/1.8b
    PYTHONPATH=src python3 tests/bench/bench_serving.py --workspace /dev/shm/1.8b

    in process   bench_engine.py's engine in a process of its own, which ends before the server starts
    text         256 streams at once to the text door, prompts as token ids, greedy, ignore_eos
    turbomind    the same through LMDeploy's token contract (one session a request)

Every way is warmed up by a quarter of the work. Of each: output tokens a second from the common start to the last token; the first token of
one request alone (128 in, 16 out), how much of that passed in the engine, and p50 of all first tokens on thr, from the common start. Who
comes first of prompts of 64 to 1024 tokens moves that p50 by 3 %, so there is `half`, too: when half of the prompt tokens had their
answer's first. The load comes from --clients processes.
A run is void when an answer has another number of tokens than asked, or a client process takes 70 % of a core or more.

--fake puts fake_engine.py in the engine's place, on both sides: the limits of doors, server and clients without a GPU.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_engine import lengths_of, make_engine, run, scaled
from fake_engine import make_fake_engine, take_engines_place
from make_workspace import make_workspace

from turbotriton import __version__
from turbotriton.backend.runner.weights import find_weights_dir
from turbotriton.cli.running_server import RunningServer, running_server
from turbotriton.contract.ini import read_workspace_config

HERE = Path(__file__).resolve().parent
DOORS = ("text", "turbomind")
SINGLE = (128, 16)
NUM_SINGLES = 11
MAX_CLIENT_SHARE = 0.7
START_DELAY_S = 0.2  # from the word to every client to their common start
METRICS_DELAY_S = 1.0  # until the page shows what has happened
GOALS = {"tok_s": 0.95, "first_p50": 1.05, "single_ms": 10.0}
OPTIONS = {"max_batch_size": "256", "session_len": "8192", "enable_prefix_caching": "0"}


class VoidError(Exception):
    """A run that counts for nothing, and why."""


@dataclass(frozen=True)
class Work:
    lengths: list[tuple[int, int]]
    warm_up: list[tuple[int, int]]
    vocab: int
    repeats: int


def work_of(args: argparse.Namespace, weights: Path) -> Work:
    lengths = lengths_of("thr")
    if args.scale != 1.0:
        lengths = scaled(lengths[: max(4, int(len(lengths) * args.scale * 4))], args.scale)
    vocab = read_workspace_config(weights / "config.ini").model_config().vocab_size
    return Work(lengths, scaled(lengths, 0.25), vocab, args.repeats)


def half_of_prompts(firsts: Sequence[tuple[float, int]]) -> float:
    """When the answers to half of all prompt tokens had begun. firsts: (time of the first token, tokens of its prompt)."""
    half, done = sum(tokens for _, tokens in firsts) / 2, 0
    for at, tokens in sorted(firsts):
        done += tokens
        if done >= half:
            return at
    raise ValueError("no prompts")


def summary(runs: Sequence[dict[str, float]], singles_ms: Sequence[float]) -> dict[str, Any]:
    rates = [found["tok_s"] for found in runs]
    cuts = statistics.quantiles(singles_ms, n=10, method="inclusive")
    return {
        "tok_s": round(statistics.median(rates), 1),
        "all": [round(rate, 1) for rate in rates],
        "first_p50_ms": round(statistics.median(found["first_p50_ms"] for found in runs), 2),
        "half_ms": round(statistics.median(found["half_ms"] for found in runs), 2),
        "single_ms": [round(value, 2) for value in (cuts[1], statistics.median(singles_ms), cuts[7])],  # p20, p50, p80
    }


# -- in process -------------------------------------------------------------------------------------------------------


def measure_in_process(args: argparse.Namespace, options: dict[str, str]) -> dict[str, Any]:
    """Runs in a child process, which prints this as its last line."""
    weights = find_weights_dir(args.workspace)
    work = work_of(args, weights)
    engine = make_fake_engine(weights, options.get) if args.fake else make_engine(weights, options)
    gc.collect()
    gc.freeze()  # as the engine's process does
    run(engine, work.warm_up, work.vocab, 0)
    runs = []
    for repeat in range(work.repeats):
        found = run(engine, work.lengths, work.vocab, args.seed + repeat)
        firsts = [(1000 * (first - found.begun), work.lengths[index][0]) for index, first in found.first.items()]
        rate = sum(found.tokens) / (found.times[-1] - found.begun)
        runs.append(
            {"tok_s": rate, "first_p50_ms": statistics.median(at for at, _ in firsts), "half_ms": half_of_prompts(firsts)}
        )
    singles = []
    for number in range(NUM_SINGLES):
        time.sleep(START_DELAY_S)  # as idle as a server's engine is before each of its own
        found = run(engine, [SINGLE], work.vocab, 1000 + number)
        singles.append(1000 * (found.first[0] - found.begun))
    engine.close()
    return summary(runs, singles)


def in_process(args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--in-process", *sys.argv[1:], "--workspace", str(args.workspace)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the engine in process ended with code {done.returncode}: its message stands above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- through the doors ------------------------------------------------------------------------------------------------


class Clients:
    """The load's processes."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, str(HERE / "serving_load.py")]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]

    def run(self, order: dict[str, Any]) -> tuple[list[list[float]], list[float]]:
        """([index, first, last, tokens, responses] of each request, share of a core of each process). Raises VoidError."""
        users = self._processes[: len(order["lengths"])]
        for number, process in enumerate(users):
            tell(process, order | {"mine": list(range(number, len(order["lengths"]), len(users)))})
        for process in users:
            hear(process)
        at = time.monotonic() + START_DELAY_S
        for process in users:
            tell(process, {"at": at})
        records: list[list[float]] = []
        shares = []
        for process in users:
            answer = hear(process)
            records += answer["records"]
            shares.append(answer["cpu_s"] / answer["wall_s"])
        wrong = [record for record in records if record[3] != order["lengths"][int(record[0])][1]]
        if wrong:
            raise VoidError(f"{len(wrong)} answers have another number of tokens than asked, such as {wrong[0]}")
        return records, shares

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


def tell(process: "subprocess.Popen[str]", message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def hear(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    answer: dict[str, Any] = json.loads(process.stdout.readline() or '{"error": "a client process ended"}')
    if "error" in answer:
        raise VoidError(answer["error"])
    return answer


def engine_firsts(metrics: str) -> tuple[float, float]:
    """Seconds from arrival to the first token that the engine itself has counted so far: their sum, how many."""
    time.sleep(METRICS_DELAY_S)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{metrics}/metrics", timeout=5) as reply:
        page = reply.read().decode()
    name = "turbotriton_time_to_first_token_seconds"
    total, count = (re.search(rf"^{name}_{part}\S* (\S+)$", page, re.MULTILINE) for part in ("sum", "count"))
    return (float(total[1]), float(count[1])) if total and count else (0.0, 0.0)


def measure_door(clients: Clients, server: RunningServer, door: str, model: str, work: Work, seed: int) -> dict[str, Any]:
    order = {"url": server.grpc, "door": door, "model": model, "vocab": work.vocab}
    clients.run(order | {"lengths": work.warm_up, "seed": 0})
    runs, shares, responses = [], [], 0.0
    for repeat in range(work.repeats):
        records, used = clients.run(order | {"lengths": work.lengths, "seed": seed + repeat})
        shares += used
        seconds = max(record[2] for record in records)
        tokens = sum(record[3] for record in records)
        responses = sum(record[4] for record in records) / seconds
        firsts = [(1000 * record[1], work.lengths[int(record[0])][0]) for record in records]
        p50 = statistics.median(at for at, _ in firsts)
        runs.append({"tok_s": tokens / seconds, "first_p50_ms": p50, "half_ms": half_of_prompts(firsts)})
    singles, before = [], engine_firsts(server.metrics)
    for number in range(NUM_SINGLES):
        records, _ = clients.run(order | {"lengths": [SINGLE], "seed": 1000 + number})
        singles.append(1000 * records[0][1])
    seconds, count = (after - earlier for after, earlier in zip(engine_firsts(server.metrics), before, strict=True))
    found = summary(runs, singles) | {"client_share": [round(share, 2) for share in shares], "responses_s": round(responses)}
    found["single_engine_ms"] = round(1000 * seconds / max(count, 1), 2)
    if max(shares) >= MAX_CLIENT_SHARE:
        raise VoidError(f"a client process took {max(shares):.0%} of a core: use more --clients; the numbers were {found}")
    return found


def process_cpu_s(folder: Path) -> dict[str, float]:
    """CPU seconds so far of the server, its stubs and the engine: of every process with this runtime folder in its environment."""
    marker, ticks, found = f"TURBOTRITON_RUNTIME_DIR={folder}\0".encode(), os.sysconf("SC_CLK_TCK"), {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and marker in (entry / "environ").read_bytes():
                command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                label = _label(command)
                if label is not None:
                    found[f"{label} {entry.name}"] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def _label(command: Sequence[str]) -> str | None:
    """None: a process that waits only."""
    program = Path(command[0]).name
    if program == "tritonserver":
        return program
    if program == "triton_python_backend_stub":
        return f"door {next((Path(part).parents[1].name for part in command if part.endswith('model.py')), '?')}"
    return "engine" if "turbotriton.backend.engine" in command else None


@contextlib.contextmanager
def served(args: argparse.Namespace, options: dict[str, str]) -> Iterator[tuple[RunningServer, Path]]:
    """The workspace behind tritonserver, and the runtime folder by which its processes are known."""
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
        folder = Path(name)
        os.environ["TURBOTRITON_RUNTIME_DIR"] = str(folder / "run")
        os.environ.update({f"TURBOTRITON_{name.upper()}": value for name, value in options.items()})
        if args.fake:
            take_engines_place(folder)
        log = folder / "server.log"
        try:
            with running_server(args.workspace, log) as server:
                yield server, folder / "run"
        except BaseException:
            print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
            raise


def through_doors(args: argparse.Namespace, options: dict[str, str]) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    weights = find_weights_dir(args.workspace)
    work = work_of(args, weights)
    served_name = next(
        path.parent.name
        for path in sorted((args.workspace / "model_repository").glob("*/config.pbtxt"))
        if path.parent.name not in ("turbomind", "preprocessing", "postprocessing")
    )
    models = {"text": served_name, "turbomind": "turbomind"}
    with served(args, options) as (server, runtime_dir), contextlib.closing(Clients(args.clients)) as clients:
        for door in args.doors.split(","):
            before, begun = process_cpu_s(runtime_dir), time.monotonic()
            try:
                results[door] = measure_door(clients, server, door, models[door], work, args.seed)
            except VoidError as error:
                results[door] = {"void": str(error)}
            after, wall = process_cpu_s(runtime_dir), time.monotonic() - begun
            used = {label: round(after[label] - before.get(label, 0.0), 2) for label in sorted(after)}
            results[door] |= {"wall_s": round(wall, 1), "cpu_s": {label: cpu for label, cpu in used.items() if cpu > 0.05}}
    return results


# -- the report -------------------------------------------------------------------------------------------------------


def add_shares(base: dict[str, Any], found: dict[str, Any]) -> None:
    found["of_in_process"] = round(found["tok_s"] / base["tok_s"], 3)
    found["first_p50_ratio"] = round(found["first_p50_ms"] / base["first_p50_ms"], 3)
    found["half_ratio"] = round(found["half_ms"] / base["half_ms"], 3)
    found["single_later_ms"] = round(found["single_ms"][1] - base["single_ms"][1], 2)
    found["meets_goals"] = (
        found["of_in_process"] >= GOALS["tok_s"]
        and found["first_p50_ratio"] <= GOALS["first_p50"]
        and found["single_later_ms"] <= GOALS["single_ms"]
    )


def print_table(results: dict[str, dict[str, Any]]) -> None:
    base = results["in process"]
    print(
        f"{'':12s}{'tok/s':>9s}{'share':>7s}{'first p50, ms':>15s}{'ratio':>7s}{'half, ms':>10s}{'ratio':>7s}"
        f"{'alone, ms':>11s}{'later':>7s}"
        f"{'engine':>8s}{'resp/s':>8s}  clients"
    )
    for name, found in results.items():
        if "void" in found:
            print(f"{name:12s}void: {found['void']}")
            continue
        if found is not base:
            add_shares(base, found)
        shares = found.get("client_share", [])
        print(
            f"{name:12s}{found['tok_s']:9.0f}{found.get('of_in_process', 1.0):7.3f}{found['first_p50_ms']:15.1f}"
            f"{found.get('first_p50_ratio', 1.0):7.3f}{found['half_ms']:10.1f}{found.get('half_ratio', 1.0):7.3f}"
            f"{found['single_ms'][1]:11.2f}{found.get('single_later_ms', 0.0):7.2f}"
            f"{found.get('single_engine_ms', found['single_ms'][1]):8.2f}{found.get('responses_s', 0):8d}"
            f"  {f'at most {max(shares):.0%} of a core each' if shares else ''}"
        )
    for name, found in results.items():
        if "cpu_s" in found:
            print(f"{name}: CPU seconds in {found['wall_s']} s: {', '.join(f'{k} {v}' for k, v in found['cpu_s'].items())}")


def facts(args: argparse.Namespace, options: dict[str, str]) -> dict[str, Any]:
    import torch

    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    model = read_workspace_config(find_weights_dir(args.workspace) / "config.ini").model_config().model_name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.fake else None
    return {
        "bench": "serving", "model": model, "fake": args.fake, "scale": args.scale, "clients": args.clients, "options": options,
        "gpu": gpu, "num_cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
        "version": __version__, "commit": commit,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, help="of make_workspace.py or 'turbotriton convert'; --fake makes its own")
    parser.add_argument("--doors", default=",".join(DOORS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="processes that the load comes from (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of thr; the median counts (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="engine option, as in config.ini")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the work, to try this program (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the prompts (default: %(default)s)")
    parser.add_argument("--fake", action="store_true", help="an engine that only keeps a GPU's time")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    options = OPTIONS | dict(option.split("=", 1) for option in args.option)
    with contextlib.ExitStack() as stack:
        if args.workspace is None:
            if not args.fake:
                parser.error("give --workspace, or --fake")
            args.workspace = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-serving-"))) / "workspace"
            make_workspace("1.8b", args.workspace, with_weights=False)
        if args.in_process:
            print(json.dumps(measure_in_process(args, options)))
            return 0
        results = {"in process": in_process(args)}
        print(f"in process: {results['in process']}", flush=True)
        results |= through_doors(args, options)
        print_table(results)
        print(json.dumps(facts(args, options) | results))
    return 1 if any("void" in found for found in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
