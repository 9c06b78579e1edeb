"""The driver's calls by a stand-in of libcuda, and by the real one where there is a GPU."""

import ctypes
import gc
import subprocess
import sys

import pytest
import torch
import triton

from turbotriton.backend.runner.cuda_driver import Gpu, device_index, open_gpu
from turbotriton.backend.runner.quick_imports import quick_imports
from turbotriton.contract import env

MEMORY = (140 << 30) - 12345


class Driver:
    """One GPU of index 1; `failing`: the call that gives an error."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.called = failing, []

    def __getattr__(self, name):
        def call(*args):
            self.called.append(name)
            if name == self.failing:
                return 999
            if name == "cuDeviceGet":
                if args[1] != 1:
                    return 101
                args[0]._obj.value = 5
            elif name == "cuDeviceGetName":
                assert args[2].value == 5
                args[0].value = b"NVIDIA H200"
            elif name == "cuDevicePrimaryCtxRetain":
                assert args[1].value == 5
                args[0]._obj.value = 1 << 40
            elif name == "cuCtxPushCurrent_v2":
                assert args[0].value == 1 << 40
            elif name == "cuMemGetInfo_v2":
                args[0]._obj.value = MEMORY
            return 0

        return call


def test_a_context_is_made_and_left(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert open_gpu(1) == Gpu("NVIDIA H200", MEMORY)
    assert driver.called[0] == "cuInit"
    assert driver.called[-1] == "cuCtxPopCurrent_v2"


@pytest.mark.parametrize("failing", ["cuInit", "cuDevicePrimaryCtxRetain", "cuMemGetInfo_v2"])
def test_after_an_error_nothing_more_is_called(monkeypatch, failing):
    driver = Driver(failing)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert open_gpu(1) is None
    assert driver.called[-1] == failing


def test_no_such_device_is_none(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert open_gpu(0) is None


def test_no_driver_is_none(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert open_gpu(0) is None


@pytest.mark.gpu
def test_torch_shares_the_context():
    found = open_gpu(0)
    assert found is not None
    assert found.name == torch.cuda.get_device_name(0)
    assert 0 < found.free_bytes <= torch.cuda.mem_get_info(0)[1]
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:3", 3), ("cpu", None), ("cuda:x", None), ("mps", None)]
)
def test_a_device_option_names_a_gpu_or_none(name, index):
    assert device_index(name) == index


@pytest.mark.parametrize(
    "variables", [{}, {"TRITON_HOME": "/somewhere"}, {"TRITON_CACHE_DIR": "/cache", "TRITON_HOME": "/somewhere"}]
)
def test_the_cache_is_where_triton_has_it(monkeypatch, variables):
    for name in ("TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(env.triton_cache_dir()) == triton.knobs.cache_knobs().dir


def test_imports_are_not_searched_for_garbage_and_what_follows_is():
    assert gc.isenabled()
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_starts_compilation_imports_neither_torch_nor_triton():
    code = "import sys, turbotriton.backend.runner.precompile; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
