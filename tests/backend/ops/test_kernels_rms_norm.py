"""The rms_norm kernel against float64.

Tolerance: the kernel sums in fp32 and rounds once, so an element is off by half a unit in the last place (eps / 2, RMS
eps / sqrt(12)) plus a few fp32 roundings of sum, rsqrt and products (1e-6).
"""

import pytest
import torch

from turbotriton.backend.ops.kernels.rms_norm import rms_norm
from turbotriton.contract.errors import ConfigError

SHAPES = [(1, 1), (3, 7), (5, 72), (40, 128), (17, 1000), (2, 5120)]
EPS = 1e-5


def oracle(r, weight):
    wide = r.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def tolerance(target):
    return {"max_error": 0.5 * target.eps + 1e-6, "rms_error": 0.3 * target.eps + 1e-6}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_equals_the_formula(target, shape, assert_close, guarded_outputs):
    x, weight = target.randn(*shape), target.randn(shape[1])
    y, r = rms_norm(x, weight, EPS)
    assert r is x
    assert_close(y, oracle(x, weight), **tolerance(target))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_is_added_and_rounded_before_the_norm(target, shape, assert_close, guarded_outputs):
    x, residual, weight = target.randn(*shape), target.randn(*shape, scale=8.0), target.randn(shape[1])
    before = x.clone(), residual.clone()
    y, r = rms_norm(x, weight, EPS, residual)
    assert torch.equal(r, x + residual)
    assert_close(y, oracle(r, weight), **tolerance(target))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_rows_may_be_slices_of_wider_tensors(target, assert_close, guarded_outputs):
    wide, other, weight = target.randn(6, 100), target.randn(12, 70), target.randn(64)
    x, residual = wide[:, 3:67], other[::2, :64]
    y, r = rms_norm(x, weight, EPS, residual)
    assert torch.equal(r, x + residual)
    assert_close(y, oracle(r, weight), **tolerance(target))


def test_no_tokens_give_no_rows(target):
    y, r = rms_norm(target.randn(0, 64), target.randn(64), EPS, target.randn(0, 64))
    assert y.shape == r.shape == (0, 64)


def test_squares_past_the_range_of_the_dtype_do_not_overflow(target, assert_close, guarded_outputs):
    x, weight = target.randn(3, 200).clamp(-2, 2) * 20000, target.randn(200)
    y, _ = rms_norm(x, weight, EPS)
    assert_close(y, oracle(x, weight), **tolerance(target))


def test_a_row_of_zeros_stays_zero(target):
    y, _ = rms_norm(target.randn(2, 64) * 0, target.randn(64), EPS)
    assert torch.equal(y, torch.zeros_like(y))


def test_hidden_that_fits_no_tile_is_refused():
    with pytest.raises(ConfigError, match="32769"):
        rms_norm(torch.zeros(1, 32769), torch.zeros(32769), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (4099, 5120), (257, 32768), (270_000, 8192)], ids=str)
def test_large_sizes_equal_the_formula(shape, assert_close):
    """The last has 2.2e9 elements: offsets past 2^31."""
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.randn(shape[1], dtype=torch.bfloat16, device="cuda")
    residual = x.flip(0)
    y, r = rms_norm(x, weight, EPS, residual)
    eps = torch.finfo(x.dtype).eps
    for rows in (slice(0, 512), slice(-512, None)):
        assert torch.equal(r[rows], x[rows] + residual[rows])
        assert_close(y[rows], oracle(r[rows], weight), max_error=0.5 * eps + 1e-6, rms_error=0.3 * eps + 1e-6)
