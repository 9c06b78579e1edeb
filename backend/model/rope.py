"""Rotary frequencies of a request and the cos and sin of a step.

    inverse frequencies [rotary_dim / 2]   once a request (its theta may depend on its length), kept by slot
    cos, sin [num_tokens, rotary_dim / 2]  once a step, for all layers

Everything in fp32 and in the order of operations that Hugging Face uses, so that rounding agrees.
"""

import math

import torch

from turbotriton.contract.ini import RopeConfig

__all__ = ["attention_factor", "cos_sin", "inverse_frequencies"]


def inverse_frequencies(rope: RopeConfig, theta: float) -> torch.Tensor:
    """[rope.dim / 2], fp32, on the CPU. `theta` is the request's base (`RopeConfig.theta_for`), the rest is `rope`'s."""
    base = 1.0 / (theta ** (torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim))
    if rope.scaling_type == "linear":
        return base / rope.factor
    if rope.scaling_type == "llama3":
        return _llama3(rope, base)
    if rope.scaling_type == "yarn":
        return _yarn(rope, theta, base)
    return base  # none; dynamic and qwen change theta alone


def _llama3(rope: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: wavelengths above original/low_freq_factor are divided by `factor`, below original/high_freq_factor kept,
    those between are blended linearly in original/wavelength."""
    original = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / base
    blend = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    scaled = torch.where(wavelength > original / rope.low_freq_factor, base / rope.factor, base)
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    between = (wavelength >= original / rope.high_freq_factor) & (wavelength <= original / rope.low_freq_factor)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeConfig, theta: float, base: torch.Tensor) -> torch.Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): dims that turn more than beta_fast times over the original context keep their
    frequency, those that turn less than beta_slow times are interpolated, a linear ramp between."""

    def dim_of(num_rotations: float) -> float:
        length = rope.original_max_position_embeddings
        return rope.dim * math.log(length / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolated = 1 - ramp
    return (base / rope.factor) * (1 - extrapolated) + base * extrapolated


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1 but for yarn, where 0 in the config means 0.1 ln(factor) + 1."""
    if rope.scaling_type != "yarn":
        return 1.0
    if rope.attention_factor:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def cos_sin(inverse: torch.Tensor, positions: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """inverse: [num_tokens, rotary_dim / 2], fp32, each token's own frequencies; positions: [num_tokens], int64.

    Returns (cos, sin), each [num_tokens, rotary_dim / 2], fp32, times `factor`.
    """
    angles = positions.float()[:, None] * inverse
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)
