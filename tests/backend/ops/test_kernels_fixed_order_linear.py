"""The linear kernel of `deterministic = 1`: right, and the same to the bit for a row alone and among any others."""

import pytest
import torch
import triton
from tests.backend.ops.test_kernels_compile_ahead import BF16, FP16, FP32, SHARED_LIMIT_BYTES, Recorder, resource_usage, source_of
from triton.backends.compiler import GPUTarget

from turbotriton.backend.ops.deterministic_column import fixed_order_product
from turbotriton.backend.ops.kernels import fixed_order_linear as module
from turbotriton.backend.ops.kernels.fixed_order_linear import linear
from turbotriton.backend.ops.operands import Fp8Weight, W4A16Tiles, W4A16Weight, W8A8Weight
from turbotriton.backend.ops.packing import fragment_params, pack_fragments, pack_rows

#: Sums of `in_features` products in fp32, then one rounding of the result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features", "bias"),
    [(0, 40, 24, False), (1, 600, 33, True), (5, 40, 130, False), (70, 1100, 40, True)],
)
def test_products_are_those_of_float64(target, assert_close, num_rows, in_features, out_features, bias):
    x, weight = target.randn(num_rows, in_features), target.randn(out_features, in_features, scale=in_features**-0.5).t()
    offset = target.randn(out_features) if bias else None
    expected = x.double() @ weight.double() + (offset.double() if bias else 0.0)
    found = linear(x, weight, offset)
    assert found.dtype == target.dtype
    assert_close(found, expected, max_error=4 * TOLERANCE[target.dtype], rms_error=TOLERANCE[target.dtype])


@pytest.mark.parametrize("in_features", [600, 2100])
def test_a_row_is_the_same_alone_and_among_others(target, monkeypatch, in_features):
    x, weight = target.randn(70, in_features), target.randn(40, in_features).t()
    monkeypatch.setattr(module, "num_sms", lambda device: 1000)  # a program a chunk
    alone = {row: linear(x[row : row + 1], weight) for row in (0, 1, 37, 69)}
    for num_sms in (1000, 0):  # then a program for all chunks
        monkeypatch.setattr(module, "num_sms", lambda device, num_sms=num_sms: num_sms)
        for rows in (slice(0, 2), slice(30, 40), slice(0, 70), slice(37, 70)):
            together = linear(x[rows], weight)
            for row, expected in alone.items():
                if rows.start <= row < rows.stop:
                    assert torch.equal(together[row - rows.start : row - rows.start + 1], expected)


def weight_of(kind, target, in_features, out_features):
    generator = target.generator
    bias, scale = target.randn(out_features), (torch.rand(out_features, generator=generator) / 1000).to(target.device)
    if kind in ("int8", "fp8"):
        values = torch.randint(-127, 128, (out_features, in_features), generator=generator)
        if kind == "int8":
            return W8A8Weight(values.to(target.device, torch.int8).t(), scale, bias)
        return Fp8Weight(values.to(target.device, torch.float8_e4m3fn).t(), scale, bias)
    nibbles = torch.randint(0, 16, (in_features, out_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (in_features // 64, out_features), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(zeros.shape, generator=generator) * 0.02).half()
    if kind == "int4":
        return W4A16Weight(*(part.to(target.device) for part in (pack_rows(nibbles), scales, zeros)), bias)
    words, params = pack_fragments(nibbles), fragment_params(scales, zeros, target.dtype)
    return W4A16Tiles(words.to(target.device), params.to(target.device), bias, target.dtype)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4", "int4 tiles"])
def test_a_row_is_the_same_with_quantised_weights(target, kind):
    if kind == "int4 tiles" and target.dtype is torch.float32:
        kind = "int4"  # what a model in fp32 is given
    x, weight = target.randn(40, 2112), weight_of(kind, target, 2112, 64)
    whole = fixed_order_product(x, weight)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 20)):
        assert torch.equal(fixed_order_product(x[rows].clone(), weight), whole[rows])


@pytest.mark.gpu
@pytest.mark.parametrize(("in_features", "out_features"), [(4096, 6144), (14336, 4096), (4096, 28672), (2048, 4096)])
def test_real_sizes_give_a_row_the_same_in_a_decode_and_in_a_prefill(in_features, out_features):
    x = torch.randn(4096, in_features, device="cuda", dtype=BF16)
    weight = torch.randn(out_features, in_features, device="cuda", dtype=BF16).t()
    whole = linear(x, weight)
    for begin, count in ((0, 1), (5, 1), (64, 3), (100, 64), (1000, 256), (2000, 777)):
        assert torch.equal(linear(x[begin : begin + count].clone(), weight), whole[begin : begin + count])


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(90, BF16), (80, FP16), (100, BF16), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((90, FP32), (80, FP32)))],
    ids=str,
)
def test_it_compiles_without_spills(capability, dtype, monkeypatch, tmp_path):
    launches = []
    monkeypatch.setattr(module, "_fixed_order_linear_kernel", Recorder(module._fixed_order_linear_kernel, launches))
    monkeypatch.setattr(module, "has_pdl", lambda device: capability >= 90)
    linear(torch.empty((16, 4096), dtype=dtype), torch.empty((6144, 4096), dtype=dtype).t(), torch.empty(6144, dtype=dtype))
    ((kernel, arguments),) = launches
    options = {"num_warps": arguments["num_warps"]}
    compiled = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", capability, 32), options=options)
    usage = resource_usage(compiled.asm["cubin"], tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0, f"{capability} spills: {usage}"
    assert compiled.metadata.shared <= SHARED_LIMIT_BYTES[capability], f"{compiled.metadata.shared} bytes shared"
