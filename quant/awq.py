"""Activation-aware weight quantisation to 4 bit (Lin et al. 2023, arXiv:2306.00978). Pure functions on matrices [out, in].

Weights are quantised in groups of `group_size` inputs of one output row. Scaling input channel c of W by s_c, and dividing what
produces that channel by s_c, changes nothing in exact arithmetic but moves the rounding error between channels.

    quantise   scale = (max - min) / 15 as fp16, zero = round(-min / scale), q = clamp(round(w / scale) + zero, 0, 15)
               where min <= 0 <= max over the group; symmetric: scale = absmax / 7, zero = 8
    search     s from a grid, the one with the least output error
    clip       per row and group: the range times 1.0 ... 0.5, the one with the least output error of that group alone

The output error of dW on inputs x is E |dW x|^2 = sum over rows of dW G dW^T with G = E x x^T: exact over all calibration tokens
without keeping one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .calibration import SITES, LayerRun
from .smoothing import apply_scales, normalised, smoothed_sites

__all__ = ["AwqOptions", "Int4Matrix", "clip_ratios", "fixed_rule_scales", "quantize_int4", "quantize_layer", "search_scales"]

GRID = 20
CLIP_RATIOS = tuple(1 - 0.05 * i for i in range(11))  # 1.0 .. 0.5
CLIP_ROWS_AT_ONCE = 256


class Int4Matrix(NamedTuple):
    """q: uint8 [out, in];  scales: fp16 [out, in / group];  zeros: uint8, the same shape."""

    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """fp32 [out, in]."""
        group_size = self.q.shape[1] // self.scales.shape[1]
        zeros, scales = (part.float().repeat_interleave(group_size, dim=1) for part in (self.zeros, self.scales))
        return (self.q.float() - zeros) * scales


@dataclass(frozen=True, slots=True)
class AwqOptions:
    """scale_rule: "fixed" (LMDeploy's), "search" (the paper's) or "none" (plain rounding)."""

    group_size: int = 128
    symmetric: bool = False
    scale_rule: str = "fixed"
    clip: bool = False

    @property
    def needs_grams(self) -> bool:
        return self.clip or self.scale_rule == "search"


def quantize_int4(weight: torch.Tensor, options: AwqOptions, clip: torch.Tensor | None = None) -> Int4Matrix:
    """weight: [out, in], any float; clip: [out, in / group], a factor on each group's range."""
    groups = weight.float().reshape(weight.shape[0], -1, options.group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if clip is not None:
        low, high = low * clip, high * clip
    scales = torch.maximum(-low, high) / 7 if options.symmetric else (high - low) / 15
    # a scale below fp16's range would turn into 0: such a group is as good as 0 and takes the smallest one
    scales = scales.clamp(min=torch.finfo(torch.float16).tiny).to(torch.float16)
    step = scales.float()
    zeros = torch.full_like(step, 8) if options.symmetric else (-low / step).round().clamp(0, 15)
    q = ((groups / step[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return Int4Matrix(q.reshape(weight.shape).to(torch.uint8), scales, zeros.to(torch.uint8))


def output_error(weight: torch.Tensor, approximation: torch.Tensor, gram: torch.Tensor) -> float:
    """E |(W - W') x|^2 summed over rows. weight: [out, in], gram: [in, in]."""
    delta = weight - approximation
    return float(((delta @ gram) * delta).sum())


def weight_scale(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[in]: mean over rows of |W| / max |W in its group|."""
    groups = weight.abs().reshape(weight.shape[0], -1, group_size)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).reshape(weight.shape).mean(0)


def fixed_rule_scales(weight: torch.Tensor, absmax: torch.Tensor, group_size: int) -> torch.Tensor:
    """LMDeploy v0.4's rule without a search: absmax^0.5 / weight_scale^0.5, normalised. absmax: [in]."""
    scales = absmax.float().pow(0.5) / weight_scale(weight.float(), group_size).clamp(min=1e-4).pow(0.5)
    return normalised(scales.clamp(min=1e-4))


def scale_candidates(weight: torch.Tensor, absmean: torch.Tensor, group_size: int) -> Iterator[torch.Tensor]:
    """1 (plain rounding, so that a search never does worse), then act^r and act^r / weight^(1 - r) over the grid."""
    activation, scale = absmean.float().clamp(min=1e-4), weight_scale(weight, group_size).clamp(min=1e-4)
    yield torch.ones_like(activation)
    for step in range(1, GRID + 1):
        ratio = step / GRID
        yield normalised(activation.pow(ratio))
        yield normalised(activation.pow(ratio) / scale.pow(1 - ratio))


def search_scales(
    weights: Sequence[torch.Tensor], absmean: torch.Tensor, gram: torch.Tensor, options: AwqOptions
) -> tuple[torch.Tensor, float, float]:
    """Best input scales of the matrices that share an input: [in]; its output error; that of plain rounding."""
    weight = torch.cat([w.float() for w in weights])
    best, least, plain = torch.ones_like(absmean), float("inf"), 0.0
    for number, scales in enumerate(scale_candidates(weight, absmean, options.group_size)):
        approximation = quantize_int4(weight * scales, options).dequantized() / scales
        error = output_error(weight, approximation, gram)
        plain = error if number == 0 else plain
        if error < least:
            best, least = scales, error
    return best, least, plain


def clip_ratios(weight: torch.Tensor, gram: torch.Tensor, options: AwqOptions) -> torch.Tensor:
    """[out, in / group]: the factor on each group's range whose error on the group's own inputs is least."""
    num_groups = weight.shape[1] // options.group_size
    index = torch.arange(num_groups, device=weight.device)
    blocks = gram.reshape(num_groups, options.group_size, num_groups, options.group_size)[index, :, index]  # [groups, g, g]
    best = torch.ones(weight.shape[0], num_groups, device=weight.device)
    for first in range(0, weight.shape[0], CLIP_ROWS_AT_ONCE):
        rows = weight[first : first + CLIP_ROWS_AT_ONCE].float()
        least = torch.full((rows.shape[0], num_groups), float("inf"), device=weight.device)
        for ratio in CLIP_RATIOS:
            clip = torch.full_like(least, ratio)
            delta = rows - quantize_int4(rows, options, clip).dequantized()
            delta = delta.reshape(rows.shape[0], num_groups, options.group_size).transpose(0, 1)  # [groups, rows, g]
            error = ((delta @ blocks) * delta).sum(-1).t()
            better = error < least
            least = torch.where(better, error, least)
            best[first : first + CLIP_ROWS_AT_ONCE][better] = ratio
    return best


def quantize_layer(run: LayerRun, options: AwqOptions, *, smooth_values: bool) -> tuple[dict[str, Int4Matrix], list[str]]:
    """The layer's seven matrices by name; its norms, and v's and up's rows, are scaled in place. `smooth_values`: also v -> o.

    The second value: one line a site about what the search found. run.grams is used up.
    """
    layer, lines = run.layer, []
    quantized: dict[str, Int4Matrix] = {}
    for site in smoothed_sites(smooth_values=smooth_values):
        weights, stats = [layer.weights[part] for part in SITES[site]], run.inputs[site]
        assert stats.absmax is not None
        assert stats.absmean is not None
        if options.scale_rule == "search":
            scales, error, plain = search_scales(weights, stats.absmean, run.grams[site], options)
            lines.append(f"layer {run.index} {site}: output error {error / max(plain, 1e-30):.3f} of plain rounding")
        elif options.scale_rule == "fixed":
            scales = fixed_rule_scales(torch.cat(weights), stats.absmax, options.group_size)
        else:
            continue
        apply_scales(layer, site, scales)
        if site in run.grams:
            run.grams[site] /= scales[:, None] * scales[None, :]
    for site, parts in SITES.items():
        for part in parts:
            weight = layer.weights[part]
            # q and k meet in a product whose error their own outputs do not show: AutoAWQ leaves them unclipped too
            clip = clip_ratios(weight, run.grams[site], options) if options.clip and part not in ("q", "k") else None
            quantized[part] = quantize_int4(weight, options, clip)
        run.grams.pop(site, None)
    return quantized, lines
