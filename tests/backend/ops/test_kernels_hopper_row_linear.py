"""Layers of one row for Hopper against float64, as the skinny kernels that they stand in for.

On the CPU in an emulation of its ring (gluon_emulation.py), compiled ahead for sm_90, and on a GPU.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from tests.backend.ops import test_kernels_skinny_qkv as skinny_qkv_test
from tests.backend.ops.conftest import Target, on_cpu
from tests.backend.ops.gluon_emulation import emulate, plant
from tests.backend.ops.hopper_code import compiled_for_hopper, ptxas_report, skip_unless_hopper
from tests.backend.ops.test_kernels_compile_ahead import SHARED_LIMIT_BYTES, Recorder
from tests.backend.ops.test_kernels_skinny_linear import EPS, normed, tolerance

from turbotriton.backend.ops import triton_column
from turbotriton.backend.ops.kernels import hopper_row_linear as module
from turbotriton.backend.ops.kernels import hopper_row_qkv as qkv_module
from turbotriton.backend.ops.kernels import skinny_linear, skinny_qkv
from turbotriton.backend.ops.operands import AttentionBatch, DenseWeight, NormWeight, QkvWeights

BF16, FP16 = torch.bfloat16, torch.float16
KERNEL, QKV_KERNEL = "_row_linear_kernel", "_row_qkv_kernel"
EARLY = ("weight_ptr", "gain_ptr")


class Layer(NamedTuple):
    k: int
    n: int
    kind: str = "plain"  # or norm, gated
    bias: bool = False
    residual: bool = False


LAYERS = [
    Layer(1024, 16),  # one step, one tile
    Layer(16, 34, bias=True),  # the last tile has two outputs
    Layer(1040, 100),  # the second step has one piece of 16 inputs
    Layer(5120, 48, "norm"),  # steps that fill no power of two
    Layer(2048, 80, "norm", bias=True, residual=True),
    Layer(2048, 48, "gated", residual=True),
    Layer(528, 20, "gated", bias=True),  # ten pairs
]
QKV_SHAPES = [
    skinny_qkv_test.Shape(1, 256, 4, 2, 64),
    skinny_qkv_test.Shape(1, 1040, 3, 1, 16, bias=True, q_scale=True),
    skinny_qkv_test.Shape(1, 128, 2, 2, 48, residual=False),
]


def named(value):
    return "-".join(map(str, value))


def run(layer, target):
    """(y, r or None, float64 y, r) of a layer of random numbers."""
    x, gain = target.randn(1, layer.k), target.randn(layer.k)
    residual = target.randn(1, layer.k) if layer.residual else None
    weight = target.randn(layer.n, layer.k, scale=layer.k**-0.5).t()
    bias = target.randn(layer.n) if layer.bias else None
    if layer.kind == "plain":
        y, r, product, wanted_r = module.linear(x, weight, bias), x, x.double(), x
    else:
        function = module.norm_gate_up if layer.kind == "gated" else module.norm_linear
        y, r = function(x, residual, gain, EPS, weight, bias)
        product, wanted_r = normed(x, residual, gain, target.dtype)
    wanted = product @ weight.double() + (0 if bias is None else bias.double())
    if layer.kind == "gated":
        gate, up = wanted.chunk(2, dim=1)
        wanted = gate * torch.sigmoid(gate) * up
    return y, r, wanted, wanted_r


def check(layer, target, assert_close):
    y, r, wanted, wanted_r = run(layer, target)
    assert torch.equal(r, wanted_r)
    roundings = 3 if layer.kind == "gated" else 1
    assert_close(y, wanted, **{name: roundings * value for name, value in tolerance(target.dtype).items()})


@pytest.fixture
def emulated(monkeypatch):
    """A function that lets the next calls of both kernels run emulated, on a few multiprocessors."""

    def start(*, seed=0, num_sms=2, num_stages=3):
        monkeypatch.setattr(module, "num_sms", lambda device: num_sms)
        config = module.hopper_row_config(64)
        monkeypatch.setattr(module, "hopper_row_config", lambda k: replace(config, num_stages=num_stages))
        for each, kernel in ((module, KERNEL), (qkv_module, QKV_KERNEL)):
            monkeypatch.setattr(each, "has_pdl", lambda device: True)
            emulate(each, kernel, monkeypatch, seed, early=EARLY)

    return start


@pytest.mark.parametrize("layer", LAYERS, ids=named)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_layers(layer, dtype, emulated, assert_close, guarded_outputs):
    emulated()
    check(layer, on_cpu(dtype), assert_close)


@pytest.mark.parametrize("shape", QKV_SHAPES, ids=named)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_one_launch_does_all_before_attention(shape, dtype, emulated, assert_close, guarded_outputs):
    emulated()
    skinny_qkv_test.check(qkv_module.norm_qkv_rotary_store, shape, on_cpu(dtype), assert_close)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("num_sms", [1, 3, 50])
def test_rings_go_round_over_the_tiles_of_a_program(num_stages, num_sms, emulated, assert_close):
    """Fewer steps than stages, as many, more; many tiles in a program, one, and more stages than all its tiles have steps."""
    emulated(num_sms=num_sms, num_stages=num_stages)
    for seed, k in enumerate((512, 1024, 2000, 3000, 4096)):
        check(Layer(k, 112), on_cpu(FP16, seed), assert_close)


WAIT = "        wait_copies(NUM_STAGES - 1)\n"
MISTAKES = {
    "weights read before they are there": ("sums_of_tile", WAIT, WAIT.replace(" - 1", "")),
    "a stage asked for again too early": (
        "sums_of_tile",
        "(step + NUM_STAGES) // NUM_STEPS",
        "(step + NUM_STAGES - 1) // NUM_STEPS",
    ),
    "another step's weights": ("sums_of_tile", "(step + NUM_STAGES) % NUM_STEPS", "(step + 1) % NUM_STEPS"),
    "x read before the kernel before has written it": ("_row_linear_kernel", "        gdc_wait()\n", "        pass\n"),
    "inputs past the end": ("ask", "if (step + 1) * BLOCK_K > K:", "if False:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulation_finds_what_a_kernel_may_not_do(mistake, emulated, monkeypatch, assert_close):
    function, *change = MISTAKES[mistake]
    plant(module, function, [change], monkeypatch)
    emulated(num_sms=1, num_stages=2)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check(Layer(3000, 48), on_cpu(FP16), assert_close)


def launched(k, n, kind, dtype, monkeypatch, *, num_heads=0):
    """The kernel, and what a call gives it."""
    launches = []
    with monkeypatch.context() as patch:
        for each, kernel in ((module, KERNEL), (qkv_module, QKV_KERNEL)):
            patch.setattr(each, "has_pdl", lambda device: True)
            patch.setattr(each, kernel, Recorder(getattr(each, kernel), launches))
        x, weight = torch.empty((1, k), dtype=dtype), torch.empty((n, k), dtype=dtype).t()
        if kind == "qkv":
            cos, cache = torch.empty((1, 64)), torch.empty((4, 8, 64, 128), dtype=dtype)
            slots = torch.zeros(1, dtype=torch.int64)
            qkv_module.norm_qkv_rotary_store(x, x, x[0], EPS, weight, None, cos, cos, None, cache, cache, slots)
        elif kind == "plain":
            module.linear(x, weight)
        else:
            (module.norm_gate_up if kind == "gated" else module.norm_linear)(x, x, x[0], EPS, weight)
    (launch,) = launches
    return launch


@pytest.mark.parametrize(
    ("k", "n", "kind"),
    [
        (4096, 6144, "qkv"),
        (14336, 4096, "plain"),
        (2048, 16384, "gated"),
        pytest.param(16384, 4096, "norm", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_come_by_16_bytes_and_before_the_wait(k, n, kind, monkeypatch, tmp_path):
    """In machine code for sm_90: nothing spilled, a ring that fits, and as many copies as it has room for above the wait."""
    kernel, arguments = launched(k, n, kind, BF16, monkeypatch)
    compiled = compiled_for_hopper(kernel, arguments)
    assert SHARED_LIMIT_BYTES[90] // 2 < compiled.metadata.shared <= SHARED_LIMIT_BYTES[90]
    said = ptxas_report(compiled, tmp_path)
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    ptx = compiled.asm["ptx"]
    early, late = ptx.split("griddepcontrol.wait")
    a_stage = 16 * 1024 // 8 // (32 * arguments["num_warps"])
    assert early.count("cp.async.cg.shared.global") == a_stage * arguments["NUM_STAGES"]
    assert late.count("cp.async.cg.shared.global") == a_stage * -(-k // 1024)
    assert "cp.async.ca" not in ptx


@pytest.mark.parametrize(
    ("rows", "k", "n", "dtype", "is_hopper", "is_taken"),
    [
        (1, 2048, 4096, BF16, True, True),
        (1, 11008, 4096, FP16, True, True),
        (2, 2048, 4096, BF16, True, False),
        (1, 2048, 4096, BF16, False, False),
        (1, 2048, 4096, torch.float32, True, False),
        (1, 2040, 4096, BF16, True, False),
        (1, 18432, 4096, BF16, True, False),
        (1, 2048, 4097, BF16, True, False),
    ],
)
def test_what_it_does_not_take(rows, k, n, dtype, is_hopper, is_taken, monkeypatch):
    monkeypatch.setattr(module, "is_hopper", lambda device: is_hopper)
    assert module.takes(torch.empty((rows, k), dtype=dtype), torch.empty((n, k), dtype=dtype).t()) is is_taken


@pytest.mark.parametrize("is_hopper", [True, False])
def test_the_column_asks_for_it_where_it_is_taken(is_hopper, monkeypatch):
    monkeypatch.setattr(module, "is_hopper", lambda device: is_hopper)
    asked = []
    for each in (module, skinny_linear, qkv_module, skinny_qkv):
        for name in set(each.__all__) & {"linear", "norm_linear", "norm_gate_up", "norm_qkv_rotary_store"}:
            monkeypatch.setattr(each, name, lambda *operands, each=each: asked.append(each) or (None, None))
    x, weight, norm = (
        torch.empty((1, 64), dtype=BF16),
        DenseWeight(torch.empty((96, 64), dtype=BF16).t()),
        NormWeight(torch.ones(64), EPS),
    )
    triton_column.linear(x, weight)
    triton_column.norm_linear(x, x, norm, weight)
    triton_column.norm_gate_up_silu(x, x, norm, weight)
    pages, turn = torch.empty((1, 1, 16, 32), dtype=BF16), torch.empty((1, 16))
    batch = AttentionBatch(
        turn, turn, None, torch.zeros(1, dtype=torch.int64), torch.zeros((1, 1)), torch.ones(1), 1, 1, torch.zeros(1), ()
    )
    triton_column.norm_qkv_rotary_store(x, x, QkvWeights(norm, weight), batch, pages, pages)
    assert asked == ([module] * 3 + [qkv_module] if is_hopper else [skinny_linear] * 3 + [skinny_qkv])


@pytest.mark.parametrize(("head_dim", "is_taken"), [(128, True), (80, True), (40, False)])
def test_heads_whose_half_is_no_whole_tile_are_the_skinny_kernels(head_dim, is_taken, monkeypatch):
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    assert (
        qkv_module.takes(torch.empty((1, 64), dtype=BF16), torch.empty((8 * head_dim, 64), dtype=BF16).t(), head_dim) is is_taken
    )


def test_parts_of_a_weight_are_taken_at_32_bytes_only(monkeypatch):
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    x, whole = torch.empty((1, 64), dtype=BF16), torch.empty((8, 1040), dtype=BF16)
    assert module.takes(x, whole[:, :64].t())
    assert not module.takes(x, whole[:, 4:68].t())
    assert not module.takes(x, torch.empty((8, 72), dtype=BF16)[:, :64].t())


GPU_LAYERS = [
    *LAYERS,
    *(Layer(k, n, "plain", bias=True) for k in (16, 1008, 1040, 11008, 16384) for n in (2, 18, 4098)),
    *(Layer(k, n, kind, residual=True) for k, n in ((2048, 16384), (4096, 28672), (3584, 37888)) for kind in ("norm", "gated")),
    Layer(14336, 4096),
    Layer(2048, 92544, "norm"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("layer", GPU_LAYERS, ids=named)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_on_a_gpu_layers(layer, dtype, assert_close, guarded_outputs):
    skip_unless_hopper()
    check(layer, Target("cuda", dtype, torch.Generator().manual_seed(0)), assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*QKV_SHAPES, skinny_qkv_test.Shape(1, 4096, 32, 8, 128, bias=True)], ids=named)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_on_a_gpu_one_launch_does_all_before_attention(shape, dtype, assert_close, guarded_outputs):
    skip_unless_hopper()
    target = Target("cuda", dtype, torch.Generator().manual_seed(0))
    skinny_qkv_test.check(qkv_module.norm_qkv_rotary_store, shape, target, assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [2048, 4096, 14336])
def test_a_hundred_runs_give_the_same_bits(k):
    """A race in the ring would show as a difference between runs."""
    skip_unless_hopper()
    target = Target("cuda", BF16, torch.Generator().manual_seed(0))
    x, weight = target.randn(1, k), target.randn(8192, k, scale=k**-0.5).t()
    first = module.linear(x, weight)
    for _ in range(100):
        assert torch.equal(module.linear(x, weight), first)
