"""Runs a checkpoint's decoder layer by layer over calibration windows and reports what its linear layers see.

    windows -> embeddings -> [layer 0: all windows] -> [layer 1: all windows] -> ...      one layer's weights resident

The forward pass is our own decoder over the op table, with an observing `linear`: so every architecture of the converter runs, on
any device. Hidden states of all windows stay on the host.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from turbotriton.backend.model.layers import LayerWeights, run_layer
from turbotriton.backend.model.prompt_batch import prompt_batch
from turbotriton.backend.ops.operands import LinearWeight, stream_after
from turbotriton.backend.ops.reference import units
from turbotriton.backend.ops.reference.linear import linear
from turbotriton.backend.ops.reference.primitives import rms_norm
from turbotriton.backend.ops.table import OpTable, ops_for
from turbotriton.contract.errors import CheckpointError

from .model import Layer, SourceModel, layer_operands

__all__ = ["SITES", "Calibration", "ChannelStats", "LayerRun"]

#: The four places where a layer's inputs are seen -> the matrices that take them.
SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
BLOCK_SIZE = 64


@dataclass(slots=True)
class ChannelStats:
    """Over all tokens, each [channels], fp32; means are running means over windows, as LMDeploy's."""

    max: torch.Tensor | None = None
    min: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    absmax: torch.Tensor | None = None
    absmean: torch.Tensor | None = None
    num_windows: int = 0

    def add(self, x: torch.Tensor) -> None:
        """x: [num_tokens, channels]."""
        x = x.float()
        low, high = x.aminmax(dim=0)
        mean, absmax, absmean = x.mean(0), x.abs().amax(0), x.abs().mean(0)
        if self.max is None or self.min is None or self.mean is None or self.absmax is None or self.absmean is None:
            self.max, self.min, self.mean, self.absmax, self.absmean = high, low, mean, absmax, absmean
        else:
            self.max, self.min = torch.maximum(self.max, high), torch.minimum(self.min, low)
            self.absmax = torch.maximum(self.absmax, absmax)
            share = 1 / (self.num_windows + 1)
            self.mean, self.absmean = torch.lerp(self.mean, mean, share), torch.lerp(self.absmean, absmean, share)
        self.num_windows += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {name: getattr(self, name) for name in ("max", "min", "mean", "absmax", "absmean")}
        return {name: tensor.cpu() for name, tensor in found.items()}


@dataclass(slots=True)
class LayerRun:
    """What one layer saw. `grams[site]`: x^T x / num_tokens of the site's inputs, fp32 [in, in], where asked for."""

    index: int
    layer: Layer
    inputs: dict[str, ChannelStats] = field(default_factory=lambda: {site: ChannelStats() for site in SITES})
    outputs: dict[str, ChannelStats] = field(default_factory=lambda: {site: ChannelStats() for site in SITES})
    keys: ChannelStats = field(default_factory=ChannelStats)  # [num_kv_heads * head_dim], after rotary
    values: ChannelStats = field(default_factory=ChannelStats)
    grams: dict[str, torch.Tensor] = field(default_factory=dict)


class _Observer:
    """Stands for `linear` in the units: computes, and notes inputs and outputs by site."""

    def __init__(self, run: LayerRun, sites: dict[int, str], *, with_grams: bool) -> None:
        self._run, self._sites, self._with_grams = run, sites, with_grams
        self._num_tokens: dict[str, int] = {}

    def linear(self, x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
        y = linear(x, weight)
        site = self._sites[id(weight)]
        if not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
            raise CheckpointError(
                f"layer {self._run.index}: NaN or infinity at {site}; the model's weights are broken, or overflow in this dtype"
            )
        self._run.inputs[site].add(x)
        self._run.outputs[site].add(y)
        if self._with_grams:
            self._num_tokens[site] = self._num_tokens.get(site, 0) + x.shape[0]
            gram = _gram(x)
            if site in self._run.grams:
                self._run.grams[site] += gram
            else:
                self._run.grams[site] = gram
        return y

    def finish(self) -> None:
        """Sums to means."""
        for site, gram in self._run.grams.items():
            gram /= self._num_tokens[site]


def _gram(x: torch.Tensor) -> torch.Tensor:
    """x^T x in fp32. Products of 16 bit numbers are exact in fp32, so a GPU's matrix units may make them."""
    if x.is_cuda and x.element_size() == 2:
        return torch.mm(x.t(), x, out_dtype=torch.float32)
    wide = x.float()
    return wide.t() @ wide


class Calibration:
    """One pass over `windows`: [num_windows, seqlen] token ids. `layers()` is to be run through once.

    Afterwards `final_norm` has the statistics of the final norm's output.
    """

    def __init__(
        self,
        model: SourceModel,
        windows: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype,
        *,
        with_grams: bool = False,
        show_progress: bool = True,
    ) -> None:
        largest, vocab_size = int(windows.max()), model.config.vocab_size
        if largest >= vocab_size:
            raise CheckpointError(f"{model.folder}: the tokenizer gave id {largest}, but the vocabulary has {vocab_size} tokens")
        self.final_norm = ChannelStats()
        self._model, self._windows, self._device, self._dtype = model, windows, device, dtype
        self._with_grams, self._show_progress = with_grams, show_progress

    def layers(self) -> Iterator[LayerRun]:
        """The yielded layer may be changed: the next one gets the output of the unchanged one."""
        model, device, dtype = self._model, self._device, self._dtype
        embedding = model.source.read(f"{model.arch.names.embedding}.weight")
        hidden = [embedding[window].to(dtype) for window in self._windows]  # on the host, [seqlen, hidden] each
        del embedding
        seqlen = self._windows.shape[1]
        batch = prompt_batch(model.rope, seqlen, BLOCK_SIZE, device, use_logn_attn=model.config.use_logn_attn)
        num_blocks = -(-seqlen // BLOCK_SIZE)
        total = model.config.num_layers * len(hidden)
        with tqdm(total=total, desc="calibrating", unit="window", disable=None if self._show_progress else True) as progress:
            for i in range(model.config.num_layers):
                run = LayerRun(i, model.read_layer(i, device, dtype))
                observer, ops, weights = _observed(run, model.config.norm_eps, device, with_grams=self._with_grams)
                shape = (num_blocks, model.config.num_kv_heads, BLOCK_SIZE, model.config.head_dim)
                for at, states in enumerate(hidden):
                    k_cache, v_cache = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                    rule = (model.config.head_dim**-0.5, model.config.sliding_window)
                    projected, residual = run_layer(ops, weights, states.to(device), None, batch, (k_cache, v_cache), rule)
                    hidden[at] = stream_after(projected, residual).cpu()
                    for stats, cache in ((run.keys, k_cache), (run.values, v_cache)):
                        stats.add(cache.transpose(1, 2).flatten(0, 1)[: len(states)].flatten(1))
                    progress.update()
                observer.finish()
                del observer, weights, ops
                yield run
        weight = model.source.read(f"{model.arch.names.norm}.weight").to(dtype)
        for states in hidden:
            normed = rms_norm(states, weight, model.config.norm_eps)[0]
            if not bool(normed.isfinite().all()):
                raise CheckpointError(
                    f"{model.arch.names.norm}.weight: NaN or infinity after the final norm; the weights are broken"
                )
            self.final_norm.add(normed)


def _observed(run: LayerRun, eps: float, device: torch.device, *, with_grams: bool) -> tuple[_Observer, OpTable, LayerWeights]:
    """The device's ops with a watched `linear`, and the layer's weights as they take them."""
    weights = LayerWeights(*layer_operands(run.layer, eps))
    sites = {id(weights.qkv.qkv): "qkv", id(weights.output): "o", id(weights.gate_up): "gate_up", id(weights.down): "down"}
    observer = _Observer(run, sites, with_grams=with_grams)
    watched = observer.linear
    norm_linear = functools.partial(units.norm_linear, linear=watched)
    ops = dataclasses.replace(
        ops_for(device),
        norm_qkv_rotary_store=functools.partial(units.norm_qkv_rotary_store, norm_linear=norm_linear),
        output_projection=functools.partial(units.output_projection, linear=watched),
        norm_gate_up_silu=functools.partial(units.norm_gate_up_silu, norm_linear=norm_linear),
        down_projection=functools.partial(units.down_projection, linear=watched),
    )
    return observer, ops, weights
