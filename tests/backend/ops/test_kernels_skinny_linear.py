"""The skinny linear kernels against float64 with the roundings that the op table names.

Tolerance: a sum over K fp32 products errs by about K eps_32 / 4 of its largest partial sums, far below one rounding of fp16 or bf16
(eps / 2 of the result); what enters the product after a norm is rounded first, which the oracle does too, so that elements near zero,
where the terms cancel, are judged by the RMS of the output. fp32: 2e-5 at most, 4e-6 RMS.
"""

import pytest
import torch

from turbotriton.backend.ops.kernels.skinny_linear import linear, norm_gate_up, norm_linear

SHAPES = [(1, 16, 16), (1, 70, 33), (2, 300, 7), (3, 1024, 20), (4, 1500, 9), (1, 2048, 12)]  # rows, inputs, outputs
EPS = 1e-5


def tolerance(dtype):
    eps = torch.finfo(dtype).eps
    return {"max_error": 2e-5, "rms_error": 4e-6} if dtype == torch.float32 else {"max_error": 2 * eps, "rms_error": 0.6 * eps}


def stored_by_outputs(target, inputs, outputs):
    return target.randn(outputs, inputs, scale=inputs**-0.5).t()


def normed(x, residual, gain, dtype):
    """(what enters the product, r): rounded to dtype as the op table says, in float64."""
    r = x if residual is None else (x.double() + residual.double()).to(dtype)
    wide = r.double()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * gain.double()
    return y.to(dtype).double(), r


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(target, shape, assert_close, guarded_outputs):
    num_rows, inputs, outputs = shape
    x, weight, bias = target.randn(num_rows, inputs), stored_by_outputs(target, inputs, outputs), target.randn(outputs)
    assert_close(linear(x, weight), x.double() @ weight.double(), **tolerance(target.dtype))
    assert_close(linear(x, weight, bias), x.double() @ weight.double() + bias.double(), **tolerance(target.dtype))


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_linear(target, shape, has_residual, assert_close, guarded_outputs):
    num_rows, inputs, outputs = shape
    x, gain, weight = target.randn(num_rows, inputs), target.randn(inputs), stored_by_outputs(target, inputs, outputs)
    residual, bias = target.randn(num_rows, inputs) if has_residual else None, target.randn(outputs)
    y, r = norm_linear(x, residual, gain, EPS, weight, bias)
    product, wanted_r = normed(x, residual, gain, target.dtype)
    assert torch.equal(r, wanted_r)
    # the norm's own rounding may fall on the other side where its fp32 sum errs: one element of K, weighted by K ** -0.5
    assert_close(y, product @ weight.double() + bias.double(), **tolerance(target.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_gate_up(target, shape, assert_close, guarded_outputs):
    num_rows, inputs, inter = shape
    x, residual, gain = target.randn(num_rows, inputs), target.randn(num_rows, inputs), target.randn(inputs)
    weight = stored_by_outputs(target, inputs, 2 * inter)
    y, r = norm_gate_up(x, residual, gain, EPS, weight)
    product, wanted_r = normed(x, residual, gain, target.dtype)
    gate, up = (product @ weight.double()).chunk(2, dim=-1)
    assert torch.equal(r, wanted_r)
    wide = {name: 3 * value for name, value in tolerance(target.dtype).items()}  # three roundings instead of one
    assert_close(y, gate * torch.sigmoid(gate) * up, **wide)


def test_rows_may_be_slices_and_weights_parts(target, assert_close, guarded_outputs):
    x = target.randn(8, 100)[::3, 3:69]
    weight = target.randn(40, 80, scale=0.1)[5:29, :66].t()
    assert_close(linear(x, weight), x.double() @ weight.double(), **tolerance(target.dtype))


def test_no_rows_give_no_rows(target):
    weight = stored_by_outputs(target, 32, 6)
    assert linear(target.randn(0, 32), weight).shape == (0, 6)
    y, r = norm_gate_up(target.randn(0, 32), target.randn(0, 32), target.randn(32), EPS, weight)
    assert (y.shape, r.shape) == ((0, 3), (0, 32))


def test_more_rows_and_other_layouts_are_refused():
    with pytest.raises(AssertionError, match="5 rows"):
        linear(torch.zeros(5, 4), torch.zeros(3, 4).t())
    with pytest.raises(AssertionError, match="along in_features"):
        linear(torch.zeros(1, 4), torch.zeros(4, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 4])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 28672), (14336, 4096), (2048, 92544)])
def test_real_sizes(inputs, outputs, num_rows, assert_close):
    make = torch.Generator("cuda").manual_seed(1)
    x = torch.empty(num_rows, inputs, dtype=torch.bfloat16, device="cuda").normal_(generator=make)
    weight = (torch.empty(outputs, inputs, dtype=torch.bfloat16, device="cuda").normal_(generator=make) * inputs**-0.5).t()
    assert_close(linear(x, weight), x.double() @ weight.double(), **tolerance(x.dtype))
    if num_rows * inputs <= 16384:
        gain = torch.ones(inputs, dtype=x.dtype, device="cuda")
        y, r = norm_linear(x, x, gain, EPS, weight)
        product, wanted_r = normed(x, x, gain, x.dtype)
        assert torch.equal(r, wanted_r)
        assert_close(y, product @ weight.double(), **tolerance(x.dtype))
