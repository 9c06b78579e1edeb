"""The warp-specialised kernel of dense layers over a batch of decodes against sums in fp64, as `narrow_linear` launches it on sm_90.

On the CPU in an emulation of its barriers and rings (gluon_emulation.py), compiled ahead for sm_90, and on a GPU. Sums in fp32 are rounded
once, gate and up before SiLU, too: a gate that rounds the other way moves the result by its own step.
"""

from typing import NamedTuple

import pytest
import torch
from tests.backend.ops.conftest import Target
from tests.backend.ops.gluon_emulation import emulate, plant, shows_a_mistake
from tests.backend.ops.hopper_code import compiled_for_hopper, loops_of, ptxas_report, skip_unless_hopper
from tests.backend.ops.test_kernels_compile_ahead import SHARED_LIMIT_BYTES, Recorder, resource_usage

from turbotriton.backend.ops.kernels import hopper_narrow_linear as module
from turbotriton.backend.ops.kernels import narrow_linear
from turbotriton.backend.ops.kernels.hopper_tuning import HopperNarrowConfig, hopper_narrow_config
from turbotriton.backend.ops.operands import whole

BF16, FP16 = torch.bfloat16, torch.float16
KERNEL = "_hopper_narrow_kernel"


class Shape(NamedTuple):
    num_rows: int
    k: int
    n: int  # of y
    gated: bool = False
    bias: bool = False


def operands(target, shape):
    outputs = shape.n * (1 + shape.gated)
    x = target.randn(shape.num_rows, shape.k)
    return x, (target.randn(outputs, shape.k) * shape.k**-0.5).t(), target.randn(outputs) if shape.bias else None


def result(shape, x, weight, bias):
    return module.gate_up(x, weight, bias) if shape.gated else whole(module.split_linear(x, weight, bias))


def expected(shape, x, weight, bias):
    y = x.double() @ weight.double() + (0 if bias is None else bias.double())
    if not shape.gated:
        return y
    gate, up = y.to(x.dtype).double().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def tolerance(dtype):
    eps = torch.finfo(dtype).eps
    return {"max_error": 4 * eps + 2e-6, "rms_error": 0.6 * eps + 1e-6}


def run(shape, dtype, monkeypatch, *, config=None, seed=0):
    """(result, exact result), emulated."""
    found = operands(Target("cpu", dtype, torch.Generator().manual_seed(seed)), shape)
    with monkeypatch.context() as patch:
        patch.setattr(module, "has_pdl", lambda device: True)
        if config is not None:
            patch.setattr(module, "hopper_narrow_config", lambda *args, gated: config)
        emulate(module, KERNEL, patch, seed, early=("weight_desc",))
        y = result(shape, *found)
    return y, expected(shape, *found)


SHAPES = [
    Shape(1, 64, 64),  # a step in all
    Shape(16, 256, 128, bias=True),
    Shape(33, 1024, 192),
    Shape(64, 456, 72, bias=True),  # inputs and outputs that fill no tile
    Shape(128, 384, 128),
    Shape(64, 384, 256, gated=True, bias=True),
    Shape(20, 200, 88, gated=True, bias=True),
    Shape(100, 1024, 64, gated=True),
    Shape(96, 448, 192, gated=True, bias=True),  # a tile of 64 rows and one of 32 beside it; half a tile of columns
    Shape(128, 320, 256, gated=True),
]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_and_output(shape, dtype, monkeypatch, assert_close, guarded_outputs):
    assert_close(*run(shape, dtype, monkeypatch), **tolerance(dtype))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_stages", "together"), [(2, 1), (3, 2), (5, 2), (5, 4)])
def test_parts_of_any_length(num_splits, num_stages, together, monkeypatch, assert_close):
    """Of nine steps and a bit, and of five, of which a fourth program has none."""
    for k in (600, 320):
        config = HopperNarrowConfig(32, num_splits, num_stages, together)
        found = run(Shape(24, k, 128, bias=True), BF16, monkeypatch, config=config, seed=num_splits)
        assert_close(*found, **tolerance(BF16))


MISTAKES = {
    "read before it is there": ("_compute", "        mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)\n", ""),
    "freed while it is read": ("_compute", "warpgroup_mma_wait(1, [acc])", "warpgroup_mma_wait(2, [acc])"),
    "freed before the first product": ("_compute", "pred=number > 0", "pred=True"),
    "overwritten": ("_fetch", "            mbarrier.wait(free.index(stage), number // NUM_STAGES - 1 & 1)\n", ""),
    "sums used too early": ("_compute", "warpgroup_mma_wait(0, [acc])", "warpgroup_mma_wait(1, [acc])"),
    "x before the kernel before has ended": ("_fetch", "    if PDL:\n        gdc_wait()\n", ""),
    "the bias in every part": ("_compute", "part == 0", "part >= 0"),
}
MISTAKES_OF_PAIRS = {
    "freed by one group for both": ("_compute", "count=1, pred", "count=2, pred"),
    "the other group's weights": ("_compute", "stage * GROUPS + GROUP", "stage * GROUPS + 1 - GROUP"),
    "the other group's columns": ("_compute", "column + GROUP * 64", "column + (1 - GROUP) * 64"),
    "freed while the other product reads it": (
        "_compute",
        "warpgroup_mma_wait(2, [acc, high])",
        "warpgroup_mma_wait(4, [acc, high])",
    ),
    "high sums used too early": ("_compute", "warpgroup_mma_wait(0, [acc, high])", "warpgroup_mma_wait(1, [acc, high])"),
    "the same rows twice": ("_fetch_rows", "[LOW, step * 64]", "[0, step * 64]"),
}


@pytest.mark.parametrize("mistake", [*MISTAKES, *MISTAKES_OF_PAIRS])
def test_the_emulation_finds_what_a_kernel_may_not_do(mistake, monkeypatch):
    function, *change = {**MISTAKES, **MISTAKES_OF_PAIRS}[mistake]
    plant(module, function, [change], monkeypatch)
    shape, config = Shape(24, 640, 128, bias=True), HopperNarrowConfig(32, 2, 2, 1)
    if mistake in MISTAKES_OF_PAIRS:
        shape, config = Shape(48, 640, 256, gated=True), HopperNarrowConfig(48, 1, 2, 1, 2)
    assert shows_a_mistake(lambda seed: run(shape, FP16, monkeypatch, config=config, seed=seed))


@pytest.mark.parametrize("num_sms", [78, 114, 132])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 32, 33, 64, 65, 128])
@pytest.mark.parametrize("n", [64, 2048, 4096, 6144, 14336])
def test_programs_fit_on_their_multiprocessors(num_rows, gated, n, num_sms):
    config = hopper_narrow_config(num_rows, n, num_sms, gated=gated)
    assert config.num_stages >= 3
    num_programs = -(-n // 64) * config.num_splits
    places = 1 if num_programs <= num_sms or config.groups == 2 else 2
    outputs = 64 * config.groups * (2 if gated else 1)
    assert places * config.num_stages * 128 * (config.block_m + outputs) <= SHARED_LIMIT_BYTES[90] - (16 << 10)
    assert config.num_splits == 1 or num_programs <= 2 * num_sms


@pytest.mark.parametrize(
    ("num_rows", "k", "is_hopper", "dtype", "expected"),
    [
        (1, 4096, True, BF16, KERNEL),
        (64, 4104, True, FP16, KERNEL),
        (65, 4096, True, BF16, "_narrow_linear_kernel"),
        (64, 4100, True, BF16, "_narrow_linear_kernel"),
        (64, 4096, False, BF16, "_narrow_linear_kernel"),
        (16, 64, True, torch.float32, "_narrow_linear_kernel"),
    ],
)
def test_what_it_does_not_take_is_the_plain_kernels(num_rows, k, is_hopper, dtype, expected, monkeypatch):
    launches = []
    for owner, name in ((module, KERNEL), (narrow_linear, "_narrow_linear_kernel")):
        monkeypatch.setattr(owner, name, Recorder(getattr(owner, name), launches))
        monkeypatch.setattr(owner, "num_sms", lambda device: 132)
    monkeypatch.setattr(narrow_linear, "is_hopper", lambda device: is_hopper)
    x, weight = torch.empty((num_rows, k), dtype=dtype), torch.empty((512, k), dtype=dtype).t()
    narrow_linear.gate_up(x, weight)
    narrow_linear.split_linear(x, weight)
    narrow_linear.linear(x, weight)  # its sums are whole
    assert [kernel.__name__ for kernel, _ in launches] == [expected, expected, "_narrow_linear_kernel"]


def launched(shape, dtype, monkeypatch):
    """(kernel, arguments) of a launch that does not run."""
    launches = []
    monkeypatch.setattr(module, KERNEL, Recorder(getattr(module, KERNEL), launches))
    monkeypatch.setattr(module, "has_pdl", lambda device: True)
    monkeypatch.setattr(module, "num_sms", lambda device: 132)
    outputs = shape.n * (1 + shape.gated)
    weight = torch.empty((outputs, shape.k), dtype=dtype).t()
    bias = torch.empty(outputs, dtype=dtype) if shape.bias else None
    (module.gate_up if shape.gated else module.split_linear)(torch.empty((shape.num_rows, shape.k), dtype=dtype), weight, bias)
    return launches[0]


@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 4096, 14336, gated=True),
        Shape(64, 14336, 4096),
        Shape(16, 4096, 6144, bias=True),
        Shape(96, 4096, 14336, gated=True),
        pytest.param(Shape(128, 4096, 14336, gated=True, bias=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_products_follow_each_other(shape, monkeypatch, tmp_path):
    """Nothing spilled, not serialised by ptxas, one group of products waited for while the next runs."""
    kernel, arguments = launched(shape, BF16, monkeypatch)
    compiled = compiled_for_hopper(kernel, arguments)
    config = hopper_narrow_config(shape.num_rows, shape.n, 132, gated=shape.gated)
    num_programs = -(-shape.n // 64) * config.num_splits
    assert compiled.metadata.shared <= SHARED_LIMIT_BYTES[90] // (1 if num_programs <= 132 or config.groups == 2 else 2) - 1024
    usage = resource_usage(compiled.asm["cubin"], tmp_path)
    assert usage["LOCAL"] == usage["STACK"] == 0, usage
    said = ptxas_report(compiled, tmp_path)
    assert "serialized" not in said
    assert "0 bytes spill stores" in said
    code, loops = loops_of(compiled, tmp_path)
    inner = min((code[b:e] for b, e in loops if any("HGMMA" in each for each in code[b:e])), key=len)
    assert sum("HGMMA" in each for each in inner) == 4 * (1 + shape.gated) * (2 if config.high else 1)
    assert sum("DEPBAR" in each and "gsb0" in each for each in inner) == 1


GPU_SHAPES = [
    *SHAPES,
    Shape(64, 4096, 14336, gated=True),
    Shape(64, 14336, 4096),
    Shape(16, 4096, 6144, bias=True),
    Shape(128, 2048, 8192, gated=True, bias=True),
    Shape(96, 4096, 14336, gated=True),
    Shape(128, 4096, 14336, gated=True, bias=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_every_row_and_output_on_a_gpu(shape, dtype, assert_close):
    skip_unless_hopper()
    found = operands(Target("cuda", dtype, torch.Generator().manual_seed(0)), shape)
    assert_close(result(shape, *found), expected(shape, *found), **tolerance(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [Shape(64, 4096, 14336, gated=True), Shape(96, 4096, 14336, gated=True), Shape(48, 14336, 4096), Shape(7, 4096, 6144)],
    ids=str,
)
def test_the_same_bits_again_and_again(shape, assert_close):
    """A race in the ring would show as a difference between runs."""
    skip_unless_hopper()
    found = operands(Target("cuda", BF16, torch.Generator().manual_seed(0)), shape)
    y = result(shape, *found)
    assert_close(y, expected(shape, *found), **tolerance(BF16))
    assert all(torch.equal(result(shape, *found), y) for _ in range(200))
