"""The process that compiles ahead, as it is started, over a stand-in of triton's driver and of the steps."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from tests.backend.scheduling.fakes import model_config
from tests.bench.make_checkpoint import make_checkpoint

from turbotriton.backend.runner.precompile import mark_path, start_process
from turbotriton.contract.ini import EngineConfig

STEPS = """
import os, sys, types
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from turbotriton.backend.runner import all_steps, cuda_driver, precompile

@triton.jit
def double(x_ptr, num, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < num), mask=offs < num)

def run_all_steps(model, engine, weights_dir):
    assert engine.max_batch_size == 3
    for num in (16, 5):
        double[(1,)](torch.empty(16), num, BLOCK=16)

driver.set_active(types.SimpleNamespace(
    launcher_cls=lambda source, metadata: None,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
))
all_steps.run_all_steps = run_all_steps
precompile.gpu_to_compile_for = lambda engine: cuda_driver.Gpu("a GPU", 1 << 36)
sys.exit(precompile.main())
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    make_checkpoint("tiny", tmp_path / "weights", "fp32", 64)
    (tmp_path / "steps.py").write_text(STEPS)
    return ["--weights", str(tmp_path / "weights"), "--jobs", "2"]


def test_it_tells_how_many_kernels_there_are_and_of_each_that_is_compiled(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TURBOTRITON_MAX_BATCH_SIZE", "3")
    done = subprocess.run([sys.executable, str(tmp_path / "steps.py"), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n.."), done.stderr
    assert len(list((tmp_path / "cache").rglob("double.cubin"))) == 2


def test_it_ends_when_nobody_hears_it_any_more(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TURBOTRITON_MAX_BATCH_SIZE", "3")
    command = [sys.executable, str(tmp_path / "steps.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.close()  # as of an engine that is gone
    assert process.wait(60) != 0
    assert not list(tmp_path.glob("cache/**/double.cubin"))


def test_without_a_gpu_it_says_so(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "turbotriton.backend.runner.precompile", *arguments]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3] / "src"), "TURBOTRITON_DEVICE": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "there is no CUDA GPU here to compile kernels for" in done.stderr


def test_options_that_choose_no_kernel_leave_the_mark_as_it_is() -> None:
    model, engine = model_config(), EngineConfig(session_len=64)
    mark = mark_path(model, engine, "a GPU")
    for options in ({"schedule_policy": "lof"}, {"max_queued_requests": 5}, {"cache_max_entry_count": 0.5}):
        assert mark_path(model, dataclasses.replace(engine, **options), "a GPU") == mark
    for options in ({"max_batch_size": 5}, {"quant_policy": 8}, {"session_len": 65}):
        assert mark_path(model, dataclasses.replace(engine, **options), "a GPU") != mark


LOAD = """
import os, sys, triton
from pathlib import Path
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.contract import env
from turbotriton.contract.ini import read_workspace_config

found = {True: [], False: []}
triton.knobs.compilation.listener = lambda **about: found[bool(about["cache_hit"])].append(about["src"].name)
folder = Path(sys.argv[1])
workspace = read_workspace_config(folder / "config.ini")
ModelRunner(workspace.model_config(), workspace.engine_config(env.engine_option), folder)
print(len(found[True]), found[False], flush=True)
os._exit(0)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "int4", "int8"])
def test_what_it_compiled_is_all_that_loading_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    folder = tmp_path / "weights"
    make_checkpoint("tiny", folder, dtype, 512)
    for name, value in {"max_batch_size": "20", "session_len": "512", "cache_max_entry_count": "300"}.items():
        monkeypatch.setenv(f"TURBOTRITON_{name.upper()}", value)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    process = start_process(folder, 4)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    number, done = said.split(b"\n")
    assert len(done) == int(number) > 15
    loaded = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    hits, missed = loaded.stdout.split(" ", 1)
    assert missed == "[]\n"
    assert int(hits) > 15
