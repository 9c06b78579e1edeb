"""`turbotriton bench` as a process against the real server, over each of tritonserver's interfaces."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from .metrics import settled
from .server import TritonServer

pytestmark = pytest.mark.e2e


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "turbotriton", "bench", *args], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("interface", ["grpc", "generate_stream"])
def test_bench_counts_what_the_engine_counts(demo_server: TritonServer, tmp_path: Path, interface: str) -> None:
    url = demo_server.grpc_url if interface == "grpc" else demo_server.http_url
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
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,16,3\n0.5,12,2\n2.0,20,4\n")
    done = bench(
        demo_server.grpc_url, "--dataset", "trace", "--dataset-path", str(trace), "--trace-speed", "2",
        "--output-dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "requests.csv").open()))
    assert [(row["num_input_tokens"], row["num_output_tokens"]) for row in rows] == [("16", "3"), ("12", "2"), ("20", "4")]
    assert [float(row["due_s"]) for row in rows] == [0, 0.25, 1.0]
    assert all(0 <= float(row["sent_s"]) - float(row["due_s"]) < 0.5 for row in rows)


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
