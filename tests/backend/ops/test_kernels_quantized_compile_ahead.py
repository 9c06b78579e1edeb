"""The kernels over quantised pages, compiled for real devices without one: no spills, no more shared memory than any gives."""

import re
from dataclasses import replace

import pytest
import torch
import triton
from tests.backend.ops.test_kernels_compile_ahead import (
    BF16,
    FP16,
    FP32,
    SHARED_LIMIT_BYTES,
    Recorder,
    resource_usage,
    source_of,
)
from triton.backends.compiler import GPUTarget

from turbotriton.backend.ops.kernels import quantize_rows as rows_module
from turbotriton.backend.ops.kernels import quantized_decode_attention as attention
from turbotriton.backend.ops.kernels import quantized_prefill_attention as prefill
from turbotriton.backend.ops.kernels import rotary_store_quantized_kv as store
from turbotriton.backend.ops.kernels import w4a16_dequantize as dequantize
from turbotriton.backend.ops.kernels import w4a16_linear as w4a16
from turbotriton.backend.ops.kernels import w8a8_linear as w8a8
from turbotriton.backend.ops.operands import Fp8Weight, QuantizedPages, SplitSums, StaticInt8Pages, W4A16Tiles, W8A8Weight

NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE = 32, 8, 64
#: Bytes a thread. 3.6 is the version on the GPUs, where nothing spills; 3.9 also shuffles the skinny kernel's operands.
SMALL_SPILL_BYTES = {} if triton.__version__.startswith("3.6.") else {"_w4a16_linear_kernel": 16, "_w4a16_skinny_kernel": 48}
CASES = [
    (90, BF16, 128, "8"), (90, BF16, 128, "4"), (90, BF16, 128, "fp8"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (90, BF16, 128, "static"), (80, BF16, 128, "8"), (80, BF16, 128, "4"), (80, BF16, 128, "static"), (100, BF16, 128, "4"),
        (90, FP16, 256, "8"), (80, FP16, 256, "4"), (90, FP16, 80, "4"), (90, FP32, 128, "8"), (80, FP32, 256, "4"),
    )),
]  # fmt: skip


@pytest.fixture
def launches(monkeypatch):
    recorded = []
    for module in (attention, store, prefill, w4a16, dequantize, w8a8, rows_module):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), recorded))
    return recorded


def pages(kind, dtype, head_dim, num_parts, block_size=BLOCK_SIZE):
    width = head_dim // 2 if kind == "4" else head_dim
    data = torch.empty((4, NUM_KV_HEADS, block_size, width), dtype=torch.uint8)
    if kind == "static":
        return StaticInt8Pages(data, torch.empty(NUM_KV_HEADS), torch.empty(NUM_KV_HEADS))
    return QuantizedPages(
        data, torch.empty((4, NUM_KV_HEADS, block_size, 2 * num_parts), dtype=dtype), 4 if kind == "4" else 8, None, kind == "fp8"
    )


@pytest.mark.parametrize(("capability", "dtype", "head_dim", "kind"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_every_kernel_compiles_without_spills(capability, dtype, head_dim, kind, launches, monkeypatch, tmp_path):
    qkv, angle = torch.empty((16, (NUM_HEADS + 2 * NUM_KV_HEADS) * head_dim), dtype=dtype), torch.empty((16, head_dim // 2))
    slots = torch.empty(16, dtype=torch.int64)
    k, v = pages(kind, dtype, head_dim, 2 if kind == "4" else 1), pages(kind, dtype, head_dim, 1)
    for x in (qkv, SplitSums(qkv.new_empty((2, *qkv.shape), dtype=torch.float32), qkv.dtype)):
        store.rotary_store_quantized_kv(x, angle, angle, None, k, v, slots, NUM_HEADS, NUM_KV_HEADS)
    tables, lens = torch.empty((16, 128), dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    for module in (attention, store, prefill):
        monkeypatch.setattr(module, "has_pdl", lambda device: capability >= 90)
    for count in (1, 132):  # one split, then several
        monkeypatch.setattr(attention, "num_sms", lambda device, count=count: count)
        attention.quantized_decode_attention(torch.empty((16, NUM_HEADS, head_dim), dtype=dtype), k, v, tables, lens, 0.1)
    prefill._widened(k, v, tables, lens, lens, dtype, 0, [(5, 100)] * 15)
    names = [kernel.__name__ for kernel, _ in launches]
    assert names == [
        "_rotary_store_quantized_kv_kernel",
        "_rotary_store_quantized_kv_kernel",
        *["_quantized_split_kernel"] * 2,
        "_widen_pages_kernel",
    ]
    for _, arguments in launches[2:4]:
        arguments["ASM"] = dtype is not FP32  # as on a GPU
    compile_all(launches, capability, tmp_path)


@pytest.mark.parametrize("kind", ["8", "4"])
def test_words_of_a_thread_follow_each_other_in_small_blocks_too(kind, launches, monkeypatch):
    """Blocks of 16 keys, shorter than a tile."""
    monkeypatch.setattr(attention, "has_pdl", lambda device: True)
    k, v = pages(kind, BF16, 128, 2 if kind == "4" else 1, 16), pages(kind, BF16, 128, 1, 16)
    tables, lens = torch.empty((16, 128), dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    attention.quantized_decode_attention(torch.empty((16, NUM_HEADS, 128), dtype=BF16), k, v, tables, lens, 0.1)
    kernel, arguments = launches[0]
    arguments["ASM"] = True  # as on a GPU
    assert arguments["ALIGNED"]
    compiled = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    assert_words_of_a_thread_follow_each_other(compiled.asm["ttgir"])


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(90, BF16), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((80, FP16), (100, BF16), (90, FP16)))],
    ids=str,
)
def test_w4a16_kernels_compile_without_spills(capability, dtype, launches, monkeypatch, tmp_path):
    for module in (w4a16, dequantize):
        monkeypatch.setattr(module, "has_pdl", lambda device: capability >= 90)
    monkeypatch.setattr(w4a16, "num_sms", lambda device: 132)
    for k, n, gated in ((4096, 6144, False), (14336, 4096, False), (4096, 28672, True)):
        words = torch.empty((n // 16, k // 64, 32, 4), dtype=torch.int32)
        weight = W4A16Tiles(words, torch.empty((k // 128, n), dtype=torch.int32), None, dtype, gated)
        for num_rows in (1, 64, 256):
            (w4a16.w4a16_gate_up if gated else w4a16.w4a16_linear)(torch.empty((num_rows, k), dtype=dtype), weight)
        dequantize.dequantize_w4a16(weight)
    for _, arguments in launches:
        arguments["ASM"] = True  # as on a GPU
    for ptx in compile_all(launches, capability, tmp_path):
        assert_matrix_instructions_end_in_their_step(ptx)


#: (rows, options of W4A16LinearConfig, chips): each option alone and those that need the most registers. On sm_100 the last
#: leaves 22 numbers a thread outside the registers.
W4A16_TILES = [
    (1, {"scale_after": True}, (80, 90, 100)),
    (16, {"ahead": 2, "num_stages": 3}, (80, 90, 100)),
    (16, {"ahead": 2, "scale_after": True, "num_stages": 3}, (80, 90, 100)),
    (64, {"ahead": 2, "num_stages": 3, "num_warps": 4, "descriptors": True}, (90, 100)),
    (256, {"ahead": 2, "num_stages": 3, "descriptors": True}, (90, 100)),
    (256, {"block_m": 256, "num_stages": 4, "descriptors": True, "num_splits": 4}, (90, 100)),
]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(90, BF16), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((80, FP16), (100, BF16), (90, FP16)))],
    ids=str,
)
def test_every_option_of_4_bit_weights_compiles_without_spills(capability, dtype, launches, monkeypatch, tmp_path):
    k, n = 4096, 28672
    words, params = torch.empty((n // 16, k // 64, 32, 4), dtype=torch.int32), torch.empty((k // 128, n), dtype=torch.int32)
    monkeypatch.setattr(w4a16, "has_pdl", lambda device: capability >= 90)
    monkeypatch.setattr(w4a16, "num_sms", lambda device: 132)
    monkeypatch.setattr(w4a16, "workspace", lambda device: (torch.empty(16), torch.empty(16, dtype=torch.int32)))
    choose = w4a16.w4a16_linear_config
    for num_rows, options, chips in W4A16_TILES:
        if capability in chips:
            monkeypatch.setattr(
                w4a16, "w4a16_linear_config", lambda *args, options=options, **facts: replace(choose(*args, **facts), **options)
            )
            w4a16.w4a16_gate_up(torch.empty((num_rows, k), dtype=dtype), W4A16Tiles(words, params, None, dtype, True))
    for _, arguments in launches:
        arguments["ASM"] = True  # as on a GPU
    for ptx in compile_all(launches, capability, tmp_path):
        assert_matrix_instructions_end_in_their_step(ptx)


def assert_matrix_instructions_end_in_their_step(ptx):
    """What they read from registers may be written again behind the next branch, so all of them are waited for before it."""
    are_running = False
    for line in ptx.splitlines():
        if "wgmma.mma_async" in line:
            are_running = True
        elif "wgmma.wait_group" in line:
            assert "wgmma.wait_group.sync.aligned 0" in line, f"some may run on: {line}"
            are_running = False
        else:
            assert not (are_running and re.search(r"\bbra\b|^\$L__BB", line)), f"matrix instructions run on over: {line}"


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(90, torch.int8), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((90, torch.float8_e4m3fn), (80, torch.int8)))],
    ids=str,
)
def test_w8a8_kernels_compile_without_spills(capability, dtype, launches, monkeypatch, tmp_path):
    for module in (w8a8, rows_module):
        monkeypatch.setattr(module, "has_pdl", lambda device: capability >= 90)
    monkeypatch.setattr(w8a8, "num_sms", lambda device: 132)
    monkeypatch.setattr(w8a8, "workspace", lambda device: (torch.empty(16), torch.empty(16, dtype=torch.int32)))
    monkeypatch.setattr(w8a8, "_is_for_cublas", lambda x, weight: False)
    k, n = 4096, 6144
    kind = W8A8Weight if dtype is torch.int8 else Fp8Weight
    weight = kind(torch.empty((n, k), dtype=dtype).t(), torch.empty(n))
    for num_rows in (1, 64, 256, 4096):
        x = torch.empty((num_rows, k), dtype=BF16)
        w8a8.w8a8_linear(rows_module.quantize_rows(x, dtype), weight)
    rows_module.rms_norm_rows(x, x[0], 1e-5, x, dtype)
    rows_module.silu_and_mul_rows(torch.empty((1, 2 * 14336), dtype=BF16), dtype)
    assert len(launches) == 10
    for _, arguments in launches:
        if "ASM" in arguments:
            arguments["ASM"] = True  # as on a GPU
    compile_all(launches, capability, tmp_path)


def assert_words_of_a_thread_follow_each_other(ttgir):
    """quantized_words.py relies on it: assembly that takes several elements takes those of a thread that are neighbours in the last dim."""
    for pack, layout in re.findall(r"packed_element = ([2-9]) : i32.*? : tensor<\d+x\d+xi32, (#\w+)>", ttgir):
        definition = re.search(rf"^{layout} = (.*)$", ttgir, re.M)[1]
        if "blocked" in definition:
            assert "order = [1, 0]" in definition, definition
            per_thread = re.search(r"sizePerThread = \[\d+, (\d+)\]", definition)[1]
            assert int(per_thread) % int(pack) == 0, definition
        else:
            first = re.search(r"register = \[(.*?)\]\]", definition)[1]
            assert first.startswith("[0, 1], [0, 2]" if pack == "4" else "[0, 1]"), definition


def compile_all(launches, capability, tmp_path):
    """The PTX of each."""
    texts = []
    for kernel, arguments in launches:
        options = {name: arguments[name] for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
        compiled = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", capability, 32), options=options)
        if arguments.get("ALIGNED"):
            assert_words_of_a_thread_follow_each_other(compiled.asm["ttgir"])
        usage = resource_usage(compiled.asm["cubin"], tmp_path)
        most = SMALL_SPILL_BYTES.get(kernel.__name__, 0)
        assert usage["LOCAL"] == 0, f"{kernel.__name__} spills: {usage}"
        assert usage["STACK"] <= most, f"{kernel.__name__} spills: {usage}"
        assert compiled.metadata.shared <= SHARED_LIMIT_BYTES[capability], (
            f"{kernel.__name__}: {compiled.metadata.shared} bytes shared"
        )
        texts.append(compiled.asm["ptx"])
    return texts
