"""`turbotriton bench` as a process against the real server, over each of its interfaces and the OpenAI server."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .metrics import settled
from .openai_server import api_server
from .server import TritonServer

pytestmark = pytest.mark.e2e


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "turbotriton", "bench", *args], capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def urls(demo_server: TritonServer) -> Iterator[dict[str, str]]:
    """interface -> address."""
    with api_server(demo_server.grpc_url) as openai_url:
        yield {"grpc": demo_server.grpc_url, "generate_stream": demo_server.http_url, "openai": f"{openai_url}/v1"}


@pytest.mark.parametrize("interface", ["grpc", "generate_stream", "openai"])
def test_bench_counts_what_the_engine_counts(
    demo_server: TritonServer, urls: dict[str, str], tmp_path: Path, interface: str
) -> None:
    url = urls[interface]
    before = settled(demo_server, "turbotriton_generation_tokens_total")
    done = bench(
        url, "--interface", interface, "--num-prompts", "12", "--concurrency", "4", "--input-len", "8:24", "--output-len", "4:9",
        "--slo", "e2e=60000", "--warmup", "0", "--output-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())["summary"]
    rows = list(csv.DictReader((tmp_path / "requests.csv").open()))
    assert len(rows) == 12
    assert all(4 <= int(row["num_output_tokens"]) <= 9 and 8 <= int(row["num_input_tokens"]) <= 24 for row in rows)
    assert summary["output_tokens"] == sum(int(row["num_output_tokens"]) for row in rows)
    assert settled(demo_server, "turbotriton_generation_tokens_total") - before == summary["output_tokens"]
    assert summary["most_at_once"] == 4
    assert summary["goodput_requests_per_s"] == pytest.approx(summary["requests_per_s"])
    assert f"{summary['output_tokens_per_s']:.1f}" in done.stdout


def test_trace_is_replayed_with_its_arrival_times(demo_server: TritonServer, tmp_path: Path) -> None:
    """A busy machine may send late; one try of four is on time."""
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,16,3\n0.5,12,2\n2.0,20,4\n")
    delays = []
    for number in range(4):
        folder = tmp_path / str(number)
        done = bench(
            demo_server.grpc_url, "--dataset", "trace", "--dataset-path", str(trace), "--trace-speed", "2",
            "--output-dir", str(folder),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = list(csv.DictReader((folder / "requests.csv").open()))
        assert [(row["num_input_tokens"], row["num_output_tokens"]) for row in rows] == [("16", "3"), ("12", "2"), ("20", "4")]
        assert [float(row["due_s"]) for row in rows] == [0, 0.25, 1.0]
        delays.append([float(row["sent_s"]) - float(row["due_s"]) for row in rows])
        assert min(delays[-1]) >= 0
        if max(delays[-1]) < 0.5:
            return
    pytest.fail(f"sent later than due by {delays} s")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--dataset", "trace"], 2, "needs --dataset-path"),
        (["--input-len", "9:3"], 2, "invalid"),
        (["--slo", "speed=3"], 2, "invalid"),
        (["--dataset", "trace", "--dataset-path", "none.csv", "--request-rate", "3"], 2, "its own arrival times"),
        (["--model", "nobody"], 2, "nobody"),
        (["--id-range", "16:9000000"], 2, "vocabulary"),
    ],
)
def test_wrong_use_is_one_line(demo_server: TritonServer, args: list[str], code: int, words: str) -> None:
    done = bench(demo_server.grpc_url, *args)
    assert (done.returncode, words in done.stderr.splitlines()[-1]) == (code, True), done.stderr


def test_absent_server_is_named() -> None:
    done = bench("127.0.0.1:9")
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr.splitlines()[-1]
