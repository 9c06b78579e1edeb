"""AWQ's pieces against loops in numpy: rounding, the fixed rule, the search and the clipping by the error on real inputs."""

import numpy as np
import pytest
import torch

from turbotriton.quant.awq import (
    AwqOptions,
    clip_ratios,
    fixed_rule_scales,
    quantize_int4,
    quantize_layer,
    scale_candidates,
    search_scales,
)
from turbotriton.quant.calibration import SITES, LayerRun
from turbotriton.quant.model import Layer

torch.set_num_threads(1)

GROUP = 16
GENERATOR = torch.Generator().manual_seed(7)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def half_even(value: np.float32) -> int:
    return int(np.rint(value))


def int4_by_loops(weight: np.ndarray, group_size: int, *, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, scales, zeros, one weight after the other."""
    rows, columns = weight.shape
    q = np.zeros(weight.shape, np.uint8)
    scales, zeros = np.zeros((rows, columns // group_size), np.float16), np.zeros((rows, columns // group_size), np.uint8)
    for row in range(rows):
        for group in range(columns // group_size):
            values = weight[row, group * group_size : (group + 1) * group_size]
            low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
            wide = max(-low, high) / np.float32(7) if symmetric else (high - low) / np.float32(15)
            scale = np.float16(max(wide, np.float32(2.0**-14)))
            zero = 8 if symmetric else min(15, half_even(-low / np.float32(scale)))
            scales[row, group], zeros[row, group] = scale, zero
            for i, value in enumerate(values):
                q[row, group * group_size + i] = min(15, max(0, half_even(value / np.float32(scale)) + zero))
    return q, scales, zeros


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_is_the_loops(symmetric: bool) -> None:
    weight = randn(5, 4 * GROUP)
    weight[1] = weight[1].abs()  # all of one sign
    weight[2] = -weight[2].abs() - 3
    weight[3, :GROUP] = 0
    weight[4] *= 1e-9  # below what an fp16 scale can say
    found = quantize_int4(weight, AwqOptions(group_size=GROUP, symmetric=symmetric))
    for tensor, wanted in zip(found, int4_by_loops(weight.numpy(), GROUP, symmetric=symmetric), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), wanted)


def test_dequantised_values_are_within_half_a_step_and_zero_stays_zero() -> None:
    weight = randn(6, 3 * GROUP)
    weight[:, 5] = 0
    matrix = quantize_int4(weight, AwqOptions(group_size=GROUP))
    steps = matrix.scales.float().repeat_interleave(GROUP, 1)
    # half a step by rounding q, half a step at the range's ends by rounding the zero
    assert bool(((matrix.dequantized() - weight).abs() <= steps * 1.01).all())
    assert bool((matrix.dequantized()[:, 5] == 0).all())


def test_a_clipped_range_saturates_at_its_ends() -> None:
    weight = randn(3, GROUP)
    ratio = torch.full((3, 1), 0.5)
    clipped = quantize_int4(weight, AwqOptions(group_size=GROUP), ratio).dequantized()
    inside = quantize_int4(weight.clamp(weight.amin(1, keepdim=True) / 2, weight.amax(1, keepdim=True) / 2), AwqOptions(GROUP))
    assert torch.equal(clipped, inside.dequantized())


def test_the_fixed_rule_is_lmdeploys() -> None:
    weight, absmax = randn(6, 2 * GROUP), randn(2 * GROUP).abs() + 0.1
    scale = np.zeros(2 * GROUP)
    for column in range(2 * GROUP):
        group = slice(column // GROUP * GROUP, column // GROUP * GROUP + GROUP)
        shares = [abs(float(row[column])) / max(abs(float(v)) for v in row[group]) for row in weight]
        scale[column] = float(absmax[column]) ** 0.5 / (sum(shares) / len(shares)) ** 0.5
    wanted = scale / (scale.max() * scale.min()) ** 0.5
    np.testing.assert_allclose(fixed_rule_scales(weight, absmax, GROUP).numpy(), wanted, rtol=1e-5)


def inputs_with_loud_channels(num_tokens: int, channels: int) -> torch.Tensor:
    x = randn(num_tokens, channels)
    x[:, ::7] *= 12
    return x


def test_the_search_takes_the_candidate_of_least_error_on_the_inputs_themselves() -> None:
    x, weights = inputs_with_loud_channels(50, 2 * GROUP), [randn(6, 2 * GROUP), randn(4, 2 * GROUP)]
    options = AwqOptions(group_size=GROUP, scale_rule="search")
    absmean = x.abs().mean(0)
    found, error, plain = search_scales(weights, absmean, x.t() @ x / len(x), options)
    joined, errors = torch.cat(weights), []
    candidates = list(scale_candidates(joined, absmean, GROUP))
    for scales in candidates:
        q, fp16_scales, zeros = int4_by_loops((joined * scales).numpy(), GROUP, symmetric=False)
        group = np.arange(2 * GROUP) // GROUP
        approximation = (q.astype(np.float64) - zeros[:, group]) * fp16_scales[:, group].astype(np.float64) / scales.numpy()
        errors.append(float(np.square((joined.numpy() - approximation) @ x.numpy().T).sum(0).mean()))
    assert torch.equal(found, candidates[int(np.argmin(errors))])
    assert error == pytest.approx(min(errors), rel=1e-3)
    assert plain == pytest.approx(errors[0], rel=1e-3)
    assert error < 0.8 * plain  # loud channels are what the method is for


def test_clipping_takes_each_groups_best_ratio() -> None:
    x, weight = inputs_with_loud_channels(40, 2 * GROUP), randn(5, 2 * GROUP)
    weight[:, 3] *= 6  # outliers that are worth clipping where their input is small
    x[:, 3] *= 0.01
    options = AwqOptions(group_size=GROUP, clip=True)
    found = clip_ratios(weight, x.t() @ x / len(x), options)
    for group in range(2):
        part = slice(group * GROUP, (group + 1) * GROUP)
        for row in range(5):
            errors = {}
            for step in range(11):
                ratio = 1 - 0.05 * step
                values = weight[row : row + 1, part]
                approximation = quantize_int4(values, AwqOptions(GROUP), torch.full((1, 1), ratio)).dequantized()
                errors[ratio] = float(((values - approximation) @ x[:, part].t()).double().square().mean())
            chosen = min(errors, key=lambda ratio: abs(ratio - float(found[row, group])))
            assert errors[chosen] <= min(errors.values()) * 1.0001
    assert bool((found[:, 0] < 1).any())


def layer_run(hidden: int, inter: int, heads: int, kv_heads: int, x: torch.Tensor) -> LayerRun:
    """A layer with what it saw on `x`, observed here by hand."""
    d = hidden // heads
    sizes = {
        "q": (hidden, hidden),
        "k": (kv_heads * d, hidden),
        "v": (kv_heads * d, hidden),
        "o": (hidden, hidden),
        "gate": (inter, hidden),
        "up": (inter, hidden),
        "down": (hidden, inter),
    }
    weights = {part: randn(*size) * size[1] ** -0.5 for part, size in sizes.items()}
    layer = Layer(weights, {"v": randn(kv_heads * d)}, {"attention": randn(hidden).abs() + 0.5, "ffn": randn(hidden).abs() + 0.5})
    run = LayerRun(0, layer)
    seen = site_inputs(layer, x, heads // kv_heads)
    for site in SITES:
        run.inputs[site].add(seen[site])
        run.grams[site] = seen[site].t() @ seen[site] / len(x)
    return run


def site_inputs(layer: Layer, x: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """Inputs of every site, with attention replaced by v itself (each head's own value): linear in v as attention is."""
    w, seen = layer.weights, {"qkv": x * layer.norms["attention"]}
    v = seen["qkv"] @ w["v"].t() + layer.biases["v"]
    seen["o"] = v if group == 1 else v.repeat(1, group)
    seen["gate_up"] = x * layer.norms["ffn"]
    seen["down"] = torch.nn.functional.silu(seen["gate_up"] @ w["gate"].t()) * (seen["gate_up"] @ w["up"].t())
    return seen


def outputs(layer: Layer, x: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    seen, w = site_inputs(layer, x, group), layer.weights
    named = {part: seen[site] @ w[part].t() for site, parts in SITES.items() for part in parts}
    # v's and up's rows carry scales that o and down take back
    return {part: named[part] for part in ("q", "k", "o", "gate", "down")}


@pytest.mark.parametrize(("rule", "clip"), [("fixed", False), ("search", False), ("search", True), ("none", False)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_scaled_layer_computes_what_it_did(rule: str, clip: bool, kv_heads: int) -> None:
    x = inputs_with_loud_channels(30, 64)
    run = layer_run(64, 96, 4, kv_heads, x)
    before = outputs(run.layer, x, 4 // kv_heads)
    options = AwqOptions(group_size=GROUP, scale_rule=rule, clip=clip)
    matrices, lines = quantize_layer(run, options, smooth_values=kv_heads == 4)
    after = outputs(run.layer, x, 4 // kv_heads)
    for part, wanted in before.items():
        torch.testing.assert_close(after[part], wanted, rtol=1e-3, atol=1e-3)
    assert set(matrices) == set(run.layer.weights)
    for part, matrix in matrices.items():
        if not clip or part in "qk":
            assert torch.equal(matrix.q, quantize_int4(run.layer.weights[part], options).q), part
    assert len(lines) == (0 if rule != "search" else 4 if kv_heads == 4 else 3)
