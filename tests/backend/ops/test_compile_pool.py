"""Launches that are only noted, and forked processes that compile what they want. Triton's driver is a stand-in; nothing is launched."""

import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.target_info import cuda_capability_geq
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from turbotriton.backend.ops.kernels import compile_pool
from turbotriton.backend.ops.kernels.compile_pool import compile_all, gathered
from turbotriton.contract.errors import ServerError

TARGET = GPUTarget("cuda", 90, 32)
DEVICE = 77  # no other test's kernels are compiled for it


@triton.jit
def _add_kernel(x_ptr, num, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < num) + 1, mask=offs < num)


@gluon.jit
def _fill_kernel(x_ptr, BLOCK: gl.constexpr, layout: gl.constexpr):
    gl.store(x_ptr + gl.arange(0, BLOCK, layout=layout), gl.zeros([BLOCK], gl.float32, layout=layout))


@triton.jit
def _asking_kernel(x_ptr):
    if cuda_capability_geq(9, 0):
        tl.store(x_ptr, 1.0)


@triton.jit
def _wrong_kernel(x_ptr):
    tl.store(x_ptr, tl.no_such_function(1))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    """A driver for kernels that are never launched, and an empty cache. A launcher is a line in the file that is yielded."""
    launchers = tmp_path / "launchers"
    launchers.touch()

    def launcher_cls(source, metadata):
        with open(launchers, "a") as file:
            file.write(f"{source.fn.__name__} {os.getpid()} {metadata.num_warps}\n")

    made = types.SimpleNamespace(
        launcher_cls=launcher_cls,
        get_current_target=lambda: TARGET,
        get_current_device=lambda: DEVICE,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    before = driver._active
    driver.set_active(made)
    yield launchers
    driver.set_active(before)


def launch_some():
    x = torch.empty(64)
    for num in (64, 7, 64, 1):  # a multiple of 16, neither, again, and one: three variants
        _add_kernel[(1,)](x, num, BLOCK=64)
    _add_kernel[(1,)](x, 64, BLOCK=64, num_warps=8)
    _fill_kernel[(1,)](x, BLOCK=128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    return x


def test_each_variant_is_noted_once_and_memory_is_zeros():
    own = JITFunction._do_compile
    with gathered() as variants:
        assert launch_some().count_nonzero() == 0
        assert torch.empty_like(torch.ones(1000)).count_nonzero() == 0
    names = [variant.source.fn.__name__ for variant in variants]
    assert names == ["_add_kernel"] * 4 + ["_fill_kernel"]
    assert JITFunction._do_compile is own
    with gathered() as again:
        launch_some()
    assert len(again) == 5  # nothing was kept as if it had been compiled


def test_forked_processes_compile_each_variant_once_and_a_launch_finds_it(stand_in, monkeypatch, capfd):
    with gathered() as variants:
        launch_some()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # threads of torch beside a fork are expected
        compile_all(variants, 3, lambda: print(".", end="", flush=True))
    assert capfd.readouterr().out == "....."
    lines = [line.split() for line in stand_in.read_text().splitlines()]
    assert sorted(line[0] for line in lines) == ["_add_kernel"] * 4 + ["_fill_kernel"]
    assert str(os.getpid()) not in {line[1] for line in lines}
    hits = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **about: hits.append(about["cache_hit"]))
    for variant in variants:  # as the launch would: with its own source, target and options
        triton.compile(variant.source, target=variant.target, options=variant.options)
    assert hits == [True] * 5


def test_what_does_not_compile_is_said_and_keeps_nothing_else_from_it(stand_in, capfd):
    with gathered() as variants:
        _wrong_kernel[(1,)](torch.empty(1))
        launch_some()
    with pytest.raises(ServerError, match=r"codes \[1\]"):
        compile_all(variants, 1)
    assert "no_such_function" in capfd.readouterr().err
    assert len(stand_in.read_text().splitlines()) == 5


def test_what_is_forked_asks_no_device(stand_in, monkeypatch):
    with gathered() as variants:
        _asking_kernel[(1,)](torch.empty(1))
    for name in ("get_current_target", "get_current_device", "get_current_stream"):
        monkeypatch.setattr(driver.active, name, lambda *_: pytest.fail("CUDA was called"))
    compile_all(variants, 1)
    assert stand_in.read_text().startswith("_asking_kernel ")


def test_nothing_to_compile_forks_nothing(monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    compile_all([], 4)


def test_a_forked_process_that_dies_is_an_error(monkeypatch):
    with gathered() as variants:
        launch_some()
    monkeypatch.setattr(compile_pool.Variant, "compile", lambda variant: os._exit(9))
    with pytest.raises(ServerError, match=r"codes \[9, 9\]"):
        compile_all(variants, 2)
    assert sys.stdout is not None  # the parent goes on


NAMES = """
import sys, torch
from triton.runtime.jit import JITCallable
from turbotriton.backend.ops.table import ops_for
ops_for(torch.device("cuda"))
modules = [sys.modules[name] for name in sys.modules if name.startswith("turbotriton.backend.ops.kernels.")]
kernels = [value for module in modules for value in vars(module).values() if isinstance(value, JITCallable)]
print(len(kernels), [kernel.__name__ for kernel in kernels if kernel.hash is None])
"""


def test_all_kernels_have_their_keys_before_any_is_launched():
    """In whichever order a process launches them then, triton 3.6 finds what another has compiled. (Later releases find it anyway.)"""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", NAMES], env=environment, capture_output=True, text=True, check=True)
    number, unnamed = done.stdout.split(" ", 1)
    assert int(number) > 100
    assert unnamed == "[]\n"
