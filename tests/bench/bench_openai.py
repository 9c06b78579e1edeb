"""The same work over gRPC and over the OpenAI server: how much time the latter adds.

    python tests/bench/bench_openai.py                                              # the demo model
    PYTHONPATH=src python3 tests/bench/bench_openai.py --shape 1.8b --concurrency 8 64 --num-prompts 64 --output-len 256

Starts tritonserver on the demo model, on random weights in the shape of a real one (--shape) or on a workspace (or takes --grpc
HOST:PORT), and `serve api_server` before it, then sends the same prompts with the same concurrency through one and the other, in turns,
`--repeats` times after a warm-up of each. A sample is the time from the first request to the last token; the answers are greedy and of
a fixed length. The ratio is that of each pair of neighbours; the table has its quantiles, and the CPU time that the OpenAI server spent.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from make_checkpoint import SHAPES, make_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers

from turbotriton import __version__
from turbotriton.cli.running_server import held_ports, served_path
from turbotriton.client.bench.load import run_load
from turbotriton.client.bench.targets import Address, Sampling, open_target
from turbotriton.client.bench.workload import Item, LengthRange, random_items
from turbotriton.converter.repository import Layout, door_templates, write_doors
from turbotriton.demo import checkpoint_path


def random_workspace(shape: str, root: Path) -> Path:
    """A workspace of random weights with a text door; token i is the word "wi"."""
    layout = Layout(root, shape, "text")
    write_doors(layout, door_templates(), model_name=shape, tp=1, chat_template=None)
    make_checkpoint(shape, layout.weights)
    vocab = {f"w{number}": number for number in range(SHAPES[shape].vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    layout.tokenizer.mkdir(parents=True)
    tokenizer.save(str(layout.tokenizer / "tokenizer.json"))
    (layout.tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": "w1", "eos_token": "w2"}))
    return root


@contextlib.contextmanager
def api_server(grpc_url: str, stream_interval: int) -> Iterator[tuple[str, int]]:
    """Its URL and pid."""
    with held_ports(1) as (port,):
        command = [sys.executable, "-m", "turbotriton", "serve", "api_server", grpc_url, "--server-port", str(port)]
        process = subprocess.Popen([*command, "--log-level", "warning", "--stream-interval", str(stream_interval)])
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
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sample_s(interface: str, url: str, items: list[Item], concurrency: int) -> float:
    async def run() -> float:
        async with open_target(interface, Address(url), Sampling()) as target:
            began = time.perf_counter()
            records = await run_load(target, items, concurrency)
            seconds = time.perf_counter() - began
        failed = [record.error for record in records if record.error is not None]
        assert not failed, failed[0]
        assert sum(record.num_output_tokens for record in records) == sum(item.max_tokens for item in items)
        return seconds

    return asyncio.run(run())


def measure(args: argparse.Namespace, grpc_url: str, concurrency: int) -> dict[str, object]:
    items = random_items(args.num_prompts, LengthRange.parse("32"), LengthRange.parse(str(args.output_len)), (16, 300), seed=0)
    times: dict[str, list[float]] = {"grpc": [], "openai": []}
    cpu: list[float] = []
    with api_server(grpc_url, args.stream_interval) as (url, pid):
        urls = {"grpc": grpc_url, "openai": url}
        for interface in urls:
            sample_s(interface, urls[interface], items, concurrency)
        for number in range(args.repeats):
            for interface in ("grpc", "openai") if number % 2 else ("openai", "grpc"):
                before = cpu_seconds(pid)
                times[interface].append(sample_s(interface, urls[interface], items, concurrency))
                if interface == "openai":
                    cpu.append(cpu_seconds(pid) - before)
    ratios = [ours / theirs for ours, theirs in zip(times["openai"], times["grpc"], strict=True)]
    num_tokens = sum(item.max_tokens for item in items)
    speed = num_tokens / statistics.median(times["grpc"])
    print(f"{concurrency:3} at once, {speed:.0f} tokens/s{'p20':>{40 - len(f'{speed:.0f}')}}{'p50':>10}{'p80':>10}")
    for name, values in (("grpc, s", times["grpc"]), ("openai, s", times["openai"]), ("openai / grpc", ratios)):
        print(f"{name:48}" + "".join(f"{value:10.3f}" for value in quantiles(values)))
    print(f"{'OpenAI server, us/token':48}" + "".join(f"{value / num_tokens * 1e6:10.1f}" for value in quantiles(cpu)))
    return {
        "concurrency": concurrency, "grpc_s": quantiles(times["grpc"]), "openai_s": quantiles(times["openai"]),
        "ratio": quantiles(ratios), "server_cpu_us_per_token": [value / num_tokens * 1e6 for value in quantiles(cpu)],
    }  # fmt: skip


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
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="engine option of what is served")
    parser.add_argument("--stream-interval", type=int, default=0, help="of serve api_server")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8])
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    flags = [f"--{option.replace('_', '-')}" for option in args.option]
    with contextlib.ExitStack() as stack:
        if args.grpc is None:
            if args.shape is not None:
                folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
                args.workspace = random_workspace(args.shape, Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))))
            args.grpc = stack.enter_context(served_path(args.workspace or checkpoint_path(), flags)).grpc
        found = [measure(args, args.grpc, concurrency) for concurrency in args.concurrency]
    result = {
        "bench": "openai", "model": args.shape or str(args.workspace or "demo"), "num_prompts": args.num_prompts,
        "output_len": args.output_len, "repeats": args.repeats, "stream_interval": args.stream_interval, "runs": found,
        "num_cpus": os.cpu_count(), "version": __version__, "commit": commit(),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
