"""The warp-specialised gated product against float64.

On the CPU in an emulation of its barriers and rings (gluon_emulation.py), compiled ahead for sm_90, and on a GPU. Tolerance: sums in fp32;
gate and up are rounded once each and so is their product, and a sum beside the middle of two numbers may fall to either.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from tests.backend.ops.gluon_emulation import emulate, plant
from tests.backend.ops.hopper_code import compiled_for_hopper, loops_of, ptxas_report
from tests.backend.ops.test_kernels_compile_ahead import SHARED_LIMIT_BYTES, Recorder
from tests.backend.runner.launch_keys import _argument_key

from turbotriton.backend.ops import triton_column
from turbotriton.backend.ops.kernels import hopper_gate_up as module
from turbotriton.backend.ops.kernels import hopper_tuning
from turbotriton.backend.ops.kernels.hopper_gate_up import gate_up
from turbotriton.backend.ops.operands import DenseWeight, NormWeight

BF16, FP16 = torch.bfloat16, torch.float16
KERNEL = "_hopper_gate_up_kernel"
CONFIG = module.hopper_gate_up_config(1, 64)


class Shape(NamedTuple):
    num_rows: int
    k: int
    inter: int
    bias: bool = False


SHAPES = [
    Shape(1, 8, 8),  # one step, nearly all of it zeros
    Shape(128, 64, 128),  # one tile
    Shape(64, 128, 128, bias=True),  # the lower half has no rows
    Shape(129, 200, 136),  # one row, one piece of columns, an odd step too many
    Shape(200, 320, 264, bias=True),
    Shape(300, 136, 72),  # the right half of the columns has eight
    Shape(70, 72, 56, bias=True),
]


def inputs(shape, dtype, device="cpu", *, seed=0, scale=1.0):
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*sizes):
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    x, weight = randn(shape.num_rows, shape.k), randn(2 * shape.inter, shape.k) * (scale * shape.k**-0.5)
    return x, weight.t(), randn(2 * shape.inter) if shape.bias else None


def oracle(x, weight, bias):
    sums = x.double() @ weight.double() + (0 if bias is None else bias.double())
    gate, up = sums.to(x.dtype).double().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def tolerance(dtype):
    eps = torch.finfo(dtype).eps
    return {"max_error": 8 * eps, "rms_error": 1.5 * eps}


def run(shape, dtype, monkeypatch, *, seed=0, num_sms=2, scale=1.0, **choice):
    """(result, float64 result), emulated on `num_sms` multiprocessors."""
    tensors = inputs(shape, dtype, seed=seed, scale=scale)
    with monkeypatch.context() as patch:
        patch.setattr(module, "hopper_gate_up_config", lambda *shape: replace(CONFIG, **choice))
        patch.setattr(module, "num_sms", lambda device: num_sms)
        patch.setattr(module, "has_pdl", lambda device: True)
        emulate(module, KERNEL, patch, seed, early=("weight_desc",))
        return gate_up(*tensors), oracle(*tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_gate_and_up_are_joined(shape, dtype, monkeypatch, assert_close, guarded_outputs):
    assert_close(*run(shape, dtype, monkeypatch), **tolerance(dtype))


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("num_sms", [1, 3, pytest.param(100, marks=pytest.mark.slow)])
def test_rings_go_round_over_the_tiles_of_a_program(num_stages, num_sms, monkeypatch, assert_close):
    """Fewer steps than stages, as many, more; many tiles in a program and one."""
    for seed, k in enumerate((64, 128, 192, 256, 600)):
        found = run(Shape(300, k, 264), FP16, monkeypatch, seed=seed, num_stages=num_stages, num_sms=num_sms)
        assert_close(*found, **tolerance(FP16))


@pytest.mark.parametrize("group_m", [1, 2, 3, 16])
def test_groups_of_row_blocks_hold_every_tile_once(group_m, monkeypatch, assert_close):
    assert_close(*run(Shape(5 * 128 - 3, 64, 3 * 128 - 8), FP16, monkeypatch, group_m=group_m), **tolerance(FP16))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_gates_of_any_size(dtype, monkeypatch, assert_close):
    """Sigmoids that share an inverse are both right when one or both are next to nothing."""
    out, expected = run(Shape(128, 64, 128), dtype, monkeypatch, scale=60.0)
    gates = oracle(*inputs(Shape(128, 64, 128), dtype, scale=60.0))
    assert gates.abs().amax() > 1000
    assert_close(out, expected, **tolerance(dtype))
    silent = expected.abs() < 1e-20
    assert silent.any()
    assert out[silent].double().abs().amax() < 1e-12


def test_no_rows():
    assert gate_up(torch.empty((0, 64), dtype=BF16), torch.empty((16, 64), dtype=BF16).t()).shape == (0, 8)


FREE = "            mbarrier.arrive(free.index((number - 1) % NUM_STAGES), count=1, pred=step > 0)\n"
LAST_FREE = "        mbarrier.arrive(free.index((number - 1) % NUM_STAGES), count=1)\n"
STORE_WAIT = "    tma.store_wait(0)  # the stores of the tile before have read what is written now\n"
MISTAKES = {
    "tiles read before they are there": (
        "_compute",
        "            mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)\n",
        "",
    ),
    "tiles freed while they are read": ("_compute", FREE, FREE.replace("number - 1", "number").replace(", pred=step > 0", "")),
    "tiles never freed": ("_compute", FREE, ""),
    "the last tiles never freed": ("_compute", LAST_FREE, ""),
    "another phase": ("_compute", "number // NUM_STAGES & 1", "(number // NUM_STAGES & 1) ^ 1"),
    "sums rounded too early": ("_compute", "warpgroup_mma_wait(0, [acc])", "warpgroup_mma_wait(1, [acc])"),
    "words overwritten before they are finished": ("_compute", "(step == under)", "(step == under + num_steps)"),
    "y overwritten before it is stored": ("_finish", STORE_WAIT, ""),
    "tiles of the last round overwritten": ("_fetch", "(number // NUM_STAGES & 1) ^ 1", "number // NUM_STAGES & 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulation_finds_what_a_kernel_may_not_do(mistake, monkeypatch, assert_close):
    function, *change = MISTAKES[mistake]
    plant(module, function, [change], monkeypatch)

    def is_found(seed):
        try:
            assert_close(*run(Shape(300, 300, 264), FP16, monkeypatch, seed=seed, num_stages=2, num_sms=1), **tolerance(FP16))
        except (AssertionError, AttributeError, RuntimeError, TypeError):
            return True
        return False

    assert any(is_found(seed) for seed in range(20))


def launched(num_rows, k, inter, dtype, monkeypatch, *, bias=False):
    """The kernel, and what a call gives it."""
    launches = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "has_pdl", lambda device: True)
        patch.setattr(module, KERNEL, Recorder(getattr(module, KERNEL), launches))
        weight = torch.empty((2 * inter, k), dtype=dtype).t()
        gate_up(torch.empty((num_rows, k), dtype=dtype), weight, torch.empty(2 * inter, dtype=dtype) if bias else None)
    ((kernel, arguments),) = launches
    return kernel, arguments


def test_neither_rows_nor_the_layer_choose_another_compiled_kernel(monkeypatch):
    def key(num_rows, k, inter):
        kernel, arguments = launched(num_rows, k, inter, BF16, monkeypatch)
        return [(p.name, _argument_key(arguments[p.name], p)) for p in kernel.params]

    assert key(1, 64, 128) == key(512, 2048, 8192) == key(777, 4096, 14336) == key(2048, 8, 8) == key(40000, 5120, 13824)


@pytest.mark.parametrize(
    ("x_shape", "columns", "dtype", "is_hopper", "is_taken"),
    [
        ((600, 2048), 16384, BF16, True, True),
        ((600, 2048), 16384, FP16, True, True),
        ((600, 2048), 16384, BF16, False, False),
        ((600, 2048), 16384, torch.float32, True, False),
        ((600, 2044), 16384, BF16, True, False),
        ((600, 2048), 16392, BF16, True, False),
        ((511, 2048), 16384, BF16, True, False),
    ],
)
def test_what_it_does_not_take_is_a_product_and_silu(x_shape, columns, dtype, is_hopper, is_taken, monkeypatch):
    monkeypatch.setattr(module, "is_hopper", lambda device: is_hopper)
    monkeypatch.setattr(hopper_tuning, "MIN_HOPPER_GATE_UP_ROWS", 512)
    asked = []
    monkeypatch.setattr(module, "gate_up", lambda x, weight, bias: asked.append("gate_up") or x)
    monkeypatch.setattr(triton_column, "rms_norm", lambda x, weight, eps, residual: (x, residual))
    monkeypatch.setattr(triton_column, "norm_linear", lambda x, residual, norm, weight: (x, residual))
    monkeypatch.setattr(triton_column, "silu_and_mul", lambda x: asked.append("silu_and_mul") or x)
    x = torch.empty(x_shape, dtype=dtype)
    weight = DenseWeight(torch.empty((columns, x_shape[1]), dtype=dtype, device="meta").t())
    triton_column.norm_gate_up_silu(x, x, NormWeight(torch.empty(x_shape[1]), 1e-5), weight)
    assert asked == ["gate_up" if is_taken else "silu_and_mul"]


def step_loops(compiled, folder):
    """The innermost loops of the machine code that have matrix instructions."""
    code, loops = loops_of(compiled, folder)
    with_products = [
        (begin, end)
        for begin, end in loops
        if code[end - 1].startswith("@")  # without a condition: back from a wait's loop
        and any("HGMMA" in each for each in code[begin:end])
    ]
    innermost = [
        (begin, end)
        for begin, end in with_products
        if not any(begin <= other[0] and other[1] <= end and other != (begin, end) for other in with_products)
    ]
    return [code[begin:end] for begin, end in innermost]


@pytest.mark.parametrize("bias", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [pytest.param(FP16, marks=pytest.mark.slow), BF16], ids=str)
def test_silu_runs_under_the_products_of_the_next_tile(dtype, bias, monkeypatch, tmp_path):
    """Of each half's loop: nothing spilled, exponentials between products and the wait for them, products not serialised by ptxas."""
    compiled = compiled_for_hopper(*launched(512, 2048, 8192, dtype, monkeypatch, bias=bias))
    assert compiled.metadata.shared <= SHARED_LIMIT_BYTES[90]
    said = ptxas_report(compiled, tmp_path)
    assert "registers" in said
    assert "serialized" not in said
    loops = step_loops(compiled, tmp_path)
    assert len(loops) == 2
    for loop in loops:
        assert not any(each.split()[0].startswith(("LDL", "STL")) for each in loop)
        products = [index for index, each in enumerate(loop) if "HGMMA.64x256x16" in each]
        (wait,) = (index for index, each in enumerate(loop) if "DEPBAR" in each and "gsb0" in each)
        exponentials = [index for index, each in enumerate(loop) if "MUFU.EX2" in each]
        inverses = [index for index, each in enumerate(loop) if "MUFU.RCP" in each]
        assert (len(products), len(exponentials)) == (4, 64)
        assert 32 <= len(inverses) <= 36  # those beyond divide to find the tile
        assert max(products) < min(exponentials + inverses) < max(exponentials + inverses) < wait


GPU_SHAPES = [
    *(Shape(num_rows, 256, 384) for num_rows in (*range(1, 201, 13), 127, 128, 129, 200)),
    *(Shape(300, k, 136, bias=True) for k in (8, 56, 64, 72, 128, 520)),
    *(Shape(520, 512, inter) for inter in (8, 56, 64, 72, 120, 128, 136, 1000)),
    Shape(4096, 2048, 8192),
    Shape(2049, 4096, 14336),
    Shape(8200, 520, 1032, bias=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_on_a_gpu_gate_and_up_are_joined(shape, dtype, assert_close, guarded_outputs):
    tensors = inputs(shape, dtype, "cuda")
    assert_close(gate_up(*tensors), oracle(*tensors), **tolerance(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_on_a_gpu_gates_of_any_size(dtype, assert_close):
    tensors = inputs(Shape(1000, 512, 1000), dtype, "cuda", scale=60.0)
    out = gate_up(*tensors)
    assert_close(out, oracle(*tensors), **tolerance(dtype))
    assert out[oracle(*tensors).abs() < 1e-20].double().abs().amax() < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("group_m", [1, 5, 16])
def test_on_a_gpu_every_choice_gives_the_same_bits(num_stages, group_m, monkeypatch):
    tensors = inputs(Shape(1111, 1096, 1544), BF16, "cuda")
    usual = gate_up(*tensors)
    monkeypatch.setattr(module, "hopper_gate_up_config", lambda *shape: replace(CONFIG, num_stages=num_stages, group_m=group_m))
    assert torch.equal(gate_up(*tensors), usual)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape(2500, 2048, 8192), Shape(300, 64, 40000), Shape(3000, 200, 4104)], ids=str)
def test_a_hundred_runs_give_the_same_bits(shape):
    """A race in the rings or in the stores would show as a difference between runs."""
    tensors = inputs(shape, BF16, "cuda")
    first = gate_up(*tensors)
    assert not first.isnan().any()
    for _ in range(100):
        assert torch.equal(gate_up(*tensors), first)


@pytest.mark.gpu
def test_a_graph_replays_it_with_other_values(assert_close):
    """Descriptors are values of the launch, x and W are read anew."""
    x, weight, _ = inputs(Shape(700, 512, 1000), BF16, "cuda")
    gate_up(x, weight)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gate_up(x, weight)
    x.normal_()
    weight.normal_().mul_(0.04)
    graph.replay()
    assert_close(out, oracle(x, weight, None), **tolerance(BF16))
