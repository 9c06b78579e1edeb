"""Each op that a step launches is launched by its key as triton launches it: with other weights, other rows, with and without what may be
None. launch_recorder.py says what is compared.
"""

import pkgutil
from importlib import import_module

import pytest
import torch
from tests.backend.ops.launch_recorder import assert_same, recorded_launches

from turbotriton.backend.ops import kernels
from turbotriton.backend.ops.operands import (
    Fp8Weight,
    QuantizedPages,
    QuantizedRows,
    SplitSums,
    StaticInt8Pages,
    W4A16Tiles,
    W8A8Weight,
)

BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


def empty(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def operations():
    """Of each op that a step with prompts launches: calls with other weights, other rows, with and without what may be None."""
    package = f"{kernels.__name__}."
    names = ("rms_norm", "rotary_store_kv", "silu_and_mul", "paged_decode_attention", "paged_prefill_attention")
    rms_norm, rotary, silu, decode, prefill = (getattr(import_module(package + name), name) for name in names)
    turning_decode = import_module(package + "paged_decode_attention").rotary_decode_attention
    gate_up = import_module(package + "hopper_gate_up").gate_up
    w4a16 = import_module(package + "w4a16_linear")
    norms = [empty(512) for _ in range(3)]
    x = empty(600, 512)
    pages = [(empty(20, 2, 64, 128), empty(20, 2, 64, 128)) for _ in range(2)]
    cos, slots = empty(600, 64, dtype=FP32), torch.zeros(600, dtype=torch.int64)
    tables, lens = torch.zeros((103, 64), dtype=torch.int32), torch.ones(103, dtype=torch.int32)
    cu_seqlens = torch.zeros(4, dtype=torch.int32)
    qkv, gate_and_up = empty(600, 1536), empty(600, 1024)
    q, scales = empty(600, 8, 128), empty(600, dtype=FP32)
    gated = [empty(2048, 512).t() for _ in range(2)]

    def tiles(k, n, *, is_gated=False):
        words, params = empty(n // 16, k // 64, 32, 4, dtype=torch.int32), empty(k // 128, n, dtype=torch.int32)
        return W4A16Tiles(words, params, None, BF16, is_gated)

    narrow, wide = [tiles(512, 768) for _ in range(2)], [tiles(512, 1024, is_gated=True) for _ in range(2)]
    return {
        "rms_norm": [
            *(lambda w=w, r=r: rms_norm(x, w, 1e-5, r) for w in norms for r in (None, x)),
            *(lambda n=n: rms_norm(x[:n], norms[0], 1e-6, x[:n]) for n in (1, 16, 599)),
        ],
        "rotary": [
            lambda kv=kv, scale=scale, n=n: rotary(qkv[:n], cos[:n], cos[:n], scale, *kv, slots[:n], 8, 2)
            for kv in pages
            for scale in (None, scales)
            for n in (600, 1)
        ],
        "silu": [lambda n=n: silu(gate_and_up[:n]) for n in (1, 600)],
        "decode": [
            lambda kv=kv, n=n, first=first: decode(q[:n], *kv, tables[first : first + n, :16], lens[first : first + n], 0.1, 0)
            for kv in pages
            for n in (1, 100)
            for first in (0, 1)
        ],
        "decode that turns": [
            lambda kv=kv, x=x, scale=scale: turning_decode(
                x,
                cos[: x.shape[0]],
                cos[: x.shape[0]],
                scale,
                *kv,
                slots[: x.shape[0]],
                tables[: x.shape[0]],
                lens[: x.shape[0]],
                0.1,
            )
            for kv in pages
            for x in (
                qkv[:1],
                qkv[:100],
                SplitSums(empty(2, 1, 1536, dtype=FP32), BF16),
                SplitSums(empty(2, 100, 1536, dtype=FP32), BF16),
            )
            for scale in (None, scales)
        ],
        "prefill": [
            lambda kv=kv, n=n: prefill(q[n:], *kv, tables[n:], lens[n:], cu_seqlens[: 104 - n], 0.1, 0)
            for kv in pages
            for n in (100, 101)
        ],
        "gate_up": [lambda w=w, n=n: gate_up(x[:n], w) for w in gated for n in (256, 600)],
        "w4a16": [
            *(lambda w=w, n=n: w4a16.w4a16_linear(x[:n], w) for w in narrow for n in (40, 160, 300)),
            *(lambda w=w, n=n: w4a16.w4a16_gate_up(x[:n], w) for w in wide for n in (40, 300)),
        ],
    }


def operations_of_8_and_4_bits():
    """The same of quantised keys and weights, and of the kernels that few rows and other chips have."""
    package = f"{kernels.__name__}."
    names = "rotary_store_quantized_kv", "quantized_decode_attention", "quantized_prefill_attention", "w8a8_linear"
    store, decode, prefill, w8a8_linear = (getattr(import_module(package + name), name) for name in names)
    gate_up = import_module(package + "w8a8_linear").w8a8_gate_up
    rows = import_module(package + "quantize_rows")
    narrow, w4a16 = import_module(package + "narrow_linear"), import_module(package + "w4a16_linear")
    stage = import_module(package + "stage_decode")
    dequantize = import_module(package + "w4a16_dequantize").dequantize_w4a16
    x, residual, norm, qkv = empty(600, 512), empty(600, 512), empty(512), empty(600, 1536)
    cos, slots = empty(600, 64, dtype=FP32), torch.zeros(600, dtype=torch.int64)
    q, tables, lens = empty(600, 8, 128), torch.zeros((103, 64), dtype=torch.int32), torch.ones(103, dtype=torch.int32)
    starts = torch.zeros(4, dtype=torch.int32)

    def pages(bits, num_parts):
        data = empty(20, 2, 64, 16 * bits, dtype=torch.uint8)
        return QuantizedPages(data, empty(20, 2, 64, 2 * num_parts), bits)

    def fixed():
        return StaticInt8Pages(empty(20, 2, 64, 128, dtype=torch.uint8), empty(2, dtype=FP32), empty(2, dtype=FP32))

    caches = [(pages(8, 1), pages(8, 1)), (pages(8, 1), pages(8, 1)), (pages(4, 2), pages(4, 1)), (fixed(), fixed())]
    prompts = ((100, 128), (200, 200), (200, 300))
    dense, bias = [empty(1024, 512).t() for _ in range(2)], empty(1024)
    token_ids, staged = empty(300, 21, dtype=torch.int32), {n: torch.zeros((2, n), dtype=torch.int64) for n in (1, 3, 40, 256)}
    int8 = [W8A8Weight(empty(1024, 512, dtype=torch.int8).t(), empty(1024, dtype=FP32)) for _ in range(2)]
    wide = [W8A8Weight(empty(12288, 128, dtype=torch.int8).t(), empty(12288, dtype=FP32)) for _ in range(2)]
    fp8 = [Fp8Weight(empty(1024, 512, dtype=FP8).t(), empty(1024, dtype=FP32)) for _ in range(2)]
    words = [empty(64, 8, 32, 4, dtype=torch.int32) for _ in range(2)]
    tiles = [W4A16Tiles(each, empty(4, 1024, dtype=torch.int32), None, BF16) for each in words]

    def eight_bit(n, weight, op=w8a8_linear):
        values = empty(640, weight.weight.shape[0], dtype=weight.weight.dtype)
        return lambda: op(QuantizedRows(values, scales, n, BF16), weight)

    scales = empty(640, dtype=FP32)
    return {
        "store": [
            lambda kv=kv, n=n: store(qkv[:n], cos[:n], cos[:n], None, *kv, slots[:n], 8, 2) for kv in caches for n in (1, 600)
        ],
        "decode of codes": [lambda kv=kv, n=n: decode(q[:n], *kv, tables[:n], lens[:n], 0.1) for kv in caches for n in (2, 100)],
        "prefill of codes": [
            lambda kv=kv: prefill(q[100:], *kv, tables[100:], lens[100:], starts, 0.1, 0, prompts) for kv in caches
        ],
        "rows": [
            *(lambda dtype=dtype, n=n: rows.quantize_rows(x[:n], dtype) for dtype in (FP8, torch.int8) for n in (1, 600)),
            *(lambda r=r, n=n: rows.rms_norm_rows(x[:n], norm, 1e-5, r, torch.int8) for r in (None, residual) for n in (1, 600)),
            *(lambda dtype=dtype: rows.silu_and_mul_rows(qkv, dtype) for dtype in (FP8, torch.int8)),
        ],
        "8 bit": [
            *(eight_bit(n, w) for w in int8 for n in (8, 200, 600)),
            *(eight_bit(n, w) for w in fp8 for n in (8, 60)),
            *(eight_bit(n, w, gate_up) for w in wide for n in (200, 250)),
        ],
        "narrow": [
            *(lambda w=w, n=n: narrow.linear(x[:n], w) for w in dense for n in (2, 40)),
            *(lambda w=w, n=n: narrow.gate_up(x[:n], w) for w in dense for n in (2, 40, 100)),
            *(lambda w=w, n=n, b=b: narrow.split_linear(x[:n], w, b) for w in dense for n in (2, 40, 100) for b in (None, bias)),
        ],
        "advance": [
            lambda n=n, inputs=inputs: stage.advance_decode(*inputs.unbind(), token_ids, slots[:n])
            for n, inputs in staged.items()
        ],
        "w4a16 of few": [lambda w=w, n=n: w4a16.w4a16_linear(x[:n], w) for w in tiles for n in (1, 16, 32)],
        "dequantize": [lambda w=w: dequantize(w) for w in tiles],
    }


@pytest.fixture
def hopper(monkeypatch):
    facts = {"num_sms": 132, "is_hopper": True, "has_pdl": True, "_compute_capability": 90}
    with recorded_launches(monkeypatch) as launched:
        for info in pkgutil.iter_modules(kernels.__path__):
            module = import_module(f"{kernels.__name__}.{info.name}")
            for fact, value in facts.items():
                if hasattr(module, fact):
                    monkeypatch.setattr(module, fact, lambda device, value=value: value)
        yield launched


@pytest.mark.parametrize(
    "name",
    [
        *("rms_norm", "rotary", "silu", "decode", "decode that turns", "prefill", "gate_up"),
        pytest.param("w4a16", marks=pytest.mark.slow),
        *("store", "decode of codes", "prefill of codes", "rows", "8 bit", "narrow", "advance", "w4a16 of few", "dequantize"),
    ],
)
def test_an_op_launches_what_it_launches_plainly(hopper, monkeypatch, name):
    runs = (operations() | operations_of_8_and_4_bits())[name]
    outputs: dict[object, torch.Tensor] = {}

    def same_output(shape, dtype, device):
        key = tuple(shape), dtype
        if key not in outputs:
            outputs[key] = empty(*shape, dtype=dtype)
        return outputs[key]

    monkeypatch.setattr(torch, "empty", same_output)
    monkeypatch.setattr(torch, "empty_like", lambda x: same_output(x.shape, x.dtype, x.device))
    assert_same(hopper, monkeypatch, runs)
