"""No kernel is compiled while a request waits: what loading compiles is all that any request needs."""

import dataclasses
import itertools
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.backend.runner.launch_keys import NUM_SMS, noted_launches
from tests.bench.make_checkpoint import SHAPES, Shape, make_checkpoint

from turbotriton.backend.engine.engine import Engine
from turbotriton.backend.model.decoder import Decoder
from turbotriton.backend.ops import triton_column
from turbotriton.backend.ops.kernels.attention_tuning import decode_attention_config
from turbotriton.backend.runner import library_kernels, model_runner, piecewise_graphs, precompile
from turbotriton.backend.runner.all_steps import run_all_steps
from turbotriton.backend.runner.cuda_driver import Gpu
from turbotriton.backend.runner.decode_graphs import batch_buckets
from turbotriton.backend.runner.library_kernels import load_library_kernels
from turbotriton.backend.runner.model_runner import ModelRunner, most_tokens
from turbotriton.backend.runner.precompile import Precompilation
from turbotriton.backend.runner.warm_up import DECODE_COUNTS
from turbotriton.backend.runner.weights import DTYPES
from turbotriton.contract.ini import EngineConfig, ModelConfig, read_workspace_config
from turbotriton.contract.wire import GenerateRequest, SamplingParams

OPTIONS = {"max_batch_size": "20", "session_len": "512", "cache_max_entry_count": "300"}
MOST_TOKENS = 300  # of a product before serving
PROMPTS = (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 300, 500)
WAYS = (
    {"ignore_eos": True},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.5, "min_p": 0.1},
    {"repetition_penalty": 1.2},
    {"presence_penalty": 0.5, "temperature": 1.0},
    {"bad_sequences": ((5,), (6,), (7, 8))},
    {"logit_bias": ((3, 2.0),)},
    {"logit_bias": ((3, 2.0),), "temperature": 0.8, "frequency_penalty": 0.5},
    {"bad_sequences": ((5,),), "temperature": 1.0, "top_k": 3},
    {"bad_sequences": ((5,),), "temperature": 1.0, "top_p": 0.8},
    {"presence_penalty": 0.5, "logit_bias": ((3, 2.0), (4, 1.0))},
    {"repetition_penalty": 1.2, "logit_bias": ((3, 2.0),), "temperature": 0.9, "top_k": 7, "top_p": 0.9},
    {"repetition_penalty": 1.2, "temperature": 0.9, "top_p": 0.9},
    {"num_logprobs": 3},
    {"min_new_tokens": 3, "stop_token_ids": (4,)},
)


def serve_all_kinds(engine: Engine) -> None:
    """Prompts of odd sizes alone and together, every way to draw by one to three rows, chunks beside decodes, prefixes found again."""
    draw, ids = random.Random(3), itertools.count()

    def add(prompt_len: int, **way: object) -> None:
        prompt_len = min(prompt_len, engine.info(0).session_len - 12)
        prompt = tuple(draw.choices(range(3, 300), k=prompt_len)) if prompt_len % 3 else (7,) * prompt_len
        sampling = SamplingParams(**{"max_new_tokens": 6, "temperature": 0.0, **way})  # type: ignore[arg-type]
        engine.add("test", GenerateRequest(next(ids), prompt, sampling))

    def drain() -> None:
        while engine.has_work:
            engine.step()

    for prompt_len in PROMPTS:
        add(prompt_len)
        drain()
    for way, num_rows in itertools.product(WAYS, (1, 2, 3)):
        for _ in range(num_rows):
            add(20, **way)
        drain()
    for _ in range(12):
        add(301)  # several prompts, none the same, make one large step
    drain()
    for num_rows in (1, 2, 5, 9, 19):  # decodes beside one token that gives none: attention of their number is launched
        for _ in range(num_rows):
            add(9, ignore_eos=True)
        for _ in range(3):
            engine.step()
        add(1, max_new_tokens=0)
        drain()
    for index in range(60):
        how = {"ignore_eos": bool(index % 2), "temperature": float(draw.choice((0, 1))), "max_new_tokens": draw.randint(1, 30)}
        add(draw.choice((1, 2, 7, 30, 90, 400)), **how)
        for _ in range(draw.randint(0, 4)):
            engine.step()
    drain()


def make_engine(folder: Path, dtype: str, options: dict[str, str], load: Callable[..., ModelRunner] = ModelRunner) -> Engine:
    make_checkpoint("tiny", folder, dtype, 512)
    workspace = read_workspace_config(folder / "config.ini")
    model, config = workspace.model_config(), workspace.engine_config((OPTIONS | options).get)
    return Engine(model, config, load(model, config, folder), overlap=False)


def load_as_on_a_gpu(model, config, folder):  # type: ignore[no-untyped-def]
    """What a runner does there after it has its weights."""
    runner = ModelRunner(model, config, folder)
    if config.cuda_graphs:
        with torch.inference_mode():
            parts = (runner._decoder, runner._slots, runner._kv, config.max_batch_size, torch.device("cpu"))
            runner._graphs = model_runner.DecodeGraphs(*parts)
            if isinstance(runner._kv.k[0], torch.Tensor):
                runner._prompt_graphs = model_runner.PromptGraphs(*parts[:3], config.session_len, torch.device("cpu"))
            most = most_tokens(config, "cuda")
            runner._piecewise_graphs = model_runner.PiecewiseGraphs(*parts[:3], most, torch.device("cpu"))
    runner.warm_up(config)
    if not config.deterministic:
        by_library = mock.patch.object(library_kernels, "_is_by_library", triton_column.is_by_library)  # as where x lies on a GPU
        with torch.inference_mode(), by_library:
            load_library_kernels(
                runner._decoder,
                torch.device("cpu"),
                DTYPES[runner.compute_dtype],
                min(MOST_TOKENS, most_tokens(config, "cuda")),
                config.max_batch_size,
                0 if runner._piecewise_graphs is None else runner._piecewise_graphs.max_tokens,
            )
    return runner


COMPUTE_DTYPES = {"int4": "fp16", "int8": "bf16", "fp8": "bf16"}
CASES = [
    pytest.param("bf16", {}, id="bf16"),
    pytest.param("bf16", {"max_batch_size": "3"}, id="few_slots"),
    pytest.param("int4", {"max_batch_size": "1", "session_len": "64"}, id="one_short_session"),
    pytest.param("bf16", {"max_batch_size": "140", "num_tokens_per_iter": "200"}, id="many_slots"),
    pytest.param("fp32", {}, id="fp32"),
    pytest.param("bf16", {"quant_policy": "8"}, id="kv_8_bit"),
    pytest.param("bf16", {"quant_policy": "4"}, id="kv_4_bit"),
    pytest.param("int4", {}, id="weights_4_bit"),
    pytest.param("int4", {"session_len": "100"}, id="short_sessions"),
    pytest.param("int8", {}, id="weights_8_bit"),
    pytest.param("fp8", {"quant_policy": "8"}, id="weights_fp8"),
    pytest.param("bf16", {"deterministic": "1"}, id="deterministic"),
    pytest.param("bf16", {"cuda_graphs": "0"}, id="no_graphs"),
]


@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_requests_need_no_kernel_variant_that_loading_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, options: dict[str, str]
) -> None:
    """By the keys that triton caches compiled kernels under; nothing is compiled or run here."""
    loaded, served = keys_of_loading_and_serving(tmp_path, monkeypatch, dtype, options)
    assert len(loaded) > 15
    assert len(served) > 10
    assert not served - loaded, "\n".join(map(str, sorted(served - loaded, key=str)))


def keys_of_loading_and_serving(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, options: dict[str, str], num_sms: int = NUM_SMS
) -> tuple[set[Any], set[Any]]:
    with noted_launches(monkeypatch, num_sms) as keys:
        shown = {"device": "cpu", "compute_dtype": COMPUTE_DTYPES.get(dtype, dtype), **options}
        engine = make_engine(folder, dtype, shown, load_as_on_a_gpu)
        loaded = set(keys)
        keys.clear()
        serve_all_kinds(engine)
        return loaded, set(keys)


@pytest.mark.slow
@pytest.mark.parametrize("num_sms", [24, 32])
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_so_it_is_where_layers_fill_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, num_sms: int) -> None:
    """A model whose layers have as many tiles as a small device has programs for: whole tiles, parts and equal shares."""
    monkeypatch.setitem(SHAPES, "tiny", Shape(1024, 2, 8, 4, 128, 2048, 320, 1e4))
    loaded, served = keys_of_loading_and_serving(tmp_path, monkeypatch, dtype, {}, num_sms)
    assert not served - loaded, "\n".join(map(str, sorted(served - loaded, key=str)))
    kernel = {"int4": "_hopper_w4a16_kernel", "int8": "_hopper_w8a8_kernel"}[dtype]
    forms = {(dict(key[1:])["HAS_SHARES"], dict(key[1:])["LEAVES_PARTS"]) for key in loaded if key[0] == kernel}
    assert {(False, False), (False, True)} <= forms


@pytest.mark.parametrize(("dtype", "options"), [("bf16", {}), ("bf16", {"quant_policy": "4"}), ("int4", {}), ("int8", {})])
def test_so_it_is_for_steps_of_more_tokens_than_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, options: dict[str, str]
) -> None:
    monkeypatch.setattr(piecewise_graphs, "MAX_SIZE", 128)
    monkeypatch.setattr(piecewise_graphs, "MAX_W4A16_SIZE", 128)
    steps: list[int] = []
    own = ModelRunner.launch
    monkeypatch.setattr(ModelRunner, "launch", lambda self, plan: steps.append(plan.num_tokens) or own(self, plan))
    options = {"num_tokens_per_iter": "4096", **options}
    loaded, served = keys_of_loading_and_serving(tmp_path, monkeypatch, dtype, options)
    assert max(steps) > 2048
    assert not served - loaded, "\n".join(map(str, sorted(served - loaded, key=str)))


@pytest.mark.parametrize("num_sms", [4, 12])
@pytest.mark.parametrize("graphs", ["0", "1"])
def test_so_it_is_where_few_decodes_show_every_form_of_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: str, num_sms: int
) -> None:
    loaded, served = keys_of_loading_and_serving(tmp_path, monkeypatch, "bf16", {"cuda_graphs": graphs}, num_sms)
    assert not served - loaded, "\n".join(map(str, sorted(served - loaded, key=str)))
    attention = [dict(key[1:]) for key in loaded if key[0] == "_split_kernel"]
    assert any(form["NUM_PARTS"] for form in attention) == (graphs == "1")
    assert len({(form["num_warps"], form["NUM_STAGES"], form["ONE_SPLIT"]) for form in attention}) > 2


@pytest.mark.parametrize("num_sms", [16, 20, 58, 78, 114, 132])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8, 32, 40])
@pytest.mark.parametrize("max_context", [64, 1024, 8192])
def test_some_numbers_of_decodes_show_every_form_of_attention(num_kv_heads: int, num_sms: int, max_context: int) -> None:
    def form(num_rows: int) -> Any:
        config = decode_attention_config(num_rows, num_kv_heads, 1, 128, 2, max_context, num_sms)
        return dataclasses.replace(config, num_splits=min(config.num_splits, 2))  # more are the same kernel

    warm = {form(size) for size in {*DECODE_COUNTS, *batch_buckets(256)} if size <= 256}
    assert {form(num_rows) for num_rows in range(1, 257)} <= warm


@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_compiling_ahead_leaves_loading_nothing_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, options: dict[str, str]
) -> None:
    compute_dtype = COMPUTE_DTYPES.get(dtype, dtype)
    make_checkpoint("tiny", tmp_path, dtype, 512)
    workspace = read_workspace_config(tmp_path / "config.ini")
    model = workspace.model_config()
    config = workspace.engine_config((OPTIONS | {"device": "cpu", "compute_dtype": compute_dtype, **options}).get)
    with noted_launches(monkeypatch) as keys:
        load_as_on_a_gpu(model, config, tmp_path)
        loaded = set(keys)
        keys.clear()
        for file in tmp_path.glob("*.weight"):
            file.unlink()  # they are not read
        run_all_steps(model, config, tmp_path)
    assert not loaded - keys, "\n".join(map(str, sorted(loaded - keys, key=str)))


def test_steps_before_serving_run_two_layers_and_serving_runs_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("tiny", tmp_path, "fp32", 512, layers=4)
    workspace = read_workspace_config(tmp_path / "config.ini")
    config = workspace.engine_config((OPTIONS | {"device": "cpu"}).get)
    runner = ModelRunner(workspace.model_config(), config, tmp_path)
    num_layers: list[int] = []
    own = Decoder.hidden_states

    def hidden_states(self: Decoder, *args: Any) -> Any:
        num_layers.append(len(self.weights.layers))
        return own(self, *args)

    monkeypatch.setattr(Decoder, "hidden_states", hidden_states)
    runner.warm_up(config)
    assert set(num_layers) == {2}
    num_layers.clear()
    engine = Engine(workspace.model_config(), config, runner, overlap=False)
    engine.add("test", GenerateRequest(0, (5, 6, 7), SamplingParams(max_new_tokens=2)))
    while engine.has_work:
        engine.step()
    assert set(num_layers) == {4}


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_triton_compiles_nothing_while_requests_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, options: dict[str, str]
) -> None:
    import triton

    engine = make_engine(tmp_path, dtype, options)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **how: compiled.append(how["repr"]) or False)
    serve_all_kinds(engine)
    engine.close()
    assert not compiled


@pytest.mark.parametrize(("code", "is_marked"), [(0, True), (3, False)])
def test_only_compilation_that_succeeded_leaves_a_mark(tmp_path: Path, code: int, is_marked: bool) -> None:
    mark = tmp_path / "cache" / "turbotriton-0"
    Precompilation(subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"]), mark).wait()
    assert mark.exists() == is_marked


def test_a_process_that_hangs_is_ended_and_the_engine_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "MAX_SECONDS", 0.2)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    Precompilation(process, tmp_path / "mark").wait()
    assert process.returncode != 0
    assert not (tmp_path / "mark").exists()


def tiny(folder: Path, **options: str) -> tuple[ModelConfig, EngineConfig, Path]:
    make_checkpoint("tiny", folder, "fp32", 64)
    workspace = read_workspace_config(folder / "config.ini")
    return workspace.model_config(), workspace.engine_config(options.get), folder


def started(precompilation: Precompilation) -> "subprocess.Popen[bytes] | None":
    assert precompilation._starting is not None
    precompilation._starting.join()
    return precompilation._process


def test_a_cpu_starts_no_process(tmp_path: Path) -> None:
    assert started(Precompilation.start(*tiny(tmp_path, device="cpu"))) is None


@pytest.fixture
def as_with_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, dict[str, str]]]:
    """How many processes each compilation has that is started, and which options. It sleeps."""
    asked: list[tuple[int, dict[str, str]]] = []

    def start_process(weights_dir: Path, num_processes: int, options: dict[str, str]) -> "subprocess.Popen[bytes]":
        asked.append((num_processes, options))
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(precompile, "gpu_to_compile_for", lambda engine: Gpu("a GPU", 1 << 36))
    monkeypatch.setattr(precompile, "start_process", start_process)
    monkeypatch.setattr(precompile.os, "sched_getaffinity", lambda pid: range(16))
    return asked


def test_what_was_compiled_before_starts_no_process(tmp_path: Path, as_with_a_gpu: list[tuple[int, dict[str, str]]]) -> None:
    model = tiny(tmp_path)
    first = Precompilation.start(*model, {"max_batch_size": "7", "use_logn_attn": "1", "backend": "turbomind"}.get)
    process = started(first)
    assert process is not None
    first.end()  # as a load that fails does
    assert process.returncode is not None
    mark = precompile.mark_path(*model[:2], "a GPU")
    mark.parent.mkdir()
    mark.touch()
    assert started(Precompilation.start(*model)) is None
    assert precompile.mark_path(*model[:2], "another GPU") != mark
    assert as_with_a_gpu == [(14, {"max_batch_size": "7", "use_logn_attn": "1"})]  # of 16 cores


def test_no_process_is_started_where_the_gpu_may_lack_memory(
    tmp_path: Path, as_with_a_gpu: list[tuple[int, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompile, "gpu_to_compile_for", lambda engine: Gpu("a GPU", precompile.CONTEXT_BYTES))
    assert started(Precompilation.start(*tiny(tmp_path))) is None
    assert as_with_a_gpu == []
