"""The W8A8 kernel: products are exact sums, over odd sizes and every way to cut them into tiles.

e4m3 on a GPU only: triton's interpreter truncates where the hardware rounds.
Tolerance: int8's sums are exact, so the result's few fp32 products and one rounding decide. e4m3 adds fp32 sums in another order.
"""

from typing import NamedTuple

import pytest
import torch

from turbotriton.backend.ops.kernels import w8a8_linear as module
from turbotriton.backend.ops.kernels.quantize_rows import quantize_rows
from turbotriton.backend.ops.kernels.tuning import W8A8LinearConfig
from turbotriton.backend.ops.kernels.w8a8_linear import w8a8_linear
from turbotriton.backend.ops.operands import Fp8Weight, W8A8Weight

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


def values_of(rows):
    """What the rows stand for, without their padding, in float64. That they are the right ones, test_kernels_quantize_rows.py asks."""
    return rows.values[: rows.num_rows].double() * rows.scale[: rows.num_rows, None].double()


def assert_is_product(target, shape, weight, assert_close):
    x = target.randn(shape.num_rows, shape.k)
    rows = quantize_rows(x, weight.weight.dtype)
    wanted = values_of(rows) @ weight.weight.double() * weight.scale.double()
    if weight.bias is not None:
        wanted = wanted + weight.bias.double()
    found = w8a8_linear(rows, weight)
    assert found.dtype is x.dtype
    # e4m3: the matrix unit adds with fewer bits than fp32
    loose = 2e-3 if weight.weight.dtype is torch.float8_e4m3fn else 0
    assert_close(found, wanted, max_error=4 * target.eps + 2e-6 + loose, rms_error=0.6 * target.eps + 1e-6 + loose / 4)


@pytest.mark.parametrize("by_outputs", [False, True], ids=["by_inputs", "by_outputs"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_linear_is_the_sum_of_quantised_products(target, shape, dtype, by_outputs, assert_close):
    assert_is_product(target, shape, weight_of(target, shape, dtype, by_outputs=by_outputs), assert_close)


TILES = [
    W8A8LinearConfig(32, 32, 64, 1, 2, True, num_warps=4, num_stages=3),
    W8A8LinearConfig(32, 32, 64, 3, 8, True, num_warps=4, num_stages=3),
    W8A8LinearConfig(64, 32, 64, 2, 1, False, num_warps=4, num_stages=2),
]


@pytest.mark.parametrize("config", TILES, ids=lambda config: f"{config.num_splits}-{config.group_m}-{config.descriptors}")
def test_tiles_in_groups_splits_and_descriptors_cover_all(target, dtype, config, assert_close, monkeypatch):
    if config.num_splits > 1 and target.device == "cpu":
        monkeypatch.setattr(module, "workspace", lambda device: (torch.zeros(1 << 20), torch.zeros(4096, dtype=torch.int32)))
    monkeypatch.setattr(module, "w8a8_linear_config", lambda *args, **kwargs: config)
    shape = Shape(150, 320, 80, bias=True)
    assert_is_product(target, shape, weight_of(target, shape, dtype, by_outputs=True), assert_close)


def test_int8_sums_do_not_depend_on_the_splits(target, monkeypatch):
    """Sums beyond 2^24, where fp32 would round parts."""
    if target.device == "cpu":
        monkeypatch.setattr(module, "workspace", lambda device: (torch.zeros(1 << 20), torch.zeros(4096, dtype=torch.int32)))
    shape = Shape(5, 4096, 40)
    weight = weight_of(target, shape, torch.int8, by_outputs=True)
    weight = W8A8Weight(weight.weight.abs().contiguous(), weight.scale)
    rows, found = quantize_rows(target.randn(shape.num_rows, shape.k).abs() + 3, torch.int8), []
    for splits in (1, 2, 5):
        config = W8A8LinearConfig(16, 32, 64, splits, 8, False, num_warps=4, num_stages=3)
        monkeypatch.setattr(module, "w8a8_linear_config", lambda *args, config=config, **kwargs: config)
        found.append(w8a8_linear(rows, weight))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [65, 80, 127, 256, 1000])
def test_many_rows_of_fp8_are_the_product_for_cublas_too(num_rows, assert_close):
    """bf16: the shapes that torch's scaled product takes, with rows that are no multiple of 16."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(num_rows, 4096, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(6144, 4096, generator=generator, device="cuda").to(torch.float8_e4m3fn).t()
    fp8 = Fp8Weight(weight, torch.rand(6144, generator=generator, device="cuda") / 64, x.new_ones(6144))
    rows = quantize_rows(x, torch.float8_e4m3fn)
    wanted = values_of(rows) @ weight.double() * fp8.scale.double() + 1
    assert_close(w8a8_linear(rows, fp8), wanted, max_error=0.04, rms_error=0.005)
    assert_close(module._linear(rows, fp8), wanted, max_error=0.04, rms_error=0.005)


def test_no_rows(target):
    weight = weight_of(target, SHAPES[0], torch.int8, by_outputs=True)
    assert w8a8_linear(quantize_rows(target.randn(0, 128), torch.int8), weight).shape == (0, 96)
