"""The memory checker's cases launch every kernel there is, in both dtypes. Launches are recorded here, not made."""

import importlib
import pkgutil

import pytest
import torch
from tests.backend.ops.test_kernels_compile_ahead import Recorder
from tests.gpu import memcheck_cases

from turbotriton.backend.ops import kernels


@pytest.fixture
def kernels_and_launches(monkeypatch):
    """Names of all kernels, and what is launched while the fixture lives."""
    names, recorded = set(), []
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        if hasattr(module, "num_sms"):
            monkeypatch.setattr(module, "num_sms", lambda device: 132)
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            names.add(f"{kernel.fn.__module__}.{name}")
            monkeypatch.setattr(module, name, Recorder(kernel, recorded))
    return names, recorded


@pytest.mark.parametrize("dtype", memcheck_cases.DTYPES, ids=str)
def test_every_kernel_has_a_case(dtype, kernels_and_launches):
    names, recorded = kernels_and_launches
    for case in memcheck_cases.CASES:
        case(memcheck_cases.Maker("cpu", dtype))
    assert len(names) > 20
    assert names == {f"{kernel.fn.__module__}.{kernel.__name__}" for kernel, _ in recorded}


def test_shapes_are_small_enough_for_a_checker_that_slows_all_down(kernels_and_launches):
    _, recorded = kernels_and_launches
    memcheck_cases.launch_all("cpu")
    elements = [value.numel() for _, arguments in recorded for value in arguments.values() if isinstance(value, torch.Tensor)]
    assert max(elements) <= 9 << 20  # the workspace of shared sums
    assert len(recorded) < 300
