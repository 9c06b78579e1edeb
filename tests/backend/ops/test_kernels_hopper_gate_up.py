"""The warp-specialised gated product against float64.

On the CPU in an emulation of its barriers and rings (gluon_emulation.py), compiled ahead for sm_90, and on a GPU. Tolerance: fp32 sums; gate
and up are rounded once each and so is their product, and a sum beside the middle of two numbers may fall to either.
"""

import inspect
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
from tests.backend.ops.gluon_emulation import emulate
from tests.backend.ops.test_kernels_compile_ahead import POINTERS, SHARED_LIMIT_BYTES, Recorder
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from turbotriton.backend.ops.kernels import hopper_gate_up as module
from turbotriton.backend.ops.kernels.hopper_gate_up import gate_up

BF16, FP16 = torch.bfloat16, torch.float16
KERNEL = "_hopper_gate_up_kernel"
CONFIG = module.hopper_gate_up_config()


class Shape(NamedTuple):
    num_rows: int
    k: int
    inter: int
    bias: bool = False


SHAPES = [
    Shape(1, 8, 8),  # one step, nearly all of it zeros
    Shape(128, 64, 128),  # one tile
    Shape(64, 128, 128, bias=True),  # the lower half has no rows
    Shape(129, 200, 136),  # one row, one piece of columns, an odd step too many
    Shape(200, 320, 264, bias=True),
    Shape(300, 136, 72),  # the right half of the columns has eight
    Shape(70, 72, 56, bias=True),
]


def inputs(shape, dtype, device="cpu", *, seed=0, scale=1.0):
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*sizes):
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    x, weight = randn(shape.num_rows, shape.k), randn(2 * shape.inter, shape.k) * (scale * shape.k**-0.5)
    return x, weight.t(), randn(2 * shape.inter) if shape.bias else None


def oracle(x, weight, bias):
    sums = x.double() @ weight.double() + (0 if bias is None else bias.double())
    gate, up = sums.to(x.dtype).double().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def tolerance(dtype):
    eps = torch.finfo(dtype).eps
    return {"max_error": 8 * eps, "rms_error": 1.5 * eps}


def run(shape, dtype, monkeypatch, *, seed=0, num_sms=2, scale=1.0, **choice):
    """(result, float64 result), emulated on `num_sms` multiprocessors."""
    tensors = inputs(shape, dtype, seed=seed, scale=scale)
    with monkeypatch.context() as patch:
        patch.setattr(module, "hopper_gate_up_config", lambda: replace(CONFIG, **choice))
        patch.setattr(module, "num_sms", lambda device: num_sms)
        emulate(module, KERNEL, patch, seed)
        return gate_up(*tensors), oracle(*tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_gate_and_up_are_joined(shape, dtype, monkeypatch, assert_close, guarded_outputs):
    assert_close(*run(shape, dtype, monkeypatch), **tolerance(dtype))


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("num_sms", [1, 3, 100])
def test_rings_go_round_over_the_tiles_of_a_program(num_stages, num_sms, monkeypatch, assert_close):
    """Fewer steps than stages, as many, more; many tiles in a program and one."""
    for seed, k in enumerate((64, 128, 192, 256, 600)):
        found = run(Shape(300, k, 264), FP16, monkeypatch, seed=seed, num_stages=num_stages, num_sms=num_sms)
        assert_close(*found, **tolerance(FP16))


@pytest.mark.parametrize("group_m", [1, 2, 3, 16])
def test_groups_of_row_blocks_hold_every_tile_once(group_m, monkeypatch, assert_close):
    assert_close(*run(Shape(5 * 128 - 3, 64, 3 * 128 - 8), FP16, monkeypatch, group_m=group_m), **tolerance(FP16))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_gates_of_any_size(dtype, monkeypatch, assert_close):
    """Sigmoids that share an inverse are both right when one or both are next to nothing."""
    out, expected = run(Shape(128, 64, 128), dtype, monkeypatch, scale=60.0)
    gates = oracle(*inputs(Shape(128, 64, 128), dtype, scale=60.0))
    assert gates.abs().amax() > 1000
    assert_close(out, expected, **tolerance(dtype))
    silent = expected.abs() < 1e-20
    assert silent.any()
    assert out[silent].double().abs().amax() < 1e-12


def test_no_rows():
    assert gate_up(torch.empty((0, 64), dtype=BF16), torch.empty((16, 64), dtype=BF16).t()).shape == (0, 8)


FREE = "            mbarrier.arrive(free.index((number - 1) % NUM_STAGES), count=1, pred=step > 0)\n"
LAST_FREE = "        mbarrier.arrive(free.index((number - 1) % NUM_STAGES), count=1)\n"
STORE_WAIT = "    tma.store_wait(0)  # the stores of the tile before have read what is written now\n"
MISTAKES = {
    "tiles read before they are there": ("_compute", "            mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)\n", ""),
    "tiles freed while they are read": ("_compute", FREE, FREE.replace("number - 1", "number").replace(", pred=step > 0", "")),
    "tiles never freed": ("_compute", FREE, ""),
    "the last tiles never freed": ("_compute", LAST_FREE, ""),
    "another phase": ("_compute", "number // NUM_STAGES & 1", "(number // NUM_STAGES & 1) ^ 1"),
    "sums rounded too early": ("_compute", "warpgroup_mma_wait(0, [acc])", "warpgroup_mma_wait(1, [acc])"),
    "words overwritten before they are finished": ("_compute", "(step == under)", "(step == under + num_steps)"),
    "y overwritten before it is stored": ("_finish", STORE_WAIT, ""),
    "tiles of the last round overwritten": ("_fetch", "(number // NUM_STAGES & 1) ^ 1", "number // NUM_STAGES & 1 ^ 1 ^ 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulation_finds_what_a_kernel_may_not_do(mistake, monkeypatch, assert_close):
    function, old, new = MISTAKES[mistake]
    source = inspect.getsource(getattr(module, function).fn).removeprefix("@gluon.jit\n")
    assert source.count(old) == 1
    names: dict[str, object] = {}
    exec(source.replace(old, new), dict(vars(module)), names)
    monkeypatch.setattr(getattr(module, function), "fn", names[function])

    def is_found(seed):
        try:
            assert_close(*run(Shape(300, 300, 264), FP16, monkeypatch, seed=seed, num_stages=2, num_sms=1), **tolerance(FP16))
        except (AssertionError, AttributeError, RuntimeError, TypeError):
            return True
        return False

    assert any(is_found(seed) for seed in range(20))
