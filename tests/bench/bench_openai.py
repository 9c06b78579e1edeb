"""The same work over gRPC and over the OpenAI server: how much time the latter adds.

    python tests/bench/bench_openai.py                                              # the demo model
    PYTHONPATH=src python3 tests/bench/bench_openai.py --shape 1.8b --concurrency 8 64 --num-prompts 64 --output-len 256
    python tests/bench/bench_openai.py --shape 8b --fake --concurrency 1 8 16       # beside an engine that keeps a GPU's time

Starts tritonserver on the demo model, on random weights in the shape of a real one (--shape) or on a workspace (or takes --grpc
HOST:PORT), and `serve api_server` before it, then sends the same prompts with the same concurrency through one and the other, in turns,
`--repeats` times after a warm-up of each. A sample is the time from the first request to the last token; the answers are greedy and of
a fixed length. The ratio is that of each pair of neighbours; the table has its quantiles, and the CPU time that the OpenAI server spent.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvloop
from fake_engine import take_engines_place
from lean_client import LeanOpenAITarget
from make_checkpoint import SHAPES
from make_workspace import make_workspace

from turbotriton import __version__
from turbotriton.cli.running_server import held_ports, served_path
from turbotriton.client.bench.load import run_load
from turbotriton.client.bench.targets import Address, Sampling, Target, open_target
from turbotriton.client.bench.workload import Item, LengthRange, random_items
from turbotriton.demo import checkpoint_path


@contextlib.contextmanager
def api_server(grpc_url: str, options: list[str], source: Path | None) -> Iterator[tuple[str, int]]:
    """Its URL and pid. source: of another checkout, the folder with its package."""
    environment = os.environ if source is None else os.environ | {"PYTHONPATH": str(source)}
    with held_ports(1) as (port,):
        command = [sys.executable, "-m", "turbotriton", "serve", "api_server", grpc_url, "--server-port", str(port)]
        command += ["--log-level", "warning", *options]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_answer(url, process)
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _wait_answer(url: str, process: "subprocess.Popen[bytes]") -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        try:
            opener.open(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    sys.exit("the OpenAI server did not come up")


def cpu_seconds(pid: int) -> float:
    """Of a server and its workers."""
    total = 0.0
    for one in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def requests_by_worker(url: str) -> dict[str, float]:
    """pid -> requests answered so far; empty for a checkout whose server does not tell."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/metrics", timeout=30) as reply:
        found = re.findall(
            r'^turbotriton_openai_worker_requests_total\{pid="(\d+)"\} (\S+)$', reply.read().decode(), re.MULTILINE
        )
    return {pid: float(count) for pid, count in found}


@contextlib.asynccontextmanager
async def target_of(interface: str, url: str) -> AsyncIterator[Target]:
    """gRPC's by our own client, OpenAI's by one that costs as little."""
    if interface == "grpc":
        async with open_target(interface, Address(url), Sampling()) as target:
            yield target
        return
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/v1/models", timeout=30) as reply:
        model = json.load(reply)["data"][0]["id"]
    lean = LeanOpenAITarget(url, model, Sampling())
    yield lean
    await lean.close()


def sample_s(interface: str, url: str, items: list[Item], concurrency: int) -> float:
    async def run() -> float:
        async with target_of(interface, url) as target:
            began = time.perf_counter()
            records = await run_load(target, items, concurrency)
            seconds = time.perf_counter() - began
        failed = [record.error for record in records if record.error is not None]
        assert not failed, failed[0]
        assert sum(record.num_output_tokens for record in records) == sum(item.max_tokens for item in items)
        return seconds

    return uvloop.run(run())


def measure(args: argparse.Namespace, grpc_url: str, concurrency: int) -> dict[str, object]:
    num_prompts = max(args.num_prompts, 2 * concurrency)
    items = random_items(num_prompts, LengthRange.parse("32"), LengthRange.parse(str(args.output_len)), (16, 300), seed=0)
    sources = {"openai": None} | ({"beside": args.beside} if args.beside else {})
    times: dict[str, list[float]] = {"grpc": []} | {name: [] for name in sources}
    cpu: dict[str, list[float]] = {name: [] for name in sources}
    spread: list[list[float]] = []
    options = ["--stream-interval", str(args.stream_interval)]
    of_source = {"openai": [*options, "--workers", str(args.workers)], "beside": options}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(api_server(grpc_url, of_source[name], source)) for name, source in sources.items()}
        urls = {"grpc": grpc_url} | {name: url for name, (url, _) in servers.items()}
        while sum(count > 0 for count in requests_by_worker(urls["openai"]).values()) < args.workers:
            time.sleep(0.1)
        for number in range(-1, args.repeats):  # the first is the warm-up
            for name in list(urls) if number % 2 else list(urls)[::-1]:
                before = cpu_seconds(servers[name][1]) if name in servers else 0.0
                answered = requests_by_worker(urls[name]) if name == "openai" else {}
                seconds = sample_s("grpc" if name == "grpc" else "openai", urls[name], items, concurrency)
                if number >= 0:
                    times[name].append(seconds)
                    if name in servers:
                        cpu[name].append(cpu_seconds(servers[name][1]) - before)
                    if answered:
                        after = requests_by_worker(urls[name])
                        spread.append(sorted(after[pid] - answered.get(pid, 0) for pid in after))
    num_tokens = sum(item.max_tokens for item in items)
    speed = num_tokens / statistics.median(times["grpc"])
    print(
        f"{f'{concurrency:3} at once, {speed:.0f} tokens/s, load {os.getloadavg()[0]:.1f}':48}{'p20':>10}{'p50':>10}{'p80':>10}"
    )
    found: dict[str, object] = {"concurrency": concurrency, "grpc_s": show("grpc, s", times["grpc"])}
    for name in sources:
        ratios = [ours / theirs for ours, theirs in zip(times[name], times["grpc"], strict=True)]
        prefix = "" if name == "openai" else f"{name}_"
        found[f"{prefix}openai_s"] = show(f"{name}, s", times[name])
        found[f"{prefix}ratio"] = show(f"{name} / grpc", ratios)
        found[f"{prefix}server_cpu_us_per_token"] = show(
            f"{name}, us of CPU a token", [value / num_tokens * 1e6 for value in cpu[name]]
        )
    if args.workers != 1:
        print(f"{'requests of each worker, by sample':48}" + " ".join("/".join(f"{n:.0f}" for n in one) for one in spread))
        found["requests_by_worker"] = spread
    return found


def show(label: str, values: list[float]) -> list[float]:
    """Prints and returns the quantiles."""
    found = quantiles(values)
    print(f"{label:48}" + "".join(f"{value:10.3f}" for value in found))
    return found


def quantiles(values: list[float]) -> list[float]:
    """p20, p50, p80."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return [cuts[1], statistics.median(values), cuts[7]]


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--grpc", help="HOST:PORT of a tritonserver that runs already")
    what.add_argument("--workspace", type=Path, help="to serve (default: the demo model, converted)")
    what.add_argument("--shape", choices=list(SHAPES), help="to serve random weights of")
    parser.add_argument("--fake", action="store_true", help="of --shape, an engine that only keeps the time of an H200")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="engine option of what is served")
    parser.add_argument("--stream-interval", type=int, default=0, help="of serve api_server")
    parser.add_argument(
        "--workers", type=int, default=1, help="of serve api_server; the one of --beside takes as many as it does by itself"
    )
    parser.add_argument("--beside", type=Path, metavar="SRC", help="src of another checkout: its OpenAI server too, in turns")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8])
    parser.add_argument("--num-prompts", type=int, default=32, help="at least; two for each stream (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if args.fake and args.shape is None:
        parser.error("--fake needs the --shape whose time it is to take")
    flags = [f"--{option.replace('_', '-')}" for option in args.option]
    with contextlib.ExitStack() as stack:
        if args.grpc is None:
            if args.shape is not None:
                folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
                args.workspace = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))) / "workspace"
                make_workspace(args.shape, args.workspace, with_weights=not args.fake)
            if args.fake:
                take_engines_place(args.workspace.parent)
            args.grpc = stack.enter_context(served_path(args.workspace or checkpoint_path(), flags)).grpc
        found = [measure(args, args.grpc, concurrency) for concurrency in args.concurrency]
    result = {
        "bench": "openai", "model": args.shape or str(args.workspace or "demo"), "fake": args.fake, "num_prompts": args.num_prompts,
        "output_len": args.output_len, "repeats": args.repeats, "stream_interval": args.stream_interval,
        "workers": args.workers, "runs": found,
        "num_cpus": os.cpu_count(), "version": __version__, "commit": commit(),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
