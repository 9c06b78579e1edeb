"""8 bit weights for 8 bit activations (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438; FP8: arXiv:2209.05433).

Activations have a few large channels, which cost the others their resolution. Dividing them by s and multiplying the weights moves
the difficulty to where it does less harm:

    s_c = absmax of the input's channel c ^ alpha / absmax of the weights' column c ^ (1 - alpha), normalised

int8:  scale = absmax of an output's row / 127;  q = round_half_even(w / scale)
fp8:   scale = absmax of an output's row / 448;  q = e4m3(w / scale)
"""

from typing import NamedTuple

import torch

from .calibration import SITES, LayerRun
from .smoothing import apply_scales, normalised, smoothed_sites

__all__ = ["QUANT_DTYPES", "ScaledMatrix", "quantize_rows", "smooth_layer", "smooth_scales"]

#: name -> (torch's type, its largest value)
QUANT_DTYPES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


class ScaledMatrix(NamedTuple):
    """weight: int8 or float8_e4m3fn [out, in];  scale: fp32 [out, 1]."""

    weight: torch.Tensor
    scale: torch.Tensor


def quantize_rows(weight: torch.Tensor, quant_dtype: str) -> ScaledMatrix:
    dtype, largest = QUANT_DTYPES[quant_dtype]
    wide = weight.float()
    absmax = wide.abs().amax(dim=1, keepdim=True)
    scale = torch.where(absmax > 0, absmax / largest, 1.0)
    values = (wide / scale).clamp(-largest, largest)
    return ScaledMatrix((values.round() if dtype is torch.int8 else values).to(dtype), scale)


def smooth_scales(weight: torch.Tensor, absmax: torch.Tensor, alpha: float) -> torch.Tensor:
    """weight: [out, in] of all matrices at the input; absmax: [in] of the activations."""
    activation, columns = absmax.float().clamp(min=1e-5), weight.float().abs().amax(0).clamp(min=1e-5)
    return normalised((activation.pow(alpha) / columns.pow(1 - alpha)).clamp(min=1e-5))


def smooth_layer(run: LayerRun, alpha: float, *, smooth_values: bool) -> None:
    """Scales the layer's matrices, norms, and v's and up's rows in place."""
    for site in smoothed_sites(smooth_values=smooth_values):
        absmax = run.inputs[site].absmax
        assert absmax is not None
        apply_scales(run.layer, site, smooth_scales(torch.cat([run.layer.weights[part] for part in SITES[site]]), absmax, alpha))
