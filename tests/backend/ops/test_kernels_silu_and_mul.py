"""The silu_and_mul kernel against float64.

Tolerance: one rounding (eps / 2 at most, RMS eps / sqrt(12)) plus the fp32 roundings of exp, quotient and product (1e-6).
"""

import pytest
import torch

from turbotriton.backend.ops.kernels.silu_and_mul import silu_and_mul

SHAPES = [(40, 1), (3, 7), (70, 33), (2, 1000), (3, 1025), (1, 5120)]


def oracle(x):
    gate, up = x.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def tolerance(dtype):
    eps = torch.finfo(dtype).eps
    return {"max_error": 0.5 * eps + 1e-6, "rms_error": 0.3 * eps + 1e-6}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_and_up_give_the_formula(target, shape, assert_close, guarded_outputs):
    num_tokens, inter = shape
    x = target.randn(num_tokens, 2 * inter, scale=3.0)
    before = x.clone()
    assert_close(silu_and_mul(x), oracle(x), **tolerance(target.dtype))
    assert torch.equal(x, before)


def test_rows_may_be_slices_of_wider_tensors(target, assert_close, guarded_outputs):
    x = target.randn(12, 100)[::2, 3:69]
    y = silu_and_mul(x)
    assert y.is_contiguous()
    assert_close(y, oracle(x), **tolerance(target.dtype))


def test_large_gates_saturate_without_nan(target, assert_close, guarded_outputs):
    gate = torch.tensor([[-6e4, -500.0, -89.0, -10.0, 0.0, 10.0, 89.0, 500.0]], dtype=target.dtype, device=target.device)
    x = torch.cat([gate, target.randn(1, 8)], dim=1)
    assert_close(silu_and_mul(x), oracle(x), **tolerance(target.dtype))


def test_no_tokens_give_no_rows(target):
    assert silu_and_mul(target.randn(0, 64)).shape == (0, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 14336), (257, 28672), (100_000, 11008)], ids=str)
def test_large_sizes_equal_the_formula(shape, assert_close):
    """The last has 2.2e9 elements: offsets past 2^31."""
    num_tokens, inter = shape
    x = torch.empty((num_tokens, 2 * inter), dtype=torch.bfloat16, device="cuda").normal_()
    y = silu_and_mul(x)
    for rows in (slice(0, 64), slice(-64, None)):
        assert_close(y[rows], oracle(x[rows]), **tolerance(x.dtype))
