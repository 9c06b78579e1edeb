"""The kernels of a random draw, compiled for real devices without one: no spills, no fused products, little shared memory."""

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

from turbotriton.backend.ops.kernels import sample as module
from turbotriton.backend.ops.operands import SamplingBatch

VOCAB, NUM_ROWS = 128_256, 16


@pytest.fixture
def launches(monkeypatch):
    recorded = []
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), recorded))
    return recorded


def batch(**fields):
    numbers = {name: torch.empty(NUM_ROWS, dtype=torch.float64) for name in ("temperature", "top_p", "min_p", "uniform")}
    top_k = torch.empty(NUM_ROWS, dtype=torch.int64)
    return SamplingBatch(**numbers, top_k=top_k, max_top_k=VOCAB, has_top_k=True, has_top_p=True, **fields)


def everything():
    starts, ids = torch.empty(NUM_ROWS + 1, dtype=torch.int64), torch.empty(100, dtype=torch.int64)
    penalty, counts = torch.empty(NUM_ROWS, dtype=torch.float64), torch.empty((NUM_ROWS, VOCAB), dtype=torch.int32)
    return {
        "banned_ids": ids, "banned_starts": starts, "bias_ids": ids, "bias": torch.empty(100, dtype=torch.float64),
        "bias_starts": starts, "repetition_penalty": penalty, "presence_penalty": penalty, "frequency_penalty": penalty,
        "slots": torch.empty(NUM_ROWS, dtype=torch.int64), "output_counts": counts, "seen": counts.bool(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(90, BF16), (80, FP16), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((100, BF16), (80, FP32)))],
    ids=str,
)
def test_every_kernel_of_a_draw_compiles_without_spills(capability, dtype, launches, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "has_pdl", lambda device: capability >= 90)
    module.sample(torch.empty((NUM_ROWS, VOCAB), dtype=dtype), batch())
    module.sample(torch.empty((NUM_ROWS, VOCAB), dtype=dtype), batch(**everything()))
    names = [kernel.__name__ for kernel, _ in launches]
    assert names == ["_prepare_kernel", "bins_kernel", "refine_kernel", "search_kernel", "_draw_kernel"] * 2
    for kernel, arguments in launches:
        assert arguments["enable_fp_fusion"] is False, "the reference rounds every product"
        options = {name: arguments[name] for name in ("num_warps", "enable_fp_fusion")}
        compiled = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", capability, 32), options=options)
        usage = resource_usage(compiled.asm["cubin"], tmp_path)
        # the rare cases of an exact division are a call, around which a few registers are saved though others are free
        assert usage["LOCAL"] == 0, f"{kernel.__name__} spills: {usage}"
        assert usage["STACK"] <= (48 if usage["REG"] < 128 else 0), f"{kernel.__name__} spills: {usage}"
        assert compiled.metadata.shared <= SHARED_LIMIT_BYTES[capability], f"{kernel.__name__}: {compiled.metadata.shared} bytes"
        assert "fma.rn.f32" not in compiled.asm["ptx"], f"{kernel.__name__}: a product is fused into a sum"
