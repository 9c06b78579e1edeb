"""Linear layers of few rows leave their last sum to the norm or rotary after them, projections of many add to the residual stream
themselves: what comes of either, and when there is which."""

import itertools

import pytest
import torch

from turbotriton.backend.ops import triton_column
from turbotriton.backend.ops.kernels import narrow_linear
from turbotriton.backend.ops.kernels.rms_norm import rms_norm
from turbotriton.backend.ops.kernels.rotary_store_kv import rotary_store_kv
from turbotriton.backend.ops.kernels.rotary_store_quantized_kv import rotary_store_quantized_kv
from turbotriton.backend.ops.kernels.split_product import split_product
from turbotriton.backend.ops.kernels.tuning import num_product_parts
from turbotriton.backend.ops.operands import (
    Added,
    AttentionBatch,
    DenseWeight,
    NormWeight,
    QkvBeforeRotary,
    QkvWeights,
    QuantizedPages,
    SplitSums,
    stream_after,
    whole,
)
from turbotriton.backend.ops.table import REFERENCE

EPS = 1e-5


@pytest.mark.parametrize("shape", [(2, 1, 64), (4, 5, 72), (3, 40, 128), (8, 17, 1000), (2, 2, 5120)], ids=str)
def test_the_norm_adds_up_parts_and_rounds_as_one_that_gets_the_sum(target, shape, guarded_outputs):
    parts = target.randn_fp32(*shape)
    residual, gain = target.randn(*shape[1:]), target.randn(shape[2])
    y, r = rms_norm(SplitSums(parts, target.dtype), gain, EPS, residual)
    summed = parts[0]
    for part in parts[1:]:
        summed = summed + part
    wanted_y, wanted_r = rms_norm(summed.to(target.dtype), gain, EPS, residual)
    assert torch.equal(r, wanted_r)
    assert torch.equal(y, wanted_y)
    assert y.dtype == r.dtype == target.dtype


@pytest.mark.parametrize("shape", [(5, 72), (40, 128)], ids=str)
def test_the_norm_takes_the_stream_as_it_is_where_it_was_added_to(target, shape, guarded_outputs):
    stream, stale, gain = target.randn(*shape), target.randn(*shape), target.randn(shape[1])
    y, r = rms_norm(Added(stream), gain, EPS, stale)
    assert r is stream
    assert torch.equal(y, rms_norm(stream, gain, EPS)[0])


@pytest.mark.parametrize(("kind", "num_parts"), [("dense", 1), ("dense", 4), ("8", 2), ("4", 2)])
def test_rotary_adds_up_parts_and_rounds_as_one_that_gets_the_sum(target, kind, num_parts, guarded_outputs):
    n, heads, kv_heads, d = 5, 6, 3, 40
    parts = target.randn_fp32(num_parts, n, (heads + 2 * kv_heads) * d)
    summed = parts[0].clone()
    for part in parts[1:]:
        summed += part
    angle, slots = target.randn_fp32(n, d // 2), torch.tensor([3, 9, -1, 0, 4], device=target.device)
    found = []
    for qkv in (SplitSums(parts, target.dtype), summed.to(target.dtype)):
        if kind == "dense":
            caches = [torch.zeros(2, kv_heads, 5, d, dtype=target.dtype, device=target.device) for _ in "kv"]
            q = rotary_store_kv(qkv, angle.cos(), angle.sin(), None, *caches, slots, heads, kv_heads)
            found.append((q, *caches))
        else:
            caches = [quantized_pages(target, kind, kv_heads, d, keys=keys) for keys in (True, False)]
            q = rotary_store_quantized_kv(qkv, angle.cos(), angle.sin(), None, *caches, slots, heads, kv_heads)
            found.append((q, *(tensor for pages in caches for tensor in (pages.data, pages.params))))
        assert q.dtype == target.dtype
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def quantized_pages(target, kind, kv_heads, d, *, keys):
    num_parts, bits = (2 if keys and kind == "4" else 1), int(kind)
    data = torch.zeros(2, kv_heads, 5, d * bits // 8, dtype=torch.uint8, device=target.device)
    return QuantizedPages(data, torch.zeros(2, kv_heads, 5, 2 * num_parts, dtype=target.dtype, device=target.device), bits)


def test_parts_without_a_residual_are_refused():
    with pytest.raises(AssertionError, match="beside a residual"):
        rms_norm(SplitSums(torch.zeros(2, 3, 16), torch.float32), torch.ones(16), EPS)


@pytest.mark.parametrize(("num_rows", "k", "n", "has_bias"), [(5, 512, 70, False), (17, 300, 64, True), (2, 1024, 128, True)])
def test_programs_of_a_narrow_layer_leave_what_they_have(target, num_rows, k, n, has_bias, assert_close, guarded_outputs):
    x, weight = target.randn(num_rows, k + 5)[:, :-5], target.randn(n, k, scale=k**-0.5).t()
    bias = target.randn(n) if has_bias else None
    found = narrow_linear.split_linear(x, weight, bias)
    config = narrow_linear.narrow_linear_config(num_rows, n, k, x.element_size(), narrow_linear.num_sms(x.device))
    assert isinstance(found, SplitSums) == (config.num_splits > 1)
    assert whole(found).dtype == x.dtype
    wanted = x.double() @ weight.double() + (0 if bias is None else bias.double())
    assert_close(whole(found), wanted, max_error=2 * target.eps + 2e-6, rms_error=0.6 * target.eps + 1e-6)
    if isinstance(found, SplitSums):
        assert found.shape == wanted.shape
        assert_close(found.parts.double().sum(0), wanted, max_error=1e-4, rms_error=2e-6)


def test_the_interpreter_meets_a_split_layer():
    """Or the case before would show nothing on a CPU."""
    assert narrow_linear.narrow_linear_config(5, 70, 512, 2, 4).num_splits > 1


@pytest.mark.parametrize(
    "device_dtype",
    [("cpu", torch.float16), pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu)],
    ids=["cpu", "cuda"],
)
@pytest.mark.parametrize("num_parts", [2, 4])
def test_the_parts_of_a_product_add_up_to_it(device_dtype, num_parts, assert_close):
    device, dtype = device_dtype
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(70, 260, generator=draw).to(device, dtype)[:, :256]
    weight = (torch.randn(96, 256, generator=draw) / 16).to(device, dtype).t()
    found = split_product(x, weight, num_parts)
    size = 256 // num_parts
    for part, k in enumerate(range(0, 256, size)):
        wanted = x[:, k : k + size].double() @ weight[k : k + size].double()
        assert_close(found.parts[part], wanted, max_error=1e-4, rms_error=2e-6)
    assert found.parts.is_contiguous()
    assert found.dtype == dtype


def test_products_are_split_where_few_tiles_would_fill_the_device():
    """The layers of an 8B and of a 1.8B model."""
    parts = {(n, k): num_product_parts(128, n, k) for n, k in [(4096, 4096), (4096, 14336), (2048, 2048), (2048, 8192)]}
    assert parts == {(4096, 4096): 2, (4096, 14336): 2, (2048, 2048): 2, (2048, 8192): 4}
    assert [num_product_parts(256, 4096, 4096), num_product_parts(257, 4096, 4096)] == [2, 1]
    for rows, n, k in itertools.product(
        (1, 65, 256, 4096), (1, 100, 512, 3000, 9000, 100_000), (1, 63, 1024, 5000, 12288, 28672)
    ):
        found = num_product_parts(rows, n, k)
        assert found in (1, 2, 4)
        assert k % (8 * found) == 0 or found == 1


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(triton_column, "is_hopper", lambda device: True)


def dense(n, k, *, bias=False):
    draw = torch.Generator().manual_seed(1)
    weight = (torch.randn(n, k, generator=draw) * k**-0.5).bfloat16().t()
    return DenseWeight(weight, torch.randn(n, generator=draw).bfloat16() if bias else None)


def test_a_projection_is_split_before_a_norm_and_nowhere_else(hopper, assert_close):
    x, weight = torch.randn(80, 2048).bfloat16(), dense(1024, 2048)
    found = triton_column.TRITON.output_projection(x.view(80, 16, 128), weight)
    assert isinstance(found, SplitSums)
    assert found.parts.shape == (2, 80, 1024)
    wanted = x.double() @ weight.weight.double()
    assert_close(whole(found), wanted, max_error=0.008, rms_error=0.003)
    rows = torch.tensor([3, 79])
    assert torch.equal(found[rows], whole(found)[rows])
    assert isinstance(triton_column.TRITON.down_projection(x, weight), SplitSums)
    assert isinstance(triton_column.linear(x, weight), torch.Tensor)


@pytest.mark.parametrize("case", ["bias", "fp32", "many rows", "no rows"])
def test_other_projections_are_whole(hopper, case):
    weight = dense(1024, 2048, bias=case == "bias")
    x = torch.zeros({"many rows": 300, "no rows": 0}.get(case, 80), 2048).bfloat16()
    if case == "fp32":
        weight, x = DenseWeight(weight.weight.float()), x.float()
    found = triton_column.down_projection(x, weight)
    assert found.shape == (x.shape[0], 1024)
    assert isinstance(found, torch.Tensor)


def test_many_rows_are_added_to_the_stream_in_place(assert_close):
    x, weight, residual = torch.randn(300, 256).bfloat16(), dense(64, 256), torch.randn(300, 64).bfloat16()
    before = residual.clone()
    found = triton_column.TRITON.output_projection(x.view(300, 2, 128), weight, residual)
    assert isinstance(found, Added)
    assert found.total is residual
    assert stream_after(found, residual) is residual
    assert_close(residual, before.double() + x.double() @ weight.weight.double(), max_error=0.008, rms_error=0.003)
    whole_one = triton_column.TRITON.down_projection(x, weight)
    assert isinstance(whole_one, torch.Tensor)
    assert_close(whole_one, x.double() @ weight.weight.double(), max_error=0.008, rms_error=0.003)


@pytest.mark.parametrize(
    ("has_bias", "qk_norm", "is_captured"),
    [(False, False, True), (True, False, True), (False, True, True), (False, False, False)],
    ids=["", "bias", "qk_norm", "launched"],
)
@pytest.mark.parametrize("num_rows", [5, pytest.param(40, marks=pytest.mark.slow), 65])
def test_q_k_and_v_of_few_rows_are_added_up_by_what_comes_next(
    target, monkeypatch, num_rows, has_bias, qk_norm, is_captured, assert_close
):
    """Both units beside the reference's, and who gets which operand: attention in a graph of up to 64 rows, else rotary. 65 rows are the
    library's, and all in fp32; norms of q and k take whole sums."""
    monkeypatch.setattr(triton_column, "shared_memory_bytes", lambda device: 227 << 10)
    rotary, seen = triton_column.rotary_store_kv, []
    monkeypatch.setattr(triton_column, "rotary_store_kv", lambda qkv, *more: seen.append(type(qkv)) or rotary(qkv, *more))
    hidden, heads, kv_heads, d = 1024, 4, 2, 32
    x, residual, norm = target.randn(num_rows, hidden), target.randn(num_rows, hidden), NormWeight(target.randn(hidden), EPS)
    qkv = target.randn((heads + 2 * kv_heads) * d, hidden, scale=hidden**-0.5).t()
    gains = [NormWeight(target.randn(d), EPS) for _ in "qk"] if qk_norm else [None, None]
    weights = QkvWeights(norm, DenseWeight(qkv, target.randn(qkv.shape[1]) if has_bias else None), *gains)
    angle, rows = target.randn_fp32(num_rows, d // 2), torch.arange(num_rows, device=target.device)
    lens, older = torch.full_like(rows, 3).int(), [target.randn(num_rows, kv_heads, 4, d) for _ in "kv"]
    batch = AttentionBatch(
        angle.cos(), angle.sin(), None, 4 * rows + 2, rows.int()[:, None], lens, num_rows, 3, lens[:1], (), is_captured
    )
    found, attended = [], []
    for ops in (triton_column.TRITON, REFERENCE):
        caches = [cache.clone() for cache in older]
        q, r = ops.norm_qkv_rotary_store(x, residual, weights, batch, *caches)
        attended.append(ops.attention(q, *caches, batch, d**-0.5, 0))
        found.append((q, r, *caches))
    mine, wanted = found
    if is_captured and num_rows <= 64:
        assert isinstance(mine[0], QkvBeforeRotary)
        seen.append(type(mine[0].qkv))
        mine, wanted = mine[1:], wanted[1:]
    shape = num_rows, qkv.shape[1], hidden, x.element_size(), narrow_linear.num_sms(x.device)
    is_split = not qk_norm and num_rows <= 64 and target.eps > 1e-4 and narrow_linear.narrow_linear_config(*shape).num_splits > 1
    assert seen == [SplitSums if is_split else torch.Tensor]
    assert is_split or qk_norm or num_rows > 5 or target.eps < 1e-4, "the case shows nothing"
    bounds = {"max_error": 8 * target.eps, "rms_error": 1.5 * target.eps}
    # Two roundings on either side, of the norm and of q, k, v, and rotary's sums of two; attention adds its exponentials' last bits.
    for ours, reference in zip(mine, wanted, strict=True):
        assert_close(ours, reference.double(), **bounds)
    assert_close(attended[0], attended[1].double(), **(bounds | {"max_error": 8 * target.eps + 1e-6}))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [2, 16, 40, 64, 80, 128, 200, 256, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_layers_of_a_model_agree_with_products_in_one_piece(num_rows, dtype, assert_close):
    """Output projection, norm, gate, up and SiLU, down projection and the next norm, each beside float64 of its own input."""
    draw = torch.Generator(device="cuda").manual_seed(num_rows)

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, generator=draw, device="cuda") * scale).to(dtype)

    ops = triton_column.TRITON
    output, down = DenseWeight(randn(2048, 2048, scale=2048**-0.5).t()), DenseWeight(randn(2048, 4096, scale=4096**-0.5).t())
    gate_up, norm = DenseWeight(randn(8192, 2048, scale=2048**-0.5).t()), NormWeight(randn(2048), EPS)
    attended, residual = randn(num_rows, 16, 128), randn(num_rows, 2048)
    stream = residual.clone()
    projected = ops.output_projection(attended, output, stream)
    assert isinstance(projected, SplitSums if num_rows <= 256 else Added)
    y = attended.flatten(1).double() @ output.weight.double()
    eps = torch.finfo(dtype).eps
    if num_rows <= 256:
        y = y.to(dtype).double()
    activated, r = ops.norm_gate_up_silu(projected, stream, norm, gate_up)
    assert_close(r, y + residual.double(), max_error=2 * eps, rms_error=0.6 * eps)  # cuBLAS may round before it adds, too
    after = ops.down_projection(activated, down)
    assert isinstance(after, SplitSums if num_rows <= 256 else torch.Tensor)
    assert_close(whole(after), activated.double() @ down.weight.double(), max_error=2 * eps, rms_error=0.6 * eps)
    logits = ops.lm_head(after, r, norm, output)
    assert_close(logits, ops.lm_head(whole(after), r, norm, output).double(), max_error=4 * eps, rms_error=eps)
