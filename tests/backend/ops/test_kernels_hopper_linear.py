"""The warp-specialised plain product against float64, as test_kernels_hopper_gate_up.py. Tolerance: fp32 sums, one rounding."""

from dataclasses import replace

import pytest
import torch
from tests.backend.ops.gluon_emulation import emulate
from tests.backend.ops.test_kernels_hopper_gate_up import Shape

from turbotriton.backend.ops.kernels import hopper_linear as module
from turbotriton.backend.ops.kernels.hopper_linear import linear

BF16, FP16 = torch.bfloat16, torch.float16
CONFIG = module.hopper_linear_config()
SHAPES = [
    Shape(1, 8, 8),
    Shape(128, 64, 256),
    Shape(64, 128, 256, bias=True),
    Shape(129, 200, 264),
    Shape(200, 320, 520, bias=True),
    Shape(300, 136, 72),
]


def inputs(shape, dtype, device="cpu", *, seed=0):
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*sizes):
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    x, weight = randn(shape.num_rows, shape.k), randn(shape.inter, shape.k) * shape.k**-0.5
    return x, weight.t(), randn(shape.inter) if shape.bias else None


def oracle(x, weight, bias):
    return x.double() @ weight.double() + (0 if bias is None else bias.double())


def tolerance(dtype):
    eps = torch.finfo(dtype).eps
    return {"max_error": 2 * eps + 2e-6, "rms_error": 0.6 * eps + 1e-6}


def run(shape, dtype, monkeypatch, *, seed=0, num_sms=2, **choice):
    tensors = inputs(shape, dtype, seed=seed)
    with monkeypatch.context() as patch:
        patch.setattr(module, "hopper_linear_config", lambda: replace(CONFIG, **choice))
        patch.setattr(module, "num_sms", lambda device: num_sms)
        emulate(module, "_hopper_linear_kernel", patch, seed)
        return linear(*tensors), oracle(*tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_linear_is_the_product(shape, dtype, monkeypatch, assert_close, guarded_outputs):
    assert_close(*run(shape, dtype, monkeypatch), **tolerance(dtype))


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("num_sms", [1, 3, 100])
def test_rings_go_round_over_the_tiles_of_a_program(num_stages, num_sms, monkeypatch, assert_close):
    for seed, k in enumerate((64, 128, 192, 256, 600)):
        found = run(Shape(300, k, 520), FP16, monkeypatch, seed=seed, num_stages=num_stages, num_sms=num_sms)
        assert_close(*found, **tolerance(FP16))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        *(Shape(num_rows, 256, 776) for num_rows in (1, 63, 64, 65, 127, 128, 129, 200)),
        *(Shape(300, k, 264, bias=True) for k in (8, 56, 64, 72, 128, 520)),
        *(Shape(520, 512, n) for n in (8, 64, 72, 192, 200, 256, 264)),
        Shape(4096, 2048, 4096),
        Shape(2049, 14336, 4096),
    ],
    ids=lambda shape: "-".join(map(str, shape)),
)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_on_a_gpu_linear_is_the_product(shape, dtype, assert_close, guarded_outputs):
    tensors = inputs(shape, dtype, "cuda")
    assert_close(linear(*tensors), oracle(*tensors), **tolerance(dtype))


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits():
    tensors = inputs(Shape(3000, 520, 4104), BF16, "cuda")
    first = linear(*tensors)
    assert not first.isnan().any()
    for _ in range(100):
        assert torch.equal(linear(*tensors), first)
