"""A checkpoint as decoder layers of seven matrices: what quantisation works on, whatever the architecture names or packs.

    source names and packings --read_layer--> Layer (q k v o gate up down, norms, biases) --source_linears--> source names

The architectures are the converter's rows: no name of one stands here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from turbotriton.backend.ops.operands import DenseWeight, NormWeight, QkvWeights
from turbotriton.contract.errors import CheckpointError
from turbotriton.contract.ini import RopeConfig
from turbotriton.converter.archs import Architecture, find_architecture
from turbotriton.converter.assemble import check_source
from turbotriton.converter.linear_format import DENSE
from turbotriton.converter.raw_config import CheckpointConfig, ConfigFile
from turbotriton.converter.shard import split_grouped, split_stacked
from turbotriton.converter.sources import Source, open_source

__all__ = ["Layer", "SourceModel", "join_qkv", "open_model"]


@dataclass(slots=True)
class Layer:
    """One decoder layer. Whoever quantises it writes to it.

    weights: q k v o gate up down, [out, in];  biases: of the same names, [out], where there are any
    norms: attention and ffn [hidden]; q and k [head_dim] where the model has them
    """

    weights: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]
    norms: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class SourceModel:
    folder: Path
    file: ConfigFile
    arch: Architecture
    config: CheckpointConfig
    source: Source
    tied_head: bool

    @property
    def rope(self) -> RopeConfig:
        config, rope = self.config, self.config.rope
        max_position = config.max_position_embeddings or 2048
        return RopeConfig(
            dim=config.head_dim,
            theta=config.rope_theta,
            scaling_type=rope.type,
            factor=rope.factor or 1.0,
            max_position_embeddings=max_position,
            original_max_position_embeddings=rope.original_max_position_embeddings or max_position,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            attention_factor=rope.attention_factor,
            yarn_truncate=rope.truncate,
        )

    def read_layer(self, i: int, device: torch.device, dtype: torch.dtype) -> Layer:
        names = self.arch.names

        def read(name: str) -> torch.Tensor:
            return self.source.read(name).to(device=device, dtype=dtype)

        weights = {part: read(getattr(names, field).format(i=i) + ".weight") for part, field in LINEARS.items()}
        biases: dict[str, torch.Tensor] = {}
        if f"{names.o.format(i=i)}.bias" in self.source.tensors:
            biases["o"] = read(f"{names.o.format(i=i)}.bias")
        qkv = [read(name.format(i=i) + ".weight").t() for name in names.qkv]
        weights |= {part: matrix.t() for part, matrix in zip("qkv", self._split_qkv(qkv), strict=True)}
        if f"{names.qkv[0].format(i=i)}.bias" in self.source.tensors:
            biases |= dict(zip("qkv", self._split_qkv([read(name.format(i=i) + ".bias") for name in names.qkv]), strict=True))
        norms = {
            "attention": read(names.attention_norm.format(i=i) + ".weight"),
            "ffn": read(names.ffn_norm.format(i=i) + ".weight"),
        }
        if self.arch.qk_norm:
            norms |= {"q": read(names.q_norm.format(i=i) + ".weight"), "k": read(names.k_norm.format(i=i) + ".weight")}
        return Layer(weights, biases, norms)

    def _split_qkv(self, parts: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """[..., out] of the source's projections -> q, k, v."""
        if len(parts) == 3:
            return tuple(parts)
        if self.arch.packing == "grouped":
            return split_grouped(parts[0], self.config.num_kv_heads, self.config.head_dim)
        return split_stacked(parts[0])

    def source_linears(self, i: int, parts: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """(source prefix, tensor with the output features last) of all that `parts` holds by our names, [..., out] each."""
        names = self.arch.names
        if "q" in parts:
            yield from zip(
                (name.format(i=i) for name in names.qkv), self._join_qkv(parts["q"], parts["k"], parts["v"]), strict=True
            )
        for part, field in LINEARS.items():
            if part in parts:
                yield getattr(names, field).format(i=i), parts[part]

    def _join_qkv(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        if len(self.arch.names.qkv) == 3:
            return [q, k, v]
        return [join_qkv(q, k, v, self.config.num_kv_heads, self.config.head_dim, grouped=self.arch.packing == "grouped")]

    def source_norms(self, i: int, layer: Layer) -> Iterator[tuple[str, torch.Tensor]]:
        names = self.arch.names
        fields = {"attention": names.attention_norm, "ffn": names.ffn_norm, "q": names.q_norm, "k": names.k_norm}
        for part, tensor in layer.norms.items():
            yield fields[part].format(i=i), tensor

    def shared_tensors(self) -> Iterator[str]:
        """Names of what belongs to no layer and stays as it is."""
        yield f"{self.arch.names.embedding}.weight"
        yield f"{self.arch.names.norm}.weight"
        if not self.tied_head:
            yield f"{self.arch.names.head}.weight"


#: our name of a matrix -> the field of the architecture's row (q, k and v have their packings)
LINEARS = {"o": "o", "gate": "w1", "up": "w3", "down": "w2"}


def join_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_kv_heads: int, head_dim: int, *, grouped: bool
) -> torch.Tensor:
    """[..., out] each -> one packed projection: stacked [q | k | v], or grouped: a kv head's q heads, its k, its v."""
    if not grouped:
        return torch.cat((q, k, v), dim=-1)
    lead = q.shape[:-1]
    heads = [part.reshape(*lead, num_kv_heads, -1, head_dim) for part in (q, k, v)]
    return torch.cat(heads, dim=-2).reshape(*lead, -1)


def layer_operands(layer: Layer, eps: float) -> tuple[QkvWeights, DenseWeight, NormWeight, DenseWeight, DenseWeight]:
    """As backend/model/layers.py's LayerWeights takes them: [in, out], q k v side by side, gate and up side by side."""
    w, b, n = layer.weights, layer.biases, layer.norms
    qkv_bias = torch.cat((b["q"], b["k"], b["v"])) if "q" in b else None
    qkv = QkvWeights(
        norm=NormWeight(n["attention"], eps),
        qkv=DenseWeight(torch.cat((w["q"], w["k"], w["v"])).t(), qkv_bias),
        q_norm=NormWeight(n["q"], eps) if "q" in n else None,
        k_norm=NormWeight(n["k"], eps) if "k" in n else None,
    )
    gate_up = DenseWeight(torch.cat((w["gate"], w["up"])).t())
    return qkv, DenseWeight(w["o"].t(), b.get("o")), NormWeight(n["ffn"], eps), gate_up, DenseWeight(w["down"].t())


def open_model(folder: Path) -> SourceModel:
    """Opens an unquantised Hugging Face folder and checks every tensor. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder; download the model first and give its folder")
    if not (folder / "config.json").exists() and (folder / "params.json").exists():
        raise CheckpointError(f"{folder}: is Meta's format, which has no quantised form; give the model's Hugging Face folder")
    file = ConfigFile(folder / "config.json")
    if file.values.get("quantization_config"):
        raise file.error("quantization_config", "none: an unquantised model", file.values["quantization_config"])
    arch = find_architecture(file)
    config = arch.read_config(file)
    if arch.refuse(config):
        raise CheckpointError(f"{file.path}: {arch.name}: {arch.refuse(config)}")
    source = open_source(folder)
    shape = check_source(source, arch, config, DENSE)
    return SourceModel(folder, file, arch, shape.config, source, shape.tied_head)
