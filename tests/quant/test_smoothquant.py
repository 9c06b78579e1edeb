"""SmoothQuant's scales and rounding against loops, FP8 against the type's definition, and a smoothed layer against itself."""

import numpy as np
import pytest
import torch
from tests.quant.test_awq import inputs_with_loud_channels, layer_run, outputs, randn

from turbotriton.quant.smoothquant import quantize_rows, smooth_layer, smooth_scales

torch.set_num_threads(1)


def test_int8_rows_are_the_loops() -> None:
    weight = randn(6, 20)
    weight[2] = 0
    weight[3, 4] = -weight[3].abs().max() * 3  # the largest is negative
    found = quantize_rows(weight, "int8")
    for row in range(6):
        absmax = max(abs(float(value)) for value in weight[row])
        scale = np.float32(absmax / 127) if absmax else np.float32(1)
        assert float(found.scale[row, 0]) == pytest.approx(float(scale), rel=1e-7)
        for column in range(20):
            assert int(found.weight[row, column]) == int(np.rint(np.float32(weight[row, column]) / scale))
    assert found.weight.dtype == torch.int8
    assert int(found.weight.abs().max()) == 127


def e4m3_values() -> np.ndarray:
    """All finite numbers of e4m3: 4 exponent bits with bias 7, 3 mantissa bits, no infinity, 0x7f is NaN."""
    numbers = []
    for byte in range(127):
        exponent, mantissa = byte >> 3, byte & 7
        numbers.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.array(sorted({sign * n for n in numbers for sign in (1, -1)}))


def test_fp8_rows_are_the_nearest_numbers_of_the_type() -> None:
    weight = randn(5, 33)
    weight[1] = 0
    found, numbers = quantize_rows(weight, "fp8"), e4m3_values()
    assert found.weight.dtype == torch.float8_e4m3fn
    assert numbers.max() == 448
    scaled = weight.numpy() / found.scale.numpy()
    for value, stored in zip(scaled.flatten(), found.weight.float().numpy().flatten(), strict=True):
        assert stored in numbers
        assert abs(stored - value) <= np.abs(numbers - value).min() + 1e-4
    np.testing.assert_allclose(found.scale[:, 0].numpy()[[0, 2]], weight.abs().amax(1).numpy()[[0, 2]] / 448, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_scales_are_the_papers_up_to_a_factor(alpha: float) -> None:
    weight, absmax = randn(7, 12), randn(12).abs() + 0.01
    raw = np.zeros(12)
    for column in range(12):
        raw[column] = float(absmax[column]) ** alpha / max(abs(float(v)) for v in weight[:, column]) ** (1 - alpha)
    np.testing.assert_allclose(smooth_scales(weight, absmax, alpha).numpy(), raw / (raw.max() * raw.min()) ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_smoothed_layer_computes_what_it_did_from_quieter_inputs(kv_heads: int) -> None:
    x = inputs_with_loud_channels(30, 64)
    run = layer_run(64, 96, 4, kv_heads, x)
    before, norm_before = outputs(run.layer, x, 4 // kv_heads), run.layer.norms["attention"].clone()
    smooth_layer(run, 0.5, smooth_values=kv_heads == 4)
    after = outputs(run.layer, x, 4 // kv_heads)
    for part, wanted in before.items():
        torch.testing.assert_close(after[part], wanted, rtol=1e-3, atol=1e-3)

    def spread(inputs: torch.Tensor) -> float:
        absmax = inputs.abs().amax(0)
        return float(absmax.max() / absmax.median())

    assert spread(x * run.layer.norms["attention"]) < 0.7 * spread(x * norm_before)
