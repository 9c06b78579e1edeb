"""The benchmark programs run and say what they measured: on the CPU, on a tiny model, at a small scale."""

import functools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@functools.cache
def help_of(name: str) -> subprocess.CompletedProcess[str]:
    return program(name, "--help")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    made = program("make_checkpoint", "--shape", "tiny", "--out", str(folder), "--dtype", "fp32")
    assert made.returncode == 0, made.stderr
    return folder


def test_every_work_is_measured_after_the_comparison_with_the_reference(checkpoint: Path, tmp_path: Path) -> None:
    options = [f"--option={o}" for o in ("device=cpu", "cache_max_entry_count=400", "session_len=1024", "max_batch_size=32")]
    arguments = ["--model", str(checkpoint), "--scale", "0.03", "--trace", str(tmp_path), "--repeats", "1", *options]
    run = program("bench_engine", *arguments, "--work", "b1,d16,d64,d256,d8k,thr,prefill,itl")
    assert run.returncode == 0, run.stderr
    assert "greedy tokens equal the reference ops'" in run.stdout
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["scale"] == 0.03
    for work in ("b1", "d16", "d64", "d256", "d8k", "thr", "prefill"):
        assert found[work]["tok_s"] > 0, run.stdout
        assert "of_goal" not in found[work]  # a scaled work is not the work
        assert len((tmp_path / f"{work}.csv").read_text().splitlines()) > 1
    assert 0 < found["itl"]["itl_beside_p99_ms"] <= found["itl"]["itl_max_ms"], run.stdout


@pytest.mark.parametrize("quant_policy", [0, 4])
def test_decode_steps_are_timed_over_batches_and_contexts_and_drawn(checkpoint: Path, tmp_path: Path, quant_policy: int) -> None:
    given = {"device": "cpu", "cache_max_entry_count": 200, "session_len": 256, "quant_policy": quant_policy}
    options = [f"--option={name}={value}" for name, value in given.items()]
    arguments = [
        "--model",
        str(checkpoint),
        "--batch",
        "1,4",
        "--context",
        "16,64,100",
        "--rounds",
        "2",
        "--plots",
        str(tmp_path),
    ]
    run = program("sweep_steps", *arguments, *options)
    assert run.returncode == 0, run.stderr
    steps = json.loads(run.stdout.splitlines()[-1])["steps"]
    assert [(one["batch"], one["context"]) for one in steps] == [
        (batch, context) for batch in (1, 4) for context in (16, 64, 100)
    ]
    assert all(one["step_ms"] > one["limit_ms"] > 0 for one in steps)
    drawn = sorted(path.name.removeprefix("tiny").split("-")[-1] for path in tmp_path.iterdir())
    assert drawn == ["batch.svg", "context.svg", "roofline.svg"]
    assert all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in tmp_path.iterdir())


def test_a_choice_holds_inside_its_block_for_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    from sweep_steps import chosen

    from turbotriton.backend.ops import triton_column
    from turbotriton.backend.ops.kernels import hopper_row_linear, hopper_tuning, narrow_linear, tuning

    shape = (32, 4096, 4096, 2, 132)
    before = narrow_linear.narrow_linear_config(*shape)
    with chosen("MAX_NARROW_ROWS=0,narrow_linear_config.block_k=32,narrow_linear_config.num_stages=7"):
        found = narrow_linear.narrow_linear_config(*shape)
        assert (found.block_k, found.num_stages, found.block_n) == (32, 7, before.block_n)
        assert triton_column.MAX_NARROW_ROWS == 0
    assert narrow_linear.narrow_linear_config(*shape) == before
    assert triton_column.MAX_NARROW_ROWS == tuning.MAX_NARROW_ROWS > 0
    with chosen("hopper_row_config.num_stages=3,MIN_HOPPER_GATE_UP_ROWS=512"):
        assert hopper_row_linear.hopper_row_config(4096).num_stages == 3
        assert hopper_tuning.MIN_HOPPER_GATE_UP_ROWS == 512
    for wrong in ("no_such_config.block_k=1", "MAX_NARROW_ROWS.x=1", "narrow_linear_config=1"):
        with pytest.raises(ValueError, match="no constant and no field"), chosen(wrong):
            pass
    with chosen("narrow_linear_config.block_q=1"), pytest.raises(ValueError, match="NarrowLinearConfig has no block_q"):
        narrow_linear.narrow_linear_config(*shape)


@pytest.mark.slow
def test_a_start_is_timed_to_its_first_token(tmp_path: Path) -> None:
    made = program("make_workspace", "--shape", "tiny", "--dtype", "fp32", "--session-len", "1024", "--out", str(tmp_path / "it"))
    assert made.returncode == 0, made.stderr
    options = [f"--option={o}" for o in ("device=cpu", "cache_max_entry_count=40", "session_len=1024", "max_batch_size=4")]
    run = program("bench_startup", "--workspace", str(tmp_path / "it"), "--repeats", "1", *options)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for kind in ("cold", "warm"):
        assert 0 < found[kind]["ready_s"] <= found[kind]["first_token_s"]
    assert found["gb_s"] is not None
    assert "ready on cpu" in run.stdout  # the engine's own phases


@pytest.mark.slow
@pytest.mark.e2e
def test_the_way_through_tritonserver_is_measured_beside_the_engine_in_process(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    made = program("make_workspace", "--shape", "tiny", "--dtype", "fp32", "--session-len", "1024", "--out", str(workspace))
    assert made.returncode == 0, made.stderr
    options = [f"--option={o}" for o in ("device=cpu", "cache_max_entry_count=400", "session_len=1024", "max_batch_size=32")]
    arguments = ["--workspace", str(workspace), "--scale", "0.02", "--repeats", "1", "--clients", "2", *options]
    run = program("bench_serving", *arguments)
    found = json.loads(run.stdout.splitlines()[-1])
    for way in ("in process", "text", "turbomind"):
        assert "void" not in found[way] or "of a core" in found[way]["void"], run.stdout  # a busy machine's clients may pass 70 %
    if run.returncode == 0:
        for way in ("text", "turbomind"):
            assert found[way]["tok_s"] > 0, run.stdout
            assert found[way]["of_in_process"] > 0
            assert len(found[way]["client_share"]) == 2
            assert any(label.startswith("door") for label in found[way]["cpu_s"]), run.stdout


def test_half_of_the_prompts_does_not_depend_on_who_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    from bench_serving import half_of_prompts

    def firsts_of(*prompts_of_steps: Sequence[int]) -> list[tuple[float, int]]:
        return [(10.0 * step, tokens) for step, prompts in enumerate(prompts_of_steps, 1) for tokens in prompts]

    small, large = (250, 250, 250, 250), (1000,)
    orders = [
        firsts_of(*steps) for steps in ((small, large, small, large), (large, large, small, small), (small, small, large, large))
    ]
    assert len({statistics.median(at for at, _ in firsts) for firsts in orders}) == 3
    assert [half_of_prompts(firsts) for firsts in orders] == [20.0] * 3
    assert half_of_prompts([(3.0, 7)]) == 3.0
    with pytest.raises(ValueError, match="no prompts"):
        half_of_prompts([])


def test_a_trace_is_read_back_into_rows_and_keys_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    from bench_engine import lengths_of
    from plot_trace import decode_steps

    lengths = [(10, 4), (20, 6), (5, 3)]
    trace = [(9.0, 0), (9.0, 2), (9.0, 3), (1.0, 3), (2.0, 3), (3.0, 1), (4.0, 1)]
    assert decode_steps(trace, lengths) == [(1.0, 3, 12 + 22 + 6), (2.0, 3, 13 + 23 + 7), (3.0, 1, 24), (4.0, 1, 25)]
    with pytest.raises(ValueError, match="3 requests with 13 tokens"):
        decode_steps(trace[:-1], lengths)

    whole = lengths_of("thr")
    ends = [index // 20 + new for index, (_, new) in enumerate(whole)]  # twenty begin in a step
    tokens = [sum(index // 20 <= step < end for index, end in enumerate(ends)) for step in range(max(ends))]
    (tmp_path / "thr.csv").write_text("ms,tokens\n" + "".join(f"{2 + count / 100},{count}\n" for count in tokens))
    run = program("plot_trace", str(tmp_path / "thr.csv"), "--shape", "1.8b", "--plots", str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "241- 256" in run.stdout
    for name in ("1.8b-thr-rows.svg", "1.8b-thr-roofline.svg"):
        assert (tmp_path / name).read_text().count("<polyline") == 2


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--stream-interval", "4"], ["--fake", "--workers", "2", "--beside", str(ROOT / "src")]])
def test_the_openai_server_is_measured_beside_grpc(more: list[str]) -> None:
    work = ["--num-prompts", "4", "--output-len", "12", "--repeats", "1", "--concurrency", "1", "2"]
    options = ["--option", "device=cpu", "--option", "session_len=128", "--option", "cache_max_entry_count=16"]
    run = program("bench_openai", "--shape", "tiny", *work, *options, *more)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert [one["concurrency"] for one in found["runs"]] == [1, 2]
    assert all(value > 0 for one in found["runs"] for name in ("grpc_s", "openai_s", "ratio") for value in one[name])


@pytest.mark.slow  # each imports torch and triton: three quarters of a minute
@pytest.mark.parametrize(
    "name",
    [
        "bench_engine",
        "bench_openai",
        "bench_serving",
        "bench_startup",
        "make_checkpoint",
        "make_workspace",
        "plot_trace",
        "profile_step",
        "sweep_steps",
        "sweep_tiles",
        "bench_ops",
        "bench_quantized",
        "bench_auto_awq",
    ],
)
def test_help_names_the_command_line(name: str) -> None:
    shown = help_of(name)
    assert shown.returncode == 0, shown.stderr
    assert "usage" in shown.stdout


@pytest.mark.slow
def test_every_command_of_the_measurements_is_one_that_its_program_takes(tmp_path: Path) -> None:
    script = ROOT / "tests" / "gpu" / "measure.sh"
    parts = re.findall(r"^#     (\w+) {2,}", script.read_text(), re.MULTILINE)
    environment = os.environ | {"DRY": "1", "SHM": str(tmp_path / "shm")}
    command = ["bash", str(script), *parts, "to", str(tmp_path / "logs")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=True)
    assert sorted(path.stem for path in (tmp_path / "logs").iterdir()) == sorted(parts)
    lines = [line for line in run.stdout.splitlines() if "tests/bench/" in line]
    assert len(lines) > 15
    for line in lines:
        words = line[line.index("tests/bench/") :].split()
        shown = help_of(Path(words[0]).stem).stdout
        unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in shown]
        assert not unknown, line


def test_choices_of_4_bit_tiles_fit_every_layer_and_are_told_apart() -> None:
    plan = program("sweep_tiles", "w4a16", "--plan", "--rows", "1,16,64,256")
    assert plan.returncode == 0, plan.stderr
    lines = plan.stdout.splitlines()
    for rows in (1, 16, 64, 256):
        mine = [line for line in lines if line.startswith(f"x {rows}: ")]
        assert mine[0].startswith(f"x {rows}: today: ")
        assert len(mine) == len({line.partition(": programs")[0] for line in mine}) >= 10
    assert "does not fit" not in plan.stdout


@pytest.mark.parametrize("dtype", ["int4", "int8", "fp8"])
def test_a_random_workspace_of_every_weight_type_is_served(dtype: str, tmp_path: Path) -> None:
    made = program("make_checkpoint", "--shape", "tiny", "--out", str(tmp_path), "--dtype", dtype)
    assert made.returncode == 0, made.stderr
    options = [f"--option={o}" for o in ("device=cpu", "cache_max_entry_count=100", "session_len=512", "max_batch_size=8")]
    run = program(
        "bench_engine", "--model", str(tmp_path), "--no-check", "--work", "b1", "--scale", "0.05", "--repeats", "1", *options
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["b1"]["tok_s"] > 0


def test_auto_awq_is_timed_layer_by_layer() -> None:
    run = program("bench_auto_awq", "--shape", "tiny", "--layers", "2", "--samples", "3", "--seqlen", "64", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    assert len(json.loads(run.stdout.splitlines()[-1])["seconds"]) == 2


def test_instructions_of_a_kernel_are_counted_without_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.bench.count_instructions", "int8", "--set", "BLOCK_N=16", "maxnreg=128"]
    environment |= {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    row = json.loads(run.stdout.splitlines()[-1])["rows"][0]
    assert row["registers"] <= 128
    # a tile of 16 keys of 128 dims: 4 integer products, 8 of values
    assert (row["opcodes"]["IMMA"], row["opcodes"]["HMMA"]) == (4, 8)
    assert row["clocks"]["tensor"] == 4 * (4 + 8)
    assert row["clocks"]["issue"] == sum(row["opcodes"].values())
