"""The linear layers of a batch of decodes against float64: odd sizes, shared sums, gates. Tolerance: fp32 sums, one rounding."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from turbotriton.backend.ops.kernels import narrow_linear


class Shape(NamedTuple):
    num_rows: int
    k: int
    n: int
    bias: bool = False
    num_splits: int = 1


SHAPES = [
    Shape(5, 256, 70),
    Shape(17, 300, 64, bias=True),  # inputs that fill no step
    Shape(33, 512, 130, bias=True, num_splits=4),
    Shape(130, 200, 33, num_splits=2),  # more rows than a program takes
]


@pytest.fixture(autouse=True)
def on_any_chip(monkeypatch):
    """Hopper's kernel has tests of its own."""
    monkeypatch.setattr(narrow_linear, "is_hopper", lambda device: False)


@pytest.fixture
def with_splits(monkeypatch):
    choose = narrow_linear.narrow_linear_config

    def fix(num_splits):
        def config(*args, **facts):
            return replace(choose(*args, **facts), num_splits=num_splits)

        monkeypatch.setattr(narrow_linear, "narrow_linear_config", config)

    return fix


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_linear_is_the_product(target, shape, with_splits, assert_close, guarded_outputs):
    with_splits(shape.num_splits)
    x = target.randn(shape.num_rows, shape.k + 5)[:, :-5]
    weight = target.randn(shape.n, shape.k, scale=shape.k**-0.5).t()
    bias = target.randn(shape.n) if shape.bias else None
    wanted = x.double() @ weight.double() + (0 if bias is None else bias.double())
    y = narrow_linear.linear(x, weight, bias)
    assert_close(y, wanted, max_error=2 * target.eps + 2e-6, rms_error=0.6 * target.eps + 1e-6)
    assert torch.equal(narrow_linear.linear(x, weight, bias), y), "the second launch did not find the counters as the first did"


@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_are_joined(target, bias, assert_close, guarded_outputs):
    x, weight = target.randn(18, 192), target.randn(2 * 70, 192, scale=192**-0.5).t()
    added = target.randn(2 * 70) if bias else None
    gate, up = (x.double() @ weight.double() + (0 if added is None else added.double())).to(target.dtype).double().chunk(2, dim=1)
    wanted = torch.nn.functional.silu(gate) * up
    y = narrow_linear.gate_up(x, weight, added)
    assert_close(y, wanted, max_error=8 * target.eps + 4e-6, rms_error=1.5 * target.eps + 2e-6)


def test_no_rows(target):
    assert narrow_linear.linear(target.randn(0, 64), target.randn(32, 64).t()).shape == (0, 32)
