"""Quantised weights and KV pages on every column against loops over single values: the formulas of ops/operands.py."""

import math

import numpy as np
import pytest
import torch

from turbotriton.backend.ops.operands import (
    AttentionBatch,
    Fp8Weight,
    NormWeight,
    QkvWeights,
    QuantizedPages,
    StaticInt8Pages,
    W4A16Weight,
    W8A8Weight,
)
from turbotriton.backend.ops.packing import pack_rows, unpack_gptq_weight, unpack_gptq_zeros, unpack_rows
from turbotriton.backend.ops.reference.attention import quantized_decode_attention
from turbotriton.backend.ops.reference.kv_pages import gathered_pages, page_shape, store_pages
from turbotriton.backend.ops.reference.linear import linear
from turbotriton.backend.ops.table import REFERENCE

torch.set_num_threads(1)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
def test_w4a16_multiplies_by_nibble_less_zero_times_scale(bias: bool) -> None:
    rows, columns, group = 12, 10, 4
    nibbles = (randn(rows, columns).abs() * 8).long().clamp(0, 15).to(torch.uint8)
    zeros = (randn(3, columns, seed=1).abs() * 8).long().clamp(0, 15).to(torch.uint8)
    scales = randn(3, columns, seed=2).half()
    weight = W4A16Weight(pack_rows(nibbles), scales, zeros, randn(columns, seed=3) if bias else None)
    assert weight.group_size == group
    assert weight.num_elements == rows * columns
    x = randn(5, rows, seed=4)
    wanted = np.zeros((5, columns))
    for t in range(5):
        for m in range(columns):
            for k in range(rows):
                value = (int(nibbles[k, m]) - int(zeros[k // group, m])) * float(scales[k // group, m])
                wanted[t, m] += float(x[t, k]) * value
            wanted[t, m] += float(weight.bias[m]) if weight.bias is not None else 0
    np.testing.assert_allclose(linear(x, weight).numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_w8a8_sums_integers_exactly(bias: bool) -> None:
    weight = (randn(40, 6) * 60).round().clamp(-127, 127).to(torch.int8)
    scale, x = randn(6, seed=1).abs(), randn(4, 40, seed=2)
    x[2] = 0
    b = randn(6, seed=3) if bias else None
    found = linear(x, W8A8Weight(weight, scale, b))
    for t in range(4):
        step = np.float32(max(float(x[t].abs().max()), 1e-7)) / np.float32(127)
        x8 = [int(np.rint(np.float32(value) / step)) for value in x[t]]
        for m in range(6):
            total = sum(a * int(w) for a, w in zip(x8, weight[:, m], strict=True))
            wanted = total * float(step) * float(scale[m]) + (float(b[m]) if b is not None else 0)
            assert float(found[t, m]) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_fp8_sums_products_of_rounded_values() -> None:
    weight = randn(24, 5).to(torch.float8_e4m3fn)
    scale, x = randn(5, seed=1).abs(), randn(3, 24, seed=2) * 100
    found = linear(x, Fp8Weight(weight, scale))
    for t in range(3):
        step = float(x[t].abs().max()) / 448
        x8 = [float(torch.tensor(float(value) / step).to(torch.float8_e4m3fn)) for value in x[t]]
        for m in range(5):
            total = sum(a * float(w) for a, w in zip(x8, weight[:, m], strict=True))
            assert float(found[t, m]) == pytest.approx(total * step * float(scale[m]), rel=2e-4, abs=1e-3)


BLOCK, HEADS, DIM = 4, 2, 8


def empty_pages(kind: str, num_blocks: int = 3) -> QuantizedPages | StaticInt8Pages:
    if kind == "static":
        data = torch.zeros(num_blocks, HEADS, BLOCK, DIM, dtype=torch.uint8)
        return StaticInt8Pages(data, torch.tensor([0.02, 0.03]), torch.tensor([0.1, -0.2]))
    bits = 4 if kind == "4" else 8
    data = torch.zeros(num_blocks, HEADS, BLOCK, DIM * bits // 8, dtype=torch.uint8)
    return QuantizedPages(data, torch.zeros(num_blocks, HEADS, BLOCK, 2), bits, None, kind == "fp8")


def stored_by_loops(pages: QuantizedPages | StaticInt8Pages, head: int, values: list[float]) -> list[float]:
    """What a head's values become."""
    if isinstance(pages, StaticInt8Pages):
        scale, zero = float(pages.scale[head]), float(pages.zero[head])
        q = [min(255, max(0, int(np.rint((v - zero) / scale + 128)))) for v in values]
        return [(n - 128) * scale + zero for n in q]
    if pages.e4m3:
        step = max(abs(v) for v in values) / 448
        numbers = [(1 + m / 8) * 2.0 ** (e - 7) if e else m * 2.0**-9 for e in range(16) for m in range(8)][:-1]
        return [math.copysign(min(numbers, key=lambda n: abs(n - abs(v) / step)) * step, v) for v in values]
    steps = 2**pages.bits - 1
    scale, zero = np.float32((max(values) - min(values)) / steps), np.float32(min(values))
    q = [0 if scale == 0 else min(steps, max(0, int(np.rint((np.float32(v) - zero) / scale)))) for v in values]
    return [float(n * scale + zero) for n in q]


@pytest.mark.parametrize("kind", ["8", "4", "fp8", "static"])
def test_stored_tokens_come_back_as_their_class_defines(kind: str) -> None:
    pages, slots = empty_pages(kind), torch.tensor([1, 9, -1, 6])
    values = randn(4, HEADS, DIM)
    values[1, 0] = 0.757  # no range at all
    values[3, 1] *= 30  # past a static scale's range
    before = pages.data.clone()
    store_pages(pages, slots, values)
    assert page_shape(pages) == (3, HEADS, BLOCK, DIM)
    back = gathered_pages(pages, torch.arange(3))
    written = torch.zeros(3, BLOCK, dtype=torch.bool)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        written[slot // BLOCK, slot % BLOCK] = True
        for head in range(HEADS):
            wanted = stored_by_loops(pages, head, values[token, head].tolist())
            np.testing.assert_allclose(back[slot // BLOCK, head, slot % BLOCK].numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(pages.data.transpose(1, 2)[~written], before.transpose(1, 2)[~written])


def test_keys_in_halves_are_stored_less_their_offset() -> None:
    """Each half of a head has its own scale; what comes back is the key less the offset."""
    offset = torch.randn(HEADS, DIM) * 5
    data = torch.zeros(3, HEADS, BLOCK, DIM // 2, dtype=torch.uint8)
    pages = QuantizedPages(data, torch.zeros(3, HEADS, BLOCK, 4), 4, offset)
    values, slots = randn(3, HEADS, DIM) + offset, torch.tensor([2, 9, 4])
    store_pages(pages, slots, values)
    back, half = gathered_pages(pages, torch.arange(3)), QuantizedPages(data, torch.zeros(3, HEADS, BLOCK, 2), 4)
    for token, slot in enumerate(slots.tolist()):
        for head in range(HEADS):
            less = (values[token, head] - offset[head]).tolist()
            first, second = (stored_by_loops(half, head, part) for part in (less[: DIM // 2], less[DIM // 2 :]))
            found = back[slot // BLOCK, head, slot % BLOCK].numpy()
            np.testing.assert_allclose(found, first + second, rtol=1e-4, atol=1e-5)


def test_a_constant_taken_off_every_key_leaves_attention_as_it_is() -> None:
    q, k, v = randn(1, HEADS, DIM), randn(12, HEADS, DIM), randn(12, HEADS, DIM, seed=3)
    tables, lens = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([11], dtype=torch.int32)
    found = []
    for offset in (None, torch.randn(HEADS, DIM)):
        pages = [QuantizedPages(torch.zeros(3, HEADS, BLOCK, DIM, dtype=torch.uint8), torch.zeros(3, HEADS, BLOCK, 2), 8, o)
                 for o in (offset, None)]  # fmt: skip
        for p, values in zip(pages, (k, v), strict=True):
            store_pages(p, torch.arange(12), values)
        found.append(quantized_decode_attention(q, *pages, tables, lens, 0.3))
    assert torch.allclose(*found, atol=0.02)


def test_int4_bytes_hold_dim_j_low_and_dim_j_plus_half_high() -> None:
    pages = empty_pages("4")
    assert isinstance(pages, QuantizedPages)
    store_pages(
        pages, torch.tensor([0]), torch.arange(16.0).view(1, HEADS, DIM)[:, :, :] * torch.tensor([1.0, 2.0])[None, :, None]
    )
    # head 0 holds 0..7 in steps of 7 / 15
    q = [int(np.rint(np.float32(v) / np.float32(7 / 15))) for v in range(8)]
    assert pages.data[0, 0, 0].tolist() == [q[j] | q[j + 4] << 4 for j in range(4)]


@pytest.mark.parametrize("kind", ["8", "4", "static"])
def test_a_step_over_quantised_pages_is_a_step_over_their_values(kind: str) -> None:
    """norm_qkv_rotary_store then attention; wanted: softmax over the pages' values, float64, token by token."""
    hidden, num_heads = 24, 4
    contexts, queries = [6, 3, 9], [1, 3, 2]
    tables = torch.tensor([[2, 0, 0], [5, 0, 0], [1, 4, 3]], dtype=torch.int32)
    pages = tuple(empty_pages(kind, 7) for _ in "kv")
    old = torch.tensor([t * BLOCK + s for t in (2, 0, 1, 4, 3) for s in range(BLOCK)])
    tables[0, 1] = 0
    for at, part in enumerate(pages):
        store_pages(part, old, randn(len(old), HEADS, DIM, seed=9 + at))
    slots = [
        int(tables[row, p // BLOCK]) * BLOCK + p % BLOCK
        for row, (n, length) in enumerate(zip(queries, contexts, strict=True))
        for p in range(length - n, length)
    ]
    angle = randn(6, DIM // 2, seed=3)
    batch = AttentionBatch(
        cos=angle.cos(),
        sin=angle.sin(),
        q_scale=None,
        slot_mapping=torch.tensor(slots),
        block_tables=tables,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        num_decodes=1,
        max_decode_context=6,
        cu_seqlens_q=torch.tensor([0, 3, 5], dtype=torch.int32),
        prefills=((3, 3), (2, 9)),
    )
    matrix = (randn(hidden, (num_heads + 2 * HEADS) * DIM) * 40).round().clamp(-127, 127).to(torch.int8)
    weights = QkvWeights(NormWeight(torch.ones(hidden), 1e-5), W8A8Weight(matrix, torch.full((64,), 0.004)))
    x = randn(6, hidden, seed=5)
    q, residual = REFERENCE.norm_qkv_rotary_store(x, None, weights, batch, *pages)
    assert torch.equal(residual, x)
    attended = REFERENCE.attention(q, *pages, batch, 0.3, 4)
    k, v = (gathered_pages(part, torch.arange(7)).double() for part in pages)
    token = 0
    for row, (n, length) in enumerate(zip(queries, contexts, strict=True)):
        for position in range(length - n, length):
            seen = range(max(0, position - 3), position + 1)
            for head in range(num_heads):
                places = [(int(tables[row, p // BLOCK]), head // 2, p % BLOCK) for p in seen]
                scores = torch.stack([q[token, head].double() @ k[place] for place in places]) * 0.3
                wanted = sum(w * v[place] for w, place in zip(torch.softmax(scores, 0), places, strict=True))
                torch.testing.assert_close(attended[token, head].double(), wanted, rtol=1e-5, atol=1e-5)
            token += 1


def test_rows_of_nibbles_and_gptqs_words_by_index() -> None:
    nibbles = (randn(16, 8).abs() * 9).long().clamp(0, 15).to(torch.uint8)
    packed = pack_rows(nibbles)
    assert all(int(packed[i, m]) == int(nibbles[2 * i, m]) + 16 * int(nibbles[2 * i + 1, m]) for i in range(8) for m in range(8))
    assert torch.equal(unpack_rows(packed), nibbles)
    words = torch.zeros(2, 8, dtype=torch.int64)
    zeros = torch.zeros(2, 1, dtype=torch.int64)
    for m in range(8):
        for k in range(16):
            words[k // 8, m] |= int(nibbles[k, m]) << 4 * (k % 8)
        for group in range(2):
            zeros[group, 0] |= ((int(nibbles[group, m]) - 1) % 16) << 4 * m
    as_int32 = [torch.from_numpy(t.numpy().astype(np.uint32).view(np.int32)) for t in (words, zeros)]
    assert torch.equal(unpack_gptq_weight(as_int32[0]), nibbles)
    assert torch.equal(unpack_gptq_zeros(as_int32[1], plus_one=True), nibbles[:2])
    assert torch.equal(unpack_gptq_zeros(as_int32[1], plus_one=False), (nibbles[:2].int() - 1).remainder(16).to(torch.uint8))
