"""Layers of one row over 4 bit weights for Hopper, against float64: in an emulation of its ring, compiled ahead for sm_90, on a GPU.

Tolerance as in test_kernels_w4a16_linear.py: the kernel does not round scaled weights, the values that it is held against are rounded.
"""

from typing import NamedTuple

import pytest
import torch
from tests.backend.ops.conftest import Target, on_cpu
from tests.backend.ops.gluon_emulation import emulate, plant
from tests.backend.ops.hopper_code import compiled_for_hopper, loops_of, ptxas_report, skip_unless_hopper
from tests.backend.ops.test_kernels_compile_ahead import SHARED_LIMIT_BYTES, Recorder
from tests.backend.ops.test_kernels_skinny_linear import EPS, normed
from tests.backend.ops.test_kernels_w4a16_linear import Shape, weight_of

from turbotriton.backend.ops import triton_column
from turbotriton.backend.ops.kernels import hopper_row_w4a16 as module
from turbotriton.backend.ops.operands import NormWeight, W4A16Tiles

BF16, FP16 = torch.bfloat16, torch.float16
KERNEL = "_row_w4a16_kernel"
EARLY = ("words_ptr", "params_ptr", "gain_ptr")


class Layer(NamedTuple):
    k: int
    n: int
    kind: str = "plain"  # or norm, gated (after a norm)
    bias: bool = False
    residual: bool = False


LAYERS = [
    Layer(2048, 96),  # two strips a tile, one step
    Layer(4096, 48, bias=True),  # one strip a tile, one step
    Layer(6144, 64, "norm", residual=True),  # three steps
    Layer(8192, 32, "norm", bias=True),
    Layer(4096, 96, "gated", bias=True, residual=True),
    Layer(2048, 128, "gated"),
]


def named(value):
    return "-".join(map(str, value))


def check(layer, target, assert_close):
    shape = Shape(1, layer.k, layer.n, 128, layer.bias)
    weight, values = weight_of(target, shape, gated=layer.kind == "gated")
    x, gain = target.randn(1, layer.k), target.randn(layer.k)
    residual = target.randn(1, layer.k) if layer.residual else None
    product = x.double()
    if layer.kind == "plain":
        y = module.linear(x, weight)
    else:
        function = module.norm_gate_up if layer.kind == "gated" else module.norm_linear
        y, r = function(x, residual, gain, EPS, weight)
        product, wanted_r = normed(x, residual, gain, target.dtype)
        assert torch.equal(r, wanted_r)
    wanted = product @ values + (0 if weight.bias is None else weight.bias.double())
    if weight.gated:
        gate, up = wanted.to(target.dtype).double().chunk(2, dim=1)
        assert_close(y, torch.nn.functional.silu(gate) * up, max_error=8 * target.eps, rms_error=1.5 * target.eps)
    else:
        assert_close(y, wanted, max_error=2 * target.eps, rms_error=0.7 * target.eps)


@pytest.fixture
def emulated(monkeypatch):
    """A function that lets the next calls run emulated, on a few multiprocessors."""

    def start(*, seed=0, num_sms=2):
        monkeypatch.setattr(module, "num_sms", lambda device: num_sms)
        monkeypatch.setattr(module, "has_pdl", lambda device: True)
        emulate(module, KERNEL, monkeypatch, seed, early=EARLY)

    return start


@pytest.mark.parametrize("layer", LAYERS, ids=named)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_layers(layer, dtype, emulated, assert_close, guarded_outputs):
    emulated()
    check(layer, on_cpu(dtype), assert_close)


@pytest.mark.parametrize("num_sms", [1, 3, 50])
def test_rings_go_round_over_the_tiles_of_a_program(num_sms, emulated, assert_close):
    """Fewer steps than stages and more; more tiles than fit into the ring, and one."""
    emulated(num_sms=num_sms)
    for seed, (k, n) in enumerate(((2048, 448), (4096, 192), (14336, 64))):
        check(Layer(k, n), on_cpu(BF16, seed), assert_close)


WAIT = "            wait_copies(NUM_STAGES - 1)\n"
MISTAKES = {
    "weights read before they are there": (WAIT, WAIT.replace(" - 1", "")),
    "a stage asked for again too early": ("(step + NUM_STAGES) // NUM_STEPS", "(step + NUM_STAGES - 1) // NUM_STEPS"),
    "another step's weights": ("following = (step + NUM_STAGES)", "following = (step + 1)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulation_finds_what_a_kernel_may_not_do(mistake, emulated, monkeypatch, assert_close):
    plant(module, KERNEL, [MISTAKES[mistake]], monkeypatch)
    emulated(num_sms=1)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check(Layer(14336, 96), on_cpu(BF16), assert_close)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_what_offsets_add_comes_off_also_where_x_does_not_cancel(dtype, emulated, assert_close):
    """All x alike: the sum over a group is ten times as large as where signs vary, and what offsets add far larger than the result."""
    emulated()
    weight, values = weight_of(on_cpu(dtype), Shape(1, 4096, 64, 128))
    x = torch.full((1, 4096), 1.5, dtype=dtype)
    assert_close(
        module.linear(x, weight),
        x.double() @ values,
        max_error=2 * torch.finfo(dtype).eps,
        rms_error=0.7 * torch.finfo(dtype).eps,
    )


def test_the_wait_for_the_kernel_before_is_missed(emulated, monkeypatch, assert_close):
    plant(module, "_bring_x", [("        gdc_wait()\n", "        pass\n")], monkeypatch)
    emulated()
    with pytest.raises(AssertionError, match="before the wait"):
        check(Layer(2048, 32), on_cpu(BF16), assert_close)


def tiles(k, n, dtype=BF16, *, gated=False, group_size=128):
    words = torch.empty((n // 16, k // 64, 32, 4), dtype=torch.int32)
    return W4A16Tiles(words, torch.empty((k // group_size, n), dtype=torch.int32), None, dtype, gated)


@pytest.mark.parametrize(
    ("k", "n", "kind", "dtype"),
    [
        (4096, 6144, "norm", BF16),
        (14336, 4096, "plain", BF16),
        pytest.param(4096, 28672, "gated", FP16, marks=pytest.mark.slow),
        pytest.param(16384, 4096, "norm", BF16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_words_go_to_the_matrix_unit_as_they_are(k, n, kind, dtype, monkeypatch, tmp_path):
    """In machine code for sm_90: nothing spilled, a ring that fits and is full before the wait, and no lane sends a word to another."""
    launches = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "has_pdl", lambda device: True)
        patch.setattr(module, KERNEL, Recorder(getattr(module, KERNEL), launches))
        x, weight = torch.empty((1, k), dtype=dtype), tiles(k, n, dtype, gated=kind == "gated")
        if kind == "plain":
            module.linear(x, weight)
        else:
            (module.norm_gate_up if kind == "gated" else module.norm_linear)(x, x, x[0], EPS, weight)
    ((kernel, arguments),) = launches
    compiled = compiled_for_hopper(kernel, arguments)
    assert SHARED_LIMIT_BYTES[90] // 2 < compiled.metadata.shared <= SHARED_LIMIT_BYTES[90]
    assert "0 bytes spill stores, 0 bytes spill loads" in ptxas_report(compiled, tmp_path)
    ptx = compiled.asm["ptx"]
    early, _late = ptx.split("griddepcontrol.wait")
    assert early.count("cp.async.cg.shared.global") == (8 + 1) * module.NUM_STAGES.value  # 16 bytes a thread: words and params
    num_steps = k // (512 * arguments["R"])
    assert ptx.count("mma.sync.aligned.m16n8k16") == 32 * num_steps
    assert ptx.count("ld.shared.v4") >= 8 * num_steps
    code, loops = loops_of(compiled, tmp_path)
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])  # the tiles
    assert sum("HMMA" in each for each in code[begin:end]) == 32 * num_steps
    assert sum("SHFL" in each for each in code[begin:end]) <= 24  # the diagonal's


@pytest.mark.parametrize(
    ("rows", "k", "n", "group_size", "is_hopper", "is_taken"),
    [
        (1, 4096, 4096, 128, True, True),
        (1, 14336, 4096, 128, True, True),
        (2, 4096, 4096, 128, True, False),
        (1, 4096, 4096, 128, False, False),
        (1, 4096, 4096, 64, True, False),
        (1, 3072, 4096, 128, True, False),
        (1, 18432, 4096, 128, True, False),
        (1, 4096, 4112, 128, True, False),
    ],
)
def test_what_it_takes(rows, k, n, group_size, is_hopper, is_taken, monkeypatch):
    monkeypatch.setattr(module, "is_hopper", lambda device: is_hopper)
    assert module.takes(torch.empty((rows, k), dtype=BF16), tiles(k, n, group_size=group_size)) is is_taken


def test_the_column_asks_for_it(monkeypatch):
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    asked = []
    for name in ("linear", "norm_linear", "norm_gate_up"):
        monkeypatch.setattr(module, name, lambda *operands, name=name: asked.append(name) or (None, None))
    x, norm = torch.empty((1, 2048), dtype=BF16), NormWeight(torch.ones(2048), EPS)
    triton_column.linear(x, tiles(2048, 64))
    triton_column.norm_linear(x, x, norm, tiles(2048, 64))
    triton_column.norm_gate_up_silu(x, x, norm, tiles(2048, 64, gated=True))
    assert asked == ["linear", "norm_linear", "norm_gate_up"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "layer",
    [*LAYERS, Layer(4096, 6144, "norm", residual=True), Layer(4096, 28672, "gated", residual=True), Layer(14336, 4096)],
    ids=named,
)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_on_a_gpu_layers(layer, dtype, assert_close, guarded_outputs):
    skip_unless_hopper()
    check(layer, Target("cuda", dtype, torch.Generator().manual_seed(0)), assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [2048, 4096, 14336])
def test_a_hundred_runs_give_the_same_bits(k):
    """A race in the ring would show as a difference between runs."""
    skip_unless_hopper()
    target = Target("cuda", BF16, torch.Generator().manual_seed(0))
    weight, _values = weight_of(target, Shape(1, k, 8192, 128))
    x = target.randn(1, k)
    first = module.linear(x, weight)
    for _ in range(100):
        assert torch.equal(module.linear(x, weight), first)
