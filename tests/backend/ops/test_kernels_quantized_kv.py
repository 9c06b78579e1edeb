"""The kernels over quantised pages: what is stored equals the reference bit for bit where no tie decides; attention against float64."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from tests.backend.ops.conftest import Target

from turbotriton.backend.ops.kernels import quantized_decode_attention as module
from turbotriton.backend.ops.kernels import quantized_prefill_attention as prefill_module
from turbotriton.backend.ops.kernels.quantized_decode_attention import quantized_decode_attention
from turbotriton.backend.ops.kernels.quantized_prefill_attention import quantized_prefill_attention
from turbotriton.backend.ops.kernels.rotary_store_quantized_kv import rotary_store_quantized_kv
from turbotriton.backend.ops.operands import QuantizedPages, StaticInt8Pages
from turbotriton.backend.ops.reference import kv_pages


class Shape(NamedTuple):
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int


SHAPES = [Shape(1, 1, 1, 16, 16, 8), Shape(7, 6, 3, 40, 24, 5), Shape(3, 8, 2, 128, 128, 64), Shape(3, 5, 5, 96, 2, 16)]
KINDS = ["8", "4", "fp8", "static"]


def pages(target, kind, num_blocks, num_kv_heads, block_size, head_dim, *, keys=False):
    """Filled with bytes and NaN that must stay where no token is stored."""
    device = target.device
    width = head_dim // 2 if kind == "4" else head_dim
    data = torch.full((num_blocks, num_kv_heads, block_size, width), 0xA5, dtype=torch.uint8, device=device)
    if kind == "static":
        scale = target.randn_fp32(num_kv_heads).abs() * 0.01 + 0.005
        return StaticInt8Pages(data, scale, target.randn_fp32(num_kv_heads) * 0.1)
    in_halves, bits = keys and kind == "4", 4 if kind == "4" else 8
    params = torch.full(
        (num_blocks, num_kv_heads, block_size, 4 if in_halves else 2), float("nan"), dtype=target.dtype, device=device
    )
    offset = target.randn_fp32(num_kv_heads, head_dim) if in_halves else None
    return QuantizedPages(data, params, bits, offset, kind == "fp8")


def copy_of(p):
    return (
        StaticInt8Pages(p.data.clone(), p.scale, p.zero)
        if isinstance(p, StaticInt8Pages)
        else QuantizedPages(p.data.clone(), p.params.clone(), p.bits, p.offset, p.e4m3)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [*SHAPES[1:3], *(pytest.param(shape, marks=pytest.mark.slow) for shape in (SHAPES[0], SHAPES[3]))], ids=str
)
def test_store_equals_the_reference(target, shape, kind, assert_close):
    n, heads, kv_heads, d, rotary_dim, block_size = shape
    qkv = target.randn(n, (heads + 2 * kv_heads) * d + 3)[:, :-3]
    qkv[0, -d:] = 0.5  # a value head without range
    angle = target.randn_fp32(n, rotary_dim // 2) * 3
    cos, sin, q_scale = angle.cos(), angle.sin(), target.randn_fp32(n).abs() + 0.5
    num_blocks = -(-n // block_size) + 1
    slots = torch.randperm(num_blocks * block_size, generator=target.generator)[:n].to(target.device)
    slots[n // 2] = -1 if n > 1 else slots[0]
    ours = [pages(target, kind, num_blocks, kv_heads, block_size, d, keys=keys) for keys in (True, False)]
    theirs = [copy_of(p) for p in ours]
    q = rotary_store_quantized_kv(qkv, cos, sin, q_scale, *ours, slots, heads, kv_heads)
    wanted = kv_pages.rotary_store_quantized_kv(qkv, cos, sin, q_scale, *theirs, slots, heads, kv_heads)
    assert_close(q, wanted.double(), max_error=2 * target.eps + 1e-6, rms_error=target.eps + 1e-7)
    for found, expected in zip(ours, theirs, strict=True):
        if isinstance(found, QuantizedPages):
            assert torch.equal(found.params.isnan(), expected.params.isnan())
            difference = (found.params - expected.params).nan_to_num().abs()
            # rotary sums in another order: an ulp of k, which rounding to the dtype may widen to one of its own
            assert bool((difference <= 2 * target.eps * expected.params.nan_to_num().abs() + 1e-6).all())
        parts = [(p.data & 15, p.data >> 4) if kind == "4" else (p.data,) for p in (found, expected)]
        for a, b in zip(*parts, strict=True):
            steps = (a.int() - b.int()).abs()
            assert int(steps.max()) <= 1
            assert float((steps > 0).float().mean()) < 0.03, "more than ties differ"
    assert torch.equal(ours[1].data, theirs[1].data), "values are not rotated: no sum, no difference"


def test_no_tokens_store_nothing(target):
    p = pages(target, "8", 1, 2, 4, 16)
    cos = torch.zeros(0, 8, device=target.device)
    slots = torch.zeros(0, dtype=torch.int64, device=target.device)
    q = rotary_store_quantized_kv(target.randn(0, 128), cos, cos, None, p, copy_of(p), slots, 4, 2)
    assert q.shape == (0, 4, 16)
    assert bool((p.data == 0xA5).all())


class Case(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_lens: tuple[int, ...]
    sliding_window: int = 0


CASES = [
    Case(1, 1, 16, 16, (1,)),
    Case(6, 3, 40, 5, (1, 5, 33, 17)),
    Case(16, 1, 128, 64, (65, 3)),
    Case(4, 2, 80, 16, (0, 3, 0)),
    Case(4, 2, 32, 16, (600, 40, 300, 0)),  # several splits
    Case(4, 2, 64, 16, (200, 64, 65, 1), 64),
]


def stored(target, kind, case):
    """Pages of random values, blocks dealt in random order, the last block nobody's."""
    used = [-(-length // case.block_size) for length in case.context_lens]
    num_blocks = sum(used) + 1
    order = torch.randperm(num_blocks - 1, generator=target.generator).int().tolist()
    tables = torch.full((len(used), max(used) + 1), num_blocks - 1, dtype=torch.int32)
    for row, count in enumerate(used):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    parts = []
    for keys in (True, False):
        p = pages(target, kind, num_blocks, case.num_kv_heads, case.block_size, case.head_dim, keys=keys)
        slots = torch.arange((num_blocks - 1) * case.block_size, device=target.device)
        kv_pages.store_pages(p, slots, target.randn(len(slots), case.num_kv_heads, case.head_dim))
        parts.append(p)
    lens = torch.tensor(case.context_lens, dtype=torch.int32, device=target.device)
    return target.randn(len(used), case.num_heads, case.head_dim), *parts, tables.to(target.device), lens


def oracle(q, k_pages, v_pages, tables, lens, scale, window):
    """float64 over the values that the pages stand for."""
    every = torch.arange(k_pages.data.shape[0], device=q.device)
    k, v = (kv_pages.gathered_pages(p, every).double() for p in (k_pages, v_pages))
    block_size, group = k.shape[2], q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for row, length in enumerate(lens.tolist()):
        positions = torch.arange(max(0, length - window) if window else 0, length, device=q.device)
        blocks, offsets = tables[row].long()[positions // block_size], positions % block_size
        for head in range(q.shape[1] if length else 0):
            keys, values = (part[blocks, head // group, offsets] for part in (k, v))
            out[row, head] = torch.softmax(keys @ q[row, head].double() * scale, dim=0) @ values
    return out


@pytest.mark.parametrize("kind", ["4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("8", "fp8", "static"))])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).replace(" ", "") for part in case))
def test_decode_attention_is_softmax_over_the_stored_values(target, case, kind, assert_close, guarded_outputs):
    tensors = stored(target, kind, case)
    scale = case.head_dim**-0.5
    out = quantized_decode_attention(*tensors, scale, case.sliding_window)
    # as the kernel over dense pages, and once more for weights times scales, rounded together; fp32: a longer chain of roundings
    eps = target.eps
    bounds = {"max_error": 4e-5, "rms_error": 4e-6} if target.dtype == torch.float32 else {"max_error": 4 * eps, "rms_error": eps}
    assert_close(out, oracle(*tensors, scale, case.sliding_window), **bounds)


@pytest.mark.slow
@pytest.mark.parametrize("num_sms", [1, 64], ids="{}_sms".format)
def test_any_number_of_splits_gives_the_same_result(target, num_sms, assert_close, guarded_outputs, monkeypatch):
    tensors = stored(target, "4", Case(4, 2, 32, 16, (600, 40, 300, 0)))
    monkeypatch.setattr(module, "num_sms", lambda device: num_sms)
    out = quantized_decode_attention(*tensors, 0.2, 0)
    # of 600 keys, each weight was rounded to fp16 before the product
    assert_close(out, oracle(*tensors, 0.2, 0), max_error=8 * target.eps + 4e-5, rms_error=target.eps + 4e-6)
    assert math.isfinite(float(out.sum()))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["4", "8"])
def test_long_sums_keep_their_last_places(kind, monkeypatch):
    """8,192 keys of one program that weigh about the same: what each product loses in the matrix unit is lost in one direction."""
    monkeypatch.setattr(module, "num_sms", lambda device: 1)
    target = Target("cuda", torch.bfloat16, torch.Generator().manual_seed(0))
    tensors = stored(target, kind, Case(4, 1, 128, 64, (8192,)))
    expected = oracle(*tensors, 0.01, 0)
    size = expected.square().mean().sqrt()
    error = quantized_decode_attention(*tensors, 0.01, 0).double() - expected
    assert float(error.square().mean().sqrt() / size) < 0.01
    assert float(error.mean().abs() / size) < 0.002


def test_8_bit_and_static_pages_are_read_too(target, assert_close, guarded_outputs):
    case = Case(6, 3, 40, 8, (1, 9, 21), 16)
    for kind in ("8", "fp8", "static"):
        tensors = stored(target, kind, case)
        out = quantized_decode_attention(*tensors, 0.2, 16)
        assert_close(out, oracle(*tensors, 0.2, 16), max_error=4 * target.eps + 4e-5, rms_error=target.eps + 4e-6)


class AsOnGpu:
    """A kernel that is launched with its inline assembly."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.kernel[grid](*args, **kwargs | {"ASM": True})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "target", [pytest.param(("cpu", torch.float16), marks=pytest.mark.interpreted)], indirect=True, ids=["fp16"]
)
def test_inline_assembly_gives_what_plain_shifts_give(target, kind, monkeypatch):
    from tests.backend.ops.inline_assembly import create_inline_asm
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
    tensors = stored(target, kind, Case(8, 2, 128, 16, (37, 20)))
    plain = quantized_decode_attention(*tensors, 0.1)
    monkeypatch.setattr(module, "_quantized_split_kernel", AsOnGpu(module._quantized_split_kernel))
    assert torch.equal(quantized_decode_attention(*tensors, 0.1), plain)


class Chunks(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    rows: tuple[tuple[int, int], ...]  # (queries, context)
    sliding_window: int = 0


CHUNKS = [
    Chunks(4, 2, 40, 5, ((7, 7), (3, 21), (2, 2))),
    Chunks(4, 1, 16, 16, ((20, 50), (33, 33)), 9),
]


@pytest.mark.parametrize("scratch_blocks", [1, 1000], ids=["a_row_at_a_time", "all_rows_at_once"])
@pytest.mark.parametrize("kind", [*KINDS[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:])])
@pytest.mark.parametrize("chunks", CHUNKS, ids=["odd", "window"])
def test_prefill_is_attention_over_the_stored_values(
    target, chunks, kind, scratch_blocks, assert_close, guarded_outputs, monkeypatch
):
    case = Case(*chunks[:4], tuple(context for _, context in chunks.rows), chunks.sliding_window)
    _, k_pages, v_pages, tables, lens = stored(target, kind, case)
    num_tokens = sum(queries for queries, _ in chunks.rows)
    q, scale = target.randn(num_tokens, chunks.num_heads, chunks.head_dim), chunks.head_dim**-0.5
    starts = torch.tensor(
        [0, *itertools.accumulate(queries for queries, _ in chunks.rows)], dtype=torch.int32, device=target.device
    )
    block_bytes = 2 * chunks.num_kv_heads * chunks.block_size * chunks.head_dim * target.dtype.itemsize
    monkeypatch.setattr(prefill_module, "MAX_SCRATCH_BYTES", scratch_blocks * block_bytes)
    found = quantized_prefill_attention(q, k_pages, v_pages, tables, lens, starts, scale, chunks.sliding_window, chunks.rows)
    wanted = []
    for row, (queries, context) in enumerate(chunks.rows):
        for i in range(queries):  # a query is a decode of a shorter context
            end = torch.tensor([context - queries + i + 1], dtype=torch.int32, device=target.device)
            at = slice(int(starts[row]) + i, int(starts[row]) + i + 1)
            wanted.append(oracle(q[at], k_pages, v_pages, tables[row : row + 1], end, scale, chunks.sliding_window))
    eps = target.eps
    bounds = {"max_error": 4e-5, "rms_error": 4e-6} if target.dtype == torch.float32 else {"max_error": 6 * eps, "rms_error": eps}
    assert_close(found, torch.cat(wanted), **bounds)


@pytest.mark.parametrize("kind", [pytest.param("8", marks=pytest.mark.slow), "4"])
def test_scores_and_scales_of_any_size_stay_in_range(target, kind, assert_close, guarded_outputs):
    """Scores that climb by hundreds from tile to tile, values whose scales differ by eight orders, one without a range."""
    case = Case(4, 2, 64, 16, (200, 70))
    q, k_pages, v_pages, tables, lens = stored(target, kind, case)
    assert isinstance(v_pages, QuantizedPages)
    sizes = 10 ** (torch.rand(v_pages.params.shape[:3], generator=target.generator) * 8 - 5)
    v_pages.params[..., 0] = (v_pages.params[..., 0].float() * sizes.to(target.device)).to(target.dtype)
    v_pages.params[:, :, 0, 0] = 0  # the first key of every block
    tensors = q * 40, k_pages, v_pages, tables, lens
    for scale in (0.02, 1.0):
        out = quantized_decode_attention(*tensors, scale, 0)
        # scores of hundreds: their own rounding, in units of 2^-11 of the largest, moves the weights
        loose = 40 * scale * 2**-11 * 8 if target.dtype is not torch.float32 else 1e-3 * scale
        assert_close(
            out, oracle(*tensors, scale, 0), max_error=8 * target.eps + loose + 4e-5, rms_error=2 * target.eps + loose / 4 + 4e-6
        )
