"""The W8A8 kernels: quantised rows equal the reference's bit for bit, products are exact sums, over odd sizes.

e4m3 on a GPU only: triton's interpreter truncates where the hardware rounds.
Tolerance: int8's sums are exact, so the result's few fp32 products and one rounding decide. e4m3 adds fp32 sums in another order.
"""

from typing import NamedTuple

import pytest
import torch

from turbotriton.backend.ops.kernels.w8a8_linear import quantize_rows, w8a8_linear
from turbotriton.backend.ops.operands import Fp8Weight, W8A8Weight
from turbotriton.backend.ops.reference.linear import quantized_tokens

DTYPES = [torch.int8, torch.float8_e4m3fn]


class Shape(NamedTuple):
    num_rows: int
    k: int
    n: int
    bias: bool = False


SHAPES = [Shape(1, 128, 96), Shape(19, 200, 33, bias=True), Shape(130, 40, 70, bias=True)]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request, target):
    if request.param is torch.float8_e4m3fn and target.device == "cpu":
        pytest.skip("triton's interpreter truncates to e4m3 where the hardware rounds")
    return request.param


def weight_of(target, shape, dtype, *, by_outputs):
    values = torch.randn(shape.k, shape.n, generator=target.generator)
    stored = (values * 40).round().clamp(-127, 127).to(torch.int8) if dtype is torch.int8 else (values * 60).to(dtype)
    if by_outputs:
        stored = stored.t().contiguous().t()
    scale = (target.randn_fp32(shape.n).abs() + 0.1) / shape.k
    kind = W8A8Weight if dtype is torch.int8 else Fp8Weight
    return kind(stored.to(target.device), scale, target.randn(shape.n) if shape.bias else None)


def test_rows_are_quantised_as_the_reference_does(target, dtype):
    x = target.randn(5, 203)[:, :-3] * 3
    x[2] = 0
    found, scale = quantize_rows(x, dtype)
    wanted, wanted_scale = quantized_tokens(x, dtype)
    assert torch.equal(scale, wanted_scale.squeeze(1))
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("by_outputs", [False, True], ids=["by_inputs", "by_outputs"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_linear_is_the_sum_of_quantised_products(target, shape, dtype, by_outputs, assert_close):
    weight = weight_of(target, shape, dtype, by_outputs=by_outputs)
    x = target.randn(shape.num_rows, shape.k)
    x8, scale = quantized_tokens(x, dtype)
    wanted = x8.double() @ weight.weight.double() * scale.double() * weight.scale.double()
    if weight.bias is not None:
        wanted = wanted + weight.bias.double()
    assert_close(w8a8_linear(x, weight), wanted, max_error=4 * target.eps + 2e-6, rms_error=0.6 * target.eps + 1e-6)


def test_no_rows(target):
    weight = weight_of(target, SHAPES[0], torch.int8, by_outputs=True)
    assert w8a8_linear(target.randn(0, 128), weight).shape == (0, 96)
