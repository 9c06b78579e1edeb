"""The roofline against limits that were worked out by hand for two models on an H200, and against its own scaling."""

import pytest

from turbotriton.backend.capacity import (
    GIB,
    GPUS,
    KV_BITS,
    ModelShape,
    decode_step_s,
    expected_decode_step_s,
    expected_prefill_s,
    mean_context,
    plan,
    prefill_s,
)
from turbotriton.contract.errors import InvalidInputError

SMALL = ModelShape(24, 2048, 16, 8, 128, 8192, 92544, False, 4096)  # InternLM2-1.8B
LARGE = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, False, 8192)  # Llama-3-8B
H200 = GPUS["h200"]


@pytest.mark.parametrize(
    ("model", "batch", "prompt_len", "output_len", "limit"),
    [
        (SMALL, 1, 128, 512, 1360),
        (SMALL, 64, 896, 256, 30_000),
        (SMALL, 256, 896, 256, 36_400),
        (LARGE, 1, 128, 512, 308),
        (LARGE, 64, 896, 256, 12_500),
        (LARGE, 256, 896, 256, 18_400),
    ],
)
def test_decode_limit_in_tokens_a_second(model: ModelShape, batch: int, prompt_len: int, output_len: int, limit: float) -> None:
    step_s = decode_step_s(model, H200, batch, mean_context(prompt_len, output_len), tp=1, quant="none", quant_policy=0)
    assert batch / step_s == pytest.approx(limit, rel=0.05)


@pytest.mark.parametrize(("model", "limit"), [(SMALL, 196_000), (LARGE, 44_600)])
def test_prefill_limit_in_tokens_a_second(model: ModelShape, limit: float) -> None:
    assert 4096 / prefill_s(model, H200, 4096, tp=1, quant="none") == pytest.approx(limit, rel=0.02)


@pytest.mark.parametrize(
    ("model", "batch", "prompt_len", "output_len", "measured"),
    [
        (SMALL, 1, 128, 512, 941),
        (SMALL, 64, 896, 256, 21_422),
        (SMALL, 256, 896, 256, 31_558),
        (LARGE, 1, 128, 512, 268),
        (LARGE, 64, 896, 256, 9_525),
        (LARGE, 256, 896, 256, 16_481),
    ],
)
def test_expected_decode_is_near_what_was_measured(
    model: ModelShape, batch: int, prompt_len: int, output_len: int, measured: float
) -> None:
    """docs/perf-log.md, 2026-11-28 and 2026-11-29."""
    context = mean_context(prompt_len, output_len)
    step_s = expected_decode_step_s(model, H200, batch, context, tp=1, quant="none", quant_policy=0)
    assert batch / step_s == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize(("model", "measured"), [(SMALL, 161_640), (LARGE, 40_649)])
def test_expected_prefill_is_near_what_was_measured(model: ModelShape, measured: float) -> None:
    assert 4096 / expected_prefill_s(model, H200, 4096, tp=1, quant="none") == pytest.approx(measured, rel=0.05)


def test_int4_weights_bring_one_sequence_near_their_bytes() -> None:
    """4.7 GB a step at 4.62 TB/s."""
    step_s = decode_step_s(LARGE, H200, 1, mean_context(128, 512), tp=1, quant="awq", quant_policy=0)
    assert 1 / step_s == pytest.approx(985, rel=0.03)


@pytest.mark.parametrize(("policy", "bytes_a_token"), [(0, 131_072), (8, 67_584), (4, 35_840)])
def test_kv_bytes_of_a_token(policy: int, bytes_a_token: int) -> None:
    """32 layers x 8 heads x (2 x 128 values + a scale and a zero of each, of 4 bit keys two)."""
    assert LARGE.kv_bytes_a_token(policy) == bytes_a_token


def test_memory_is_shared_out_whole() -> None:
    fits = plan(LARGE, H200, tp=1, quant="none", quant_policy=0, cache_share=0.8)
    assert fits.weight_bytes / 1e9 == pytest.approx(16.06, rel=0.01)  # 8.03 billion parameters in 16 bit
    assert fits.kv_bytes == pytest.approx((H200.memory - fits.weight_bytes - 2 * GIB) * 0.8)
    assert fits.kv_tokens == int(fits.kv_bytes / 131_072)
    assert fits.num_sessions == fits.kv_tokens // 8192


def test_two_devices_halve_the_weights_and_more_than_double_the_tokens() -> None:
    one = plan(LARGE, GPUS["a10"], tp=1, quant="none", quant_policy=0, cache_share=0.9)
    two = plan(LARGE, GPUS["a10"], tp=2, quant="none", quant_policy=0, cache_share=0.9)
    assert two.weight_bytes == one.weight_bytes / 2
    assert two.kv_tokens > 2 * one.kv_tokens


@pytest.mark.parametrize("policy", [8, 4])
def test_smaller_kv_holds_more_tokens_and_steps_faster(policy: int) -> None:
    assert KV_BITS[policy] < 16
    assert (
        plan(LARGE, H200, tp=1, quant="none", quant_policy=policy, cache_share=0.8).kv_tokens
        > 1.9 * plan(LARGE, H200, tp=1, quant="none", quant_policy=0, cache_share=0.8).kv_tokens
    )
    steps = [decode_step_s(LARGE, H200, 64, 8192, tp=1, quant="none", quant_policy=which) for which in (policy, 0)]
    assert steps[0] < steps[1]


def test_what_does_not_fit_is_refused_with_a_remedy() -> None:
    with pytest.raises(InvalidInputError, match=r"NVIDIA L4.*--quant awq, --quant-policy 8, --tp 2"):
        plan(
            ModelShape(80, 8192, 64, 8, 128, 28672, 128256, False, 8192),
            GPUS["l4"],
            tp=1,
            quant="none",
            quant_policy=0,
            cache_share=0.8,
        )
    with pytest.raises(InvalidInputError, match="--tp is 3"):
        plan(LARGE, H200, tp=3, quant="none", quant_policy=0, cache_share=0.8)
