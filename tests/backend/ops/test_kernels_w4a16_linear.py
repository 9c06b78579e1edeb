"""The W4A16 kernels against float64, and the order of their words against plain index work.

Tolerance: the weights are those of the formula bit for bit and sums are fp32, so the result's one rounding decides: eps / 2. Where
scales come after the product, weights are not rounded, and their roundings (0.2 eps of the result, rms) are missing.
"""

import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from tests.backend.ops.conftest import TARGETS, Target

from turbotriton.backend.ops.kernels import w4a16_linear as module
from turbotriton.backend.ops.kernels import w4a16_words as words_module
from turbotriton.backend.ops.kernels.tuning import W4A16LinearConfig
from turbotriton.backend.ops.kernels.w4a16_dequantize import dequantize_w4a16
from turbotriton.backend.ops.kernels.w4a16_linear import w4a16_gate_up, w4a16_linear
from turbotriton.backend.ops.operands import W4A16Tiles, W4A16Weight
from turbotriton.backend.ops.packing import fragment_params, interleave_gate_up, pack_fragments, pack_rows
from turbotriton.backend.ops.reference.linear import dequantized


class Shape(NamedTuple):
    num_rows: int
    k: int
    n: int
    group_size: int
    bias: bool = False


SHAPES = [
    Shape(1, 128, 64, 128),
    Shape(17, 256, 192, 128, bias=True),  # four warps; one row more than a padded tile's least
    Shape(3, 384, 128, 128, bias=True),
    Shape(70, 192, 64, 64),
]

OPTION_NAMES = ("ahead", "scale_after", "descriptors")
OPTIONS = [names for count in range(4) for names in itertools.combinations(OPTION_NAMES, count)]


@pytest.fixture(params=[case for case in TARGETS if "fp32" not in str(case.id)])
def target(request):
    device, dtype = request.param
    return Target(device, dtype, torch.Generator().manual_seed(0))


def weight_of(target, shape, *, gated=False):
    """(the kernels' weight, its values [k, n] in float64 and natural order)"""
    generator = target.generator
    nibbles = torch.randint(0, 16, (shape.k, shape.n), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (shape.k // shape.group_size, shape.n), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(zeros.shape, generator=generator) * 0.02 + 0.001).half()
    bias = target.randn(shape.n) if shape.bias else None
    group = torch.arange(shape.k) // shape.group_size
    exact = (nibbles.double() - zeros[group].double()) * scales.to(target.dtype)[group].double()
    assert torch.equal(
        dequantized(W4A16Weight(pack_rows(nibbles), scales, zeros), target.dtype).double(), exact.to(target.dtype).double()
    )
    parts = [interleave_gate_up(part) for part in (nibbles, scales, zeros)] if gated else [nibbles, scales, zeros]
    words, params = pack_fragments(parts[0]).to(target.device), fragment_params(*parts[1:], target.dtype).to(target.device)
    return W4A16Tiles(words, params, bias, target.dtype, gated), exact.to(target.dtype).double().to(target.device)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_linear_is_the_product_with_the_values(target, shape, assert_close, guarded_outputs):
    weight, values = weight_of(target, shape)
    x = target.randn(shape.num_rows, shape.k + 8)[:, :-8]  # rows of another stride
    wanted = x.double() @ values + (0 if weight.bias is None else weight.bias.double())
    assert_close(w4a16_linear(x, weight), wanted, max_error=2 * target.eps + 2e-6, rms_error=0.6 * target.eps + 1e-6)


@pytest.mark.parametrize("num_splits", [2, 3])
def test_splits_of_the_inputs_are_summed_in_order(target, num_splits, assert_close, guarded_outputs, monkeypatch):
    shape = Shape(19, 640, 192, 128, bias=True)
    weight, values = weight_of(target, shape)
    choose = module.w4a16_linear_config
    monkeypatch.setattr(
        module, "w4a16_linear_config", lambda *args, **facts: replace(choose(*args, **facts), num_splits=num_splits)
    )
    x = target.randn(shape.num_rows, shape.k)
    y = w4a16_linear(x, weight)
    wanted = x.double() @ values + weight.bias.double()
    assert_close(y, wanted, max_error=2 * target.eps + 2e-6, rms_error=0.6 * target.eps + 1e-6)
    assert torch.equal(w4a16_linear(x, weight), y), "the second launch did not find the counters as the first did"


@pytest.mark.parametrize("num_splits", [1, 2])
def test_gate_and_up_are_joined(target, num_splits, assert_close, guarded_outputs, monkeypatch):
    shape = Shape(18, 256, 256, 64, bias=True)
    weight, values = weight_of(target, shape, gated=True)
    choose = module.w4a16_linear_config
    monkeypatch.setattr(
        module, "w4a16_linear_config", lambda *args, **facts: replace(choose(*args, **facts), num_splits=num_splits)
    )
    x = target.randn(shape.num_rows, shape.k)
    gate, up = (x.double() @ values + weight.bias.double()).to(target.dtype).double().chunk(2, dim=1)
    wanted = torch.nn.functional.silu(gate) * up
    assert_close(w4a16_gate_up(x, weight), wanted, max_error=8 * target.eps, rms_error=1.5 * target.eps)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_of_a_tile(target, options, num_splits, assert_close, guarded_outputs, monkeypatch):
    gated = "scale_after" in options
    if "descriptors" in options and target.device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the copy engine comes with sm_90")
    num_warps = 4 if target.device == "cuda" else 2  # what Hopper's instruction takes; interpreted, less work
    shape = Shape(19, 256, 64 * num_warps, 128, bias=True)
    weight, values = weight_of(target, shape, gated=gated)
    config = W4A16LinearConfig(
        16, 64, num_splits, num_warps, num_stages=3, **{name: 2 if name == "ahead" else True for name in options}
    )
    monkeypatch.setattr(module, "w4a16_linear_config", lambda *args, **facts: config)
    x = target.randn(shape.num_rows, shape.k + 8)[:, :-8]
    y = (w4a16_gate_up if gated else w4a16_linear)(x, weight)
    wanted = x.double() @ values + weight.bias.double()
    tolerance = {"max_error": 2 * target.eps + 2e-6, "rms_error": 0.6 * target.eps + 1e-6}
    if gated:
        gate, up = wanted.to(target.dtype).double().chunk(2, dim=1)
        wanted, tolerance = torch.nn.functional.silu(gate) * up, {"max_error": 8 * target.eps, "rms_error": 1.5 * target.eps}
    assert_close(y, wanted, **tolerance)
    assert torch.equal((w4a16_gate_up if gated else w4a16_linear)(x, weight), y), "counters did not return to zero"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_rows", "options"),
    [
        *((num_rows, {}) for num_rows in (1, 16, 64, 256)),
        (16, {"scale_after": True}),
        (16, {"ahead": 2, "num_stages": 3}),
        (16, {"ahead": 0, "scale_after": False}),
        (16, {"ahead": 2, "scale_after": True, "num_stages": 3}),
        (64, {"ahead": 0, "num_stages": 6, "num_warps": 8}),
        (256, {"block_m": 256, "num_stages": 3, "descriptors": True}),
    ],
    ids=str,
)
def test_long_sums_are_right_again_and_again(num_rows, options, assert_close, monkeypatch):
    """Matrix instructions of one step read registers that the next step writes: without a wait between them, sums were wrong here."""
    if options.get("descriptors") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the copy engine comes with sm_90")
    target = Target("cuda", torch.bfloat16, torch.Generator().manual_seed(0))
    weight, values = weight_of(target, Shape(num_rows, 4096, 1024, 128))
    choose = module.w4a16_linear_config
    monkeypatch.setattr(module, "w4a16_linear_config", lambda *args, **facts: replace(choose(*args, **facts), **options))
    x = target.randn(num_rows, 4096)
    y = w4a16_linear(x, weight)
    assert_close(y, x.double() @ values, max_error=2 * target.eps + 2e-6, rms_error=0.6 * target.eps + 1e-6)
    assert all(torch.equal(w4a16_linear(x, weight), y) for _ in range(200))


def test_no_rows(target):
    weight, _ = weight_of(target, SHAPES[0])
    assert w4a16_linear(target.randn(0, 128), weight).shape == (0, 64)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [Shape(0, 256, 192, 128), Shape(0, 192, 64, 64)], ids=lambda shape: "-".join(map(str, shape)))
def test_dequantised_values_are_the_formulas_bit_for_bit(target, shape, gated, guarded_outputs):
    weight, values = weight_of(target, shape, gated=gated)
    assert torch.equal(dequantize_w4a16(weight).double(), values)


def test_words_by_index():
    nibbles = torch.randint(0, 16, (128, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    words = pack_fragments(nibbles)
    assert words.shape == (2, 2, 32, 4)
    for k in range(128):
        for m in range(32):
            lane = m % 8 * 4 + k % 8 // 2
            word = int(words[m // 16, k // 64, lane, k % 64 // 32 * 2 + m % 16 // 8])
            assert word >> (k % 2 * 16 + k % 16 // 8 * 8 + k % 32 // 16 * 4) & 15 == nibbles[k, m]


@pytest.mark.parametrize(("kind", "dtype", "offset"), [("bf16x2", torch.bfloat16, 128), ("f16x2", torch.float16, 1024)])
@pytest.mark.parametrize("form", ["steps", "weights"])
def test_the_instructions_that_widen_give_the_numbers(kind, dtype, offset, form):
    """No GPU runs them here: they are carried out line by line, a register as two numbers."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(-(2**31), 2**31, (2, 500), generator=generator)
    zeros = torch.randint(0, 16, (2, 500), generator=generator)
    scales = (torch.rand((2, 500), generator=generator) + 0.01).to(dtype)

    def twice(number):
        bits = number.to(dtype).view(torch.int16).long() & 0xFFFF
        return bits << 16 | bits

    def halves(register):
        return [(register >> shift & 0xFFFF).to(torch.int16).view(dtype).double() for shift in (0, 16)]

    operands = [twice(-(zero + offset)) for zero in zeros]
    if kind == "f16x2":
        operands += [twice(-(zero + 64)) for zero in zeros]
    operands += [twice(scale) for scale in scales] if form == "weights" else []
    registers = {"$8": words[0] & 0xFFFFFFFF, "$9": words[1] & 0xFFFFFFFF}
    registers |= {f"${10 + 2 * i + j}": operand for i, operand in enumerate(operands) for j in (0, 1)}
    for line in words_module._asm(kind, form).splitlines()[2:-1]:
        name, into, *sources = line.strip().rstrip(";").replace(",", "").split()
        values = [registers[text] if text in registers else torch.tensor(int(text, 0)) for text in sources]
        if name == "mov.b32":
            registers[into] = values[0]
        elif name == "shr.b32":
            registers[into] = values[0] >> values[1]
        elif name == "lop3.b32":
            assert sources[3] == "0xEA", "(a and b) or c"
            registers[into] = values[0] & values[1] | values[2]
        else:
            assert name == f"fma.rn.{kind}"
            low, high = (twice(a * b + c) & 0xFFFF for a, b, c in zip(*map(halves, values), strict=True))
            registers[into] = high << 16 | low
    for i in range(8):
        word, k8, k16 = i // 4, i % 4 // 2, i % 2
        for k1, number in enumerate(halves(registers[f"${i}"])):
            nibble = words[word] >> (k1 * 16 + k8 * 8 + k16 * 4) & 15
            wanted = nibble - zeros[word]
            wanted = (wanted.double() * scales[word].double()).to(dtype) if form == "weights" else wanted
            assert torch.equal(number, wanted.double()), f"output {i}, half {k1}"


def test_gates_and_ups_by_index():
    strips = interleave_gate_up(torch.arange(64)[None])[0].tolist()
    assert all(strips[16 * i + j] == 8 * i + j and strips[16 * i + 8 + j] == 32 + 8 * i + j for i in range(4) for j in range(8))
