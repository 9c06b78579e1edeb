"""Rows in 8 bit: what the fused kernels give equals the ops one after the other, over odd sizes.

e4m3 on a GPU only: triton's interpreter truncates where the hardware rounds.
Tolerance: products with 1 / s and another order of the sum of squares may move a value over a rounding border: a step of 1 in few places.
"""

import pytest
import torch

from turbotriton.backend.ops.kernels.quantize_rows import quantize_rows, rms_norm_rows, silu_and_mul_rows
from turbotriton.backend.ops.operands import SplitSums
from turbotriton.backend.ops.reference.linear import quantized_tokens
from turbotriton.backend.ops.reference.primitives import rms_norm, silu_and_mul


@pytest.fixture(params=[torch.int8, torch.float8_e4m3fn], ids=str)
def dtype(request, target):
    if request.param is torch.float8_e4m3fn and target.device == "cpu":
        pytest.skip("triton's interpreter truncates to e4m3 where the hardware rounds")
    return request.param


def assert_rows(found, x, dtype, *, exact_scale=False):
    """`found` are the rows of x, but for a share of values that are a step away."""
    values, scale = (part.to(x.device) for part in quantized_tokens(x.cpu(), dtype))  # torch divides by a number exactly there
    assert found.num_rows == len(x)
    assert found.dtype is x.dtype
    assert found.values.dtype is dtype
    assert found.values.shape[0] % 16 == 0
    ours, our_scale = found.values[: len(x)], found.scale[: len(x), None]
    assert torch.allclose(our_scale, scale, rtol=4 * torch.finfo(x.dtype).eps, atol=0)
    if exact_scale:
        assert torch.equal(our_scale, scale)
    steps = (ours.view(torch.uint8).int() - values.view(torch.uint8).int()).abs()
    steps = torch.minimum(steps, 256 - steps)
    assert int(steps.max()) <= 1
    assert float((steps > 0).float().mean()) <= 0.02


def test_rows_are_quantised_as_the_reference_does(target, dtype):
    x = target.randn(5, 203)[:, :-3] * 3
    x[2] = 0
    assert_rows(quantize_rows(x, dtype), x, dtype, exact_scale=True)


@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_and_rows_are_one_after_the_other(target, dtype, with_residual):
    x, weight = target.randn(19, 203)[:, :-3], target.randn(200)
    residual = target.randn(19, 200) if with_residual else None
    found, r = rms_norm_rows(x, weight, 1e-5, residual, dtype)
    wanted, wanted_r = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(r, wanted_r)
    assert_rows(found, wanted, dtype)


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_the_norm_adds_up_parts_and_rounds_as_one_that_gets_the_sum(target, dtype, num_parts):
    parts, weight, residual = target.randn_fp32(num_parts, 19, 200), target.randn(200), target.randn(19, 208)[:, :200]
    summed = parts[0]
    for part in parts[1:]:
        summed = summed + part
    found, r = rms_norm_rows(SplitSums(parts, target.dtype), weight, 1e-5, residual, dtype)
    wanted, wanted_r = rms_norm_rows(summed.to(target.dtype), weight, 1e-5, residual, dtype)
    assert torch.equal(r, wanted_r)
    assert found.dtype is r.dtype is target.dtype
    assert torch.equal(found.values[:19].view(torch.uint8), wanted.values[:19].view(torch.uint8))
    assert torch.equal(found.scale[:19], wanted.scale[:19])


def test_parts_without_a_residual_are_refused():
    with pytest.raises(AssertionError, match="beside a residual"):
        rms_norm_rows(SplitSums(torch.zeros(2, 3, 16), torch.float32), torch.ones(16), 1e-5, None, torch.int8)


@pytest.mark.parametrize(("num_rows", "n"), [(17, 72), (2, 4996)])
def test_silu_and_rows_are_one_after_the_other(target, dtype, num_rows, n):
    x = target.randn(num_rows, 2 * n + 1)[:, :-1] * 2
    assert_rows(silu_and_mul_rows(x, dtype), silu_and_mul(x), dtype)


def test_no_rows(target):
    assert quantize_rows(target.randn(0, 32), torch.int8).values.shape == (0, 32)
    assert silu_and_mul_rows(target.randn(0, 32), torch.int8).num_rows == 0
    rows, r = rms_norm_rows(target.randn(0, 32), target.randn(32), 1e-5, target.randn(0, 32), torch.int8)
    assert rows.num_rows == r.shape[0] == 0
