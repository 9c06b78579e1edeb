"""Moving scale between a layer's matrices without changing what it computes: what AWQ and SmoothQuant share.

    site      produced by           consumed by      exact because
    qkv       attention norm        q, k, v          y = norm(x) g:  (g / s) then W s
    gate_up   ffn norm              gate, up         the same
    o         v's output rows       o                attention is linear in v, head by head
    down      up's output rows      down             silu(gate) * up is linear in up

v -> o needs a v row for every o column: not with grouped-query attention.
"""

import torch

from .calibration import SITES
from .model import Layer

__all__ = ["apply_scales", "normalised", "smoothed_sites"]

NORM_BEFORE = {"qkv": "attention", "gate_up": "ffn"}
ROWS_BEFORE = {"o": "v", "down": "up"}


def smoothed_sites(*, smooth_values: bool) -> tuple[str, ...]:
    return tuple(site for site in SITES if site != "o" or smooth_values)


def normalised(scales: torch.Tensor) -> torch.Tensor:
    """Divided by sqrt(max min): the scales' geometric middle is 1."""
    return scales / (scales.max() * scales.min()).sqrt()


def apply_scales(layer: Layer, site: str, scales: torch.Tensor) -> None:
    """scales: [inputs of the site]. The site's matrices are multiplied along their inputs, its producer divided."""
    for part in SITES[site]:
        layer.weights[part] = layer.weights[part] * scales
    if site in NORM_BEFORE:
        layer.norms[NORM_BEFORE[site]] = layer.norms[NORM_BEFORE[site]] / scales
        return
    before = ROWS_BEFORE[site]
    layer.weights[before] = layer.weights[before] / scales[:, None]
    if before in layer.biases:
        layer.biases[before] = layer.biases[before] / scales
