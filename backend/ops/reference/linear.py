"""y = x W (+ b) for every variant of a linear layer's weight. The formulas are the dataclasses' of `ops/operands.py`."""

import torch

from ..operands import DenseWeight, Fp8Weight, LinearWeight, W4A16Tiles, W4A16Weight, W8A8Weight
from ..packing import unpack_rows

__all__ = ["dequantized", "linear", "quantized_tokens"]

INT8_MAX, FP8_MAX, SMALLEST_ABSMAX = 127.0, 448.0, 1e-7


def linear(x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
    """x: [num_tokens, in_features] -> [num_tokens, out_features] in x's dtype."""
    if isinstance(weight, DenseWeight):
        matrix = weight.weight
    elif isinstance(weight, W4A16Weight):
        matrix = dequantized(weight, x.dtype)
    elif isinstance(weight, W4A16Tiles):
        raise TypeError("W4A16Tiles are for kernels; the reference ops take W4A16Weight")
    else:
        return _linear_8_bit(x, weight)
    if weight.bias is None:
        return x @ matrix
    return torch.addmm(weight.bias, x, matrix)


def dequantized(weight: W4A16Weight, dtype: torch.dtype) -> torch.Tensor:
    """[in_features, out_features]: (nibble - zero) * scale, the scale and then the product rounded to `dtype`."""
    num_groups, out_features = weight.scales.shape
    nibbles = unpack_rows(weight.qweight).view(num_groups, weight.group_size, out_features)
    values = (nibbles.float() - weight.zeros[:, None].float()) * weight.scales[:, None].to(dtype).float()
    return values.flatten(0, 1).to(dtype)


def quantized_tokens(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [num_tokens, n] -> (int8 or float8_e4m3fn of the same shape, fp32 scales [num_tokens, 1])."""
    wide = x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_ABSMAX)
    if dtype is torch.int8:
        scale = largest / INT8_MAX
        return (wide / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale
    scale = largest / FP8_MAX
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(dtype), scale


def _linear_8_bit(x: torch.Tensor, weight: W8A8Weight | Fp8Weight) -> torch.Tensor:
    quantized, scale = quantized_tokens(x, weight.weight.dtype)
    if isinstance(weight, W8A8Weight):
        product = (quantized.double() @ weight.weight.double()).float()  # integers below 2^53: exact
    else:
        product = quantized.float() @ weight.weight.float()
    y = product * scale * weight.scale
    if weight.bias is not None:
        y = y + weight.bias.float()
    return y.to(x.dtype)
