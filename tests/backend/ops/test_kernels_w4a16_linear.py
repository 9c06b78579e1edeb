"""The W4A16 kernels against float64 over odd sizes.

Tolerance: products are exact and sums fp32, so the result's one rounding decides: eps / 2, and the fp32 sums where x is fp32.
"""

from typing import NamedTuple

import pytest
import torch

from turbotriton.backend.ops.kernels.tuning import w4a16_linear_config
from turbotriton.backend.ops.kernels.w4a16_linear import dequantize_w4a16, w4a16_linear
from turbotriton.backend.ops.operands import W4A16Weight
from turbotriton.backend.ops.packing import pack_rows
from turbotriton.backend.ops.reference.linear import dequantized
from turbotriton.contract.errors import ConfigError


class Shape(NamedTuple):
    num_rows: int
    k: int
    n: int
    group_size: int
    bias: bool = False


SHAPES = [
    Shape(1, 128, 96, 128),
    Shape(17, 256, 33, 128, bias=True),  # a row block and a bit, odd columns
    Shape(3, 384, 130, 128, bias=True),
    Shape(5, 96, 40, 32),
]


def weight_of(target, shape):
    generator = target.generator
    nibbles = torch.randint(0, 16, (shape.k, shape.n), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (shape.k // shape.group_size, shape.n), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(zeros.shape, generator=generator) * 0.02 + 0.001).half()
    bias = target.randn(shape.n) if shape.bias else None
    parts = [part.to(target.device) for part in (pack_rows(nibbles), scales, zeros)]
    group = torch.arange(shape.k) // shape.group_size
    values = (nibbles.double() - zeros[group].double()) * scales[group].double()
    return W4A16Weight(*parts, bias), values.to(target.device)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_linear_is_the_product_with_the_values(target, shape, assert_close, guarded_outputs):
    weight, values = weight_of(target, shape)
    x = target.randn(shape.num_rows, shape.k + 5)[:, :-5]  # rows of another stride
    wanted = x.double() @ values + (0 if weight.bias is None else weight.bias.double())
    y = w4a16_linear(x, weight)
    assert_close(y, wanted, max_error=4 * target.eps + 2e-6, rms_error=0.6 * target.eps + 1e-6)


def test_no_rows(target):
    weight, _ = weight_of(target, SHAPES[0])
    assert w4a16_linear(target.randn(0, 128), weight).shape == (0, 96)


def test_groups_that_fit_no_tile_are_refused():
    with pytest.raises(ConfigError, match="group_size is 16"):
        w4a16_linear_config(1, 64, 16, 2)


@pytest.mark.parametrize("shape", [Shape(0, 256, 130, 128), Shape(0, 96, 33, 32)], ids=lambda shape: "-".join(map(str, shape)))
def test_dequantised_values_are_the_references_bit_for_bit(target, shape, guarded_outputs):
    weight, values = weight_of(target, shape)
    found = dequantize_w4a16(weight, target.dtype)
    assert torch.equal(found, dequantized(weight, target.dtype))
    assert torch.equal(found, values.float().to(target.dtype))
