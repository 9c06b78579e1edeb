"""Writes down what triton's launcher in C is given, and compares launches that are known by their key with plain ones.

Triton's driver is a stand-in, on a device that no GPU test has. Everything above it is triton's own: what specialises arguments, the
compiler (for sm_90), and what makes descriptors.
"""

import itertools
import types
from contextlib import contextmanager

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from turbotriton.backend.ops.kernels import fast_launch
from turbotriton.backend.ops.kernels.fast_launch import forget_launches

DEVICES = itertools.count(1000)  # one a test: triton keeps what it compiled for a device, and its launcher


@contextmanager
def recorded_launches(monkeypatch):
    """What triton's launcher in C was given, launch by launch, descriptors as what they were made of."""
    launches, handles, number = [], itertools.count(1), next(DEVICES)

    def record(*args):
        launches.append(args)

    def fill(address, *description):
        device_driver.num_descriptors += 1
        return "descriptor", address, *(tuple(part) if isinstance(part, (list, torch.Size)) else part for part in description)

    device_driver = types.SimpleNamespace(
        num_descriptors=0,
        stream=7,
        launcher_cls=nvidia.CudaLauncher,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: number,
        get_current_stream=lambda device: device_driver.stream,
        utils=types.SimpleNamespace(
            launch=record,
            fill_tma_descriptor=fill,
            fill_tma_descriptor_tiled=fill,
            build_signature_metadata=tuple,
            load_binary=lambda *args: (object(), next(handles), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132},
            unload_module=lambda module: None,
        ),
    )
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: types.SimpleNamespace(launch=record), raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", lambda: [])
    for name in ("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):
        monkeypatch.setattr(nvidia, name, lambda nested_tuple, type: type, raising=False)
    before = driver._active
    driver.set_active(device_driver)
    forget_launches()
    try:
        yield types.SimpleNamespace(all=launches, driver=device_driver)
    finally:
        forget_launches()
        driver.set_active(before)


def plain(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(fast_launch, "TAKEN", ())
        run()


def as_numbers(given):
    """Tensors as their addresses, chains of hooks as the nothing that they call: what triton's launcher in C reads of them."""
    flat = []
    for each in given:
        if isinstance(each, torch.Tensor):
            flat.append(each.data_ptr())
        elif isinstance(each, (tuple, list)) and not (each and each[0] == "descriptor"):
            flat.append(as_numbers(each))
        elif isinstance(each, triton.knobs.HookChain) or type(each).__name__ == "LazyDict":
            flat.append(None)
        else:
            flat.append(each)
    return flat


def assert_same(launched, monkeypatch, runs):
    """Each of `runs` launches the same plainly, the first time and again, also when all others are known."""
    for run in runs:
        run()
    num_known = len(fast_launch._known)
    assert num_known
    assert None not in fast_launch._known.values(), "some launch is not taken"
    for run in runs:
        launched.all.clear()
        plain(monkeypatch, run)
        run()
        middle = len(launched.all) // 2
        expected, found = launched.all[:middle], launched.all[middle:]
        assert middle
        assert list(map(as_numbers, found)) == list(map(as_numbers, expected))
    assert len(fast_launch._known) == num_known, "a launch was not known again"
