"""Joined TurboMind tensors, layer by layer, out of a source and its architecture's row.

`check_source` compares all names and shapes with what the config says before anything is written. `Assembler.shared` and
`Assembler.layer` then yield (file name pattern, tensor) as `contract.layout` lists them; at most one layer is in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from turbotriton.backend.ops.packing import (
    interleave_w13,
    pack_scales_zeros,
    unpack_awq,
    unpack_gptq_weight,
    unpack_gptq_zeros,
)
from turbotriton.contract.errors import CheckpointError
from turbotriton.contract.layout import padded_vocab_size

from .archs import Architecture
from .linear_format import FLOATS, SCALE_NAMES, LinearFormat, check_g_idx
from .raw_config import CheckpointConfig
from .shard import interleave_rotary, split_grouped, split_stacked
from .sources import Source

__all__ = ["Assembler", "SourceShape", "check_source"]

#: A projection by kind: weight [in, out] and bias [out]; or int4's nibbles [in, out], zeros and scales [in/group, out].
Projection = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class SourceShape:
    """What the tensors themselves decide."""

    config: CheckpointConfig  # with vocab_size and inter_size filled in
    attn_bias: bool
    tied_head: bool
    linears: LinearFormat


def check_source(source: Source, arch: Architecture, config: CheckpointConfig, linears: LinearFormat) -> SourceShape:
    """Raises CheckpointError for a missing or extra tensor, a wrong shape or type."""
    names, found = arch.names, source.tensors
    any_path = next(iter(found.values())).path if found else None
    if any_path is None:
        raise CheckpointError("the checkpoint holds no tensors")
    for prefix in (names.embedding + ".weight", names.w1.format(i=0) + "." + linears.main_tensor):
        if prefix not in found:
            raise CheckpointError(f"{any_path.parent}: tensor {prefix}: is missing from all files")
    config = replace(
        config,
        vocab_size=config.vocab_size or found[f"{names.embedding}.weight"].shape[0],
        inter_size=config.inter_size or found[f"{names.w1.format(i=0)}.weight"].shape[0],
    )
    q_bias = f"{names.qkv[0].format(i=0)}.bias"
    attn_bias = arch.qkv_bias == "required" or (q_bias in found and not _is_bias_of_zeros(source, q_bias, linears))
    tied = config.tie_word_embeddings and f"{names.head}.weight" not in found
    if linears.scale_name:
        linears = replace(linears, scale_name=_scale_name(arch, source, linears))
    expected = {name: (shape, dtypes) for name, shape, dtypes in _expected(arch, config, source, linears, attn_bias, tied)}
    for name, (shape, dtypes) in expected.items():
        info = found.get(name)
        if info is None:
            raise CheckpointError(f"{any_path.parent}: tensor {name}: expected shape {list(shape)}, found in no file")
        if info.shape != shape:
            raise CheckpointError(f"{info.path}: tensor {name}: expected shape {list(shape)}, found {list(info.shape)}")
        if info.dtype not in dtypes:
            kind = "float16, bfloat16 or float32" if len(dtypes) > 1 else str(dtypes[0]).removeprefix("torch.")
            raise CheckpointError(f"{info.path}: tensor {name}: expected {kind}, found {str(info.dtype).removeprefix('torch.')}")
    for name in sorted(found.keys() - expected.keys()):
        if not name.endswith(names.unused) and not _is_bias_of_zeros(source, name, linears):
            raise CheckpointError(
                f"{found[name].path}: tensor {name}: expected no such tensor in {arch.name} with "
                f"{config.num_layers} layers, found shape {list(found[name].shape)}"
            )
    return SourceShape(config, attn_bias, tied, linears)


def _scale_name(arch: Architecture, source: Source, linears: LinearFormat) -> str:
    """The name in use: LMDeploy says scale, the others weight_scale."""
    first = arch.names.w1.format(i=0)
    return next((name for name in SCALE_NAMES if f"{first}.{name}" in source.tensors), linears.scale_name)


def _is_bias_of_zeros(source: Source, name: str, linears: LinearFormat) -> bool:
    """AutoGPTQ wrote one for every layer, also of models without biases."""
    return linears.kind == "gptq" and name.endswith(".bias") and not bool(source.read(name).any())


def _expected(
    arch: Architecture, config: CheckpointConfig, source: Source, linears: LinearFormat, attn_bias: bool, tied: bool
) -> Iterator[tuple[str, tuple[int, ...], tuple[torch.dtype, ...]]]:
    """(name, shape as checkpoints store it, dtypes) of every tensor that must be there."""
    names, hidden = arch.names, config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    packed = len(names.qkv) == 1
    qkv_sizes = (q_size + 2 * kv_size,) if packed else (q_size, kv_size, kv_size)

    def linear(
        prefix: str, rows: int, columns: int, *, bias: bool = False
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[torch.dtype, ...]]]:
        found = {
            last: source.tensors[f"{prefix}.{last}"].shape
            for last in ("g_idx", *SCALE_NAMES)
            if f"{prefix}.{last}" in source.tensors
        }
        for last, shape, dtypes in linears.tensors(rows, columns, found):
            yield f"{prefix}.{last}", shape, dtypes
        if bias:
            yield f"{prefix}.bias", (columns,), FLOATS

    yield f"{names.embedding}.weight", (config.vocab_size, hidden), FLOATS
    yield f"{names.norm}.weight", (hidden,), FLOATS
    if not tied:
        yield f"{names.head}.weight", (config.vocab_size, hidden), FLOATS
    for i in range(config.num_layers):
        yield names.attention_norm.format(i=i) + ".weight", (hidden,), FLOATS
        yield names.ffn_norm.format(i=i) + ".weight", (hidden,), FLOATS
        for prefix, size in zip(names.qkv, qkv_sizes, strict=True):
            yield from linear(prefix.format(i=i), hidden, size, bias=attn_bias)
        yield from linear(names.o.format(i=i), q_size, hidden, bias=attn_bias and arch.o_bias == "with_qkv")
        if arch.qk_norm:
            yield names.q_norm.format(i=i) + ".weight", (config.head_dim,), FLOATS
            yield names.k_norm.format(i=i) + ".weight", (config.head_dim,), FLOATS
        for prefix in (names.w1, names.w3):
            yield from linear(prefix.format(i=i), hidden, config.inter_size)
        yield from linear(names.w2.format(i=i), config.inter_size, hidden)


class Assembler:
    """Yields tensors in their source dtype; int4 ones as nibbles (uint8) and packed scales_zeros (int32), fp8 as its bytes."""

    def __init__(self, source: Source, arch: Architecture, shape: SourceShape, *, tp: int) -> None:
        self._source, self._arch, self._shape, self._tp = source, arch, shape, tp

    def shared(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Embeddings, final norm and head."""
        names = self._arch.names
        yield "tok_embeddings.weight", self._pad_vocab(self._source.read(f"{names.embedding}.weight"))
        yield "norm.weight", self._source.read(f"{names.norm}.weight")
        if not self._shape.tied_head:
            head = self._source.read(f"{names.head}.weight")
            if self._arch.normalized_head:
                head = torch.nn.functional.normalize(head)
            yield "output.weight", self._pad_vocab(head)

    def layer(self, i: int) -> Iterator[tuple[str, torch.Tensor]]:
        names, prefix = self._arch.names, f"layers.{i}"
        yield f"{prefix}.attention_norm.weight", self._source.read(names.attention_norm.format(i=i) + ".weight")
        yield f"{prefix}.ffn_norm.weight", self._source.read(names.ffn_norm.format(i=i) + ".weight")
        yield from self._files(f"{prefix}.attention.w_qkv", self._qkv(i))
        yield from self._files(f"{prefix}.attention.wo", self._output(i))
        if self._arch.qk_norm:
            for name, source_name in (("q_norm", names.q_norm), ("k_norm", names.k_norm)):
                weight = self._source.read(source_name.format(i=i) + ".weight")
                yield f"{prefix}.attention.{name}.weight", interleave_rotary(weight, self._shape.config.head_dim)
        w1, w3 = (self._projection(name.format(i=i), may_have_bias=False) for name in (names.w1, names.w3))
        if self._shape.linears.is_int4:
            yield from self._files(f"{prefix}.feed_forward.w13", {kind: interleave_w13(w1[kind], w3[kind]) for kind in w1})
        else:
            yield from self._files(f"{prefix}.feed_forward.w1", w1)
            yield from self._files(f"{prefix}.feed_forward.w3", w3)
        del w1, w3
        yield from self._files(f"{prefix}.feed_forward.w2", self._projection(names.w2.format(i=i), may_have_bias=False))

    def _projection(self, prefix: str, *, may_have_bias: bool = True) -> Projection:
        """Every kind with output features on the last axis."""
        read, found, linears = self._source.read, self._source.tensors, self._shape.linears
        if linears.is_int4:
            columns = self._int4_projection(prefix)
        else:
            weight = read(f"{prefix}.weight")
            columns = {"weight": (weight.view(torch.uint8) if linears.kind == "fp8" else weight).t()}
            if linears.scale_name:
                columns["scale"] = _positive(f"{prefix}.{linears.scale_name}", read(f"{prefix}.{linears.scale_name}")).expand(
                    weight.shape[0]
                )
        if may_have_bias and self._shape.attn_bias and f"{prefix}.bias" in found:  # others are gptq's zeros
            columns["bias"] = read(f"{prefix}.bias")
        return columns

    def _int4_projection(self, prefix: str) -> Projection:
        read, linears = self._source.read, self._shape.linears
        qweight, qzeros = read(f"{prefix}.qweight"), read(f"{prefix}.qzeros")
        if linears.kind == "awq":
            nibbles, zeros = unpack_awq(qweight), unpack_awq(qzeros)
        else:
            if f"{prefix}.g_idx" in self._source.tensors:
                check_g_idx(f"{prefix}.g_idx", read(f"{prefix}.g_idx"), linears.group_size)
            nibbles, zeros = unpack_gptq_weight(qweight), unpack_gptq_zeros(qzeros, plus_one=linears.zeros_less_one)
        scales = read(f"{prefix}.scales")
        if not bool(scales.half().isfinite().all()):
            raise CheckpointError(f"tensor {prefix}.scales: holds NaN, or values that fp16 cannot; the checkpoint is broken")
        return {"nibbles": nibbles, "zeros": zeros, "scales": scales}

    def _qkv(self, i: int) -> Projection:
        """[q | k | v] columns, q and k interleaved for rotary."""
        config, sources = self._shape.config, [self._projection(name.format(i=i)) for name in self._arch.names.qkv]
        joined: Projection = {}
        for kind in sources[0]:
            if len(sources) == 3:
                q, k, v = (part[kind] for part in sources)
            elif self._arch.packing == "grouped":
                q, k, v = split_grouped(sources[0][kind], config.num_kv_heads, config.head_dim)
            else:
                q, k, v = split_stacked(sources[0][kind])
            if not self._arch.interleaved_rotary:
                q, k = interleave_rotary(q, config.head_dim), interleave_rotary(k, config.head_dim)
            joined[kind] = torch.cat((q, k, v), dim=-1)
        return joined

    def _output(self, i: int) -> Projection:
        wo = self._projection(self._arch.names.o.format(i=i))
        if self._shape.attn_bias and self._arch.o_bias == "zeros":
            wo["bias"] = torch.zeros(self._shape.config.hidden_size)
        return wo

    def _files(self, name: str, projection: Projection) -> Iterator[tuple[str, torch.Tensor]]:
        if "nibbles" in projection:
            yield f"{name}.{{rank}}.qweight", projection["nibbles"]
            yield f"{name}.{{rank}}.scales_zeros", pack_scales_zeros(projection["scales"], projection["zeros"])
        else:
            yield f"{name}.{{rank}}.weight", projection["weight"]
        if "scale" in projection:
            yield f"{name}.{{rank}}.scale", projection["scale"]
        if "bias" in projection:
            yield f"{name}.{{rank}}.bias", projection["bias"]

    def _pad_vocab(self, rows: torch.Tensor) -> torch.Tensor:
        extra = padded_vocab_size(rows.shape[0], self._tp) - rows.shape[0]
        return torch.nn.functional.pad(rows, (0, 0, 0, extra)) if extra else rows


def _positive(name: str, scale: torch.Tensor) -> torch.Tensor:
    """[] or [1] or [out] or [out, 1] of any float -> fp32 [1] or [out]."""
    scale = scale.float().flatten()
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise CheckpointError(f"tensor {name}: expected positive scales, found {scale.min():g}; the checkpoint is broken")
    return scale
