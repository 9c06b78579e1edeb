"""Joined TurboMind tensors, layer by layer, out of a source and its architecture's row.

`check_source` compares all names and shapes with what the config says before anything is written. `Assembler.shared` and
`Assembler.layer` then yield (file name pattern, tensor) as `contract.layout` lists them; at most one layer is in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from turbotriton.backend.ops.packing import interleave_w13, pack_scales_zeros, unpack_awq
from turbotriton.contract.errors import CheckpointError
from turbotriton.contract.layout import padded_vocab_size

from .archs import Architecture
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


def check_source(source: Source, arch: Architecture, config: CheckpointConfig, group_size: int) -> SourceShape:
    """Raises CheckpointError for a missing or extra tensor, a wrong shape or type. `group_size` 0: not int4."""
    names, found = arch.names, source.tensors
    any_path = next(iter(found.values())).path if found else None
    if any_path is None:
        raise CheckpointError("the checkpoint holds no tensors")
    suffix = "qweight" if group_size else "weight"
    for prefix in (names.embedding + ".weight", names.w1.format(i=0) + "." + suffix):
        if prefix not in found:
            raise CheckpointError(f"{any_path.parent}: tensor {prefix}: is missing from all files")
    config = replace(
        config,
        vocab_size=config.vocab_size or found[f"{names.embedding}.weight"].shape[0],
        inter_size=config.inter_size or found[f"{names.w1.format(i=0)}.weight"].shape[0],
    )
    attn_bias = arch.qkv_bias == "required" or f"{names.qkv[0].format(i=0)}.bias" in found
    tied = config.tie_word_embeddings and f"{names.head}.weight" not in found
    expected = dict(_expected(arch, config, attn_bias=attn_bias, tied=tied, group_size=group_size))
    for name, shape in expected.items():
        info = found.get(name)
        if info is None:
            raise CheckpointError(f"{any_path.parent}: tensor {name}: expected shape {list(shape)}, found in no file")
        if info.shape != shape:
            raise CheckpointError(f"{info.path}: tensor {name}: expected shape {list(shape)}, found {list(info.shape)}")
        is_int = name.endswith((".qweight", ".qzeros"))
        if (
            (info.dtype != torch.int32)
            if is_int
            else (info.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64))
        ):
            kind = "int32" if is_int else "float16, bfloat16 or float32"
            raise CheckpointError(f"{info.path}: tensor {name}: expected {kind}, found {str(info.dtype).removeprefix('torch.')}")
    for name in sorted(found.keys() - expected.keys()):
        if not name.endswith(names.unused):
            raise CheckpointError(
                f"{found[name].path}: tensor {name}: expected no such tensor in {arch.name} with "
                f"{config.num_layers} layers, found shape {list(found[name].shape)}"
            )
    return SourceShape(config, attn_bias, tied)


def _expected(
    arch: Architecture, config: CheckpointConfig, *, attn_bias: bool, tied: bool, group_size: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape [out, in] as checkpoints store it) of every tensor that must be there."""
    names, hidden = arch.names, config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    packed = len(names.qkv) == 1
    qkv_sizes = (q_size + 2 * kv_size,) if packed else (q_size, kv_size, kv_size)

    def linear(prefix: str, rows: int, columns: int, *, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
        if group_size:
            yield f"{prefix}.qweight", (rows, columns // 8)
            yield f"{prefix}.qzeros", (rows // group_size, columns // 8)
            yield f"{prefix}.scales", (rows // group_size, columns)
        else:
            yield f"{prefix}.weight", (columns, rows)
        if bias:
            yield f"{prefix}.bias", (columns,)

    yield f"{names.embedding}.weight", (config.vocab_size, hidden)
    yield f"{names.norm}.weight", (hidden,)
    if not tied:
        yield f"{names.head}.weight", (config.vocab_size, hidden)
    for i in range(config.num_layers):
        yield names.attention_norm.format(i=i) + ".weight", (hidden,)
        yield names.ffn_norm.format(i=i) + ".weight", (hidden,)
        for prefix, size in zip(names.qkv, qkv_sizes, strict=True):
            yield from linear(prefix.format(i=i), hidden, size, bias=attn_bias)
        yield from linear(names.o.format(i=i), q_size, hidden, bias=attn_bias and arch.o_bias == "with_qkv")
        if arch.qk_norm:
            yield names.q_norm.format(i=i) + ".weight", (config.head_dim,)
            yield names.k_norm.format(i=i) + ".weight", (config.head_dim,)
        for prefix in (names.w1, names.w3):
            yield from linear(prefix.format(i=i), hidden, config.inter_size)
        yield from linear(names.w2.format(i=i), config.inter_size, hidden)


class Assembler:
    """Yields tensors in their source dtype; int4 ones as nibbles (uint8) and packed scales_zeros (int32)."""

    def __init__(self, source: Source, arch: Architecture, shape: SourceShape, *, tp: int, int4: bool) -> None:
        self._source, self._arch, self._shape, self._tp, self._int4 = source, arch, shape, tp, int4

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
        w1, w3 = self._projection(names.w1.format(i=i)), self._projection(names.w3.format(i=i))
        if self._int4:
            yield from self._files(f"{prefix}.feed_forward.w13", {kind: interleave_w13(w1[kind], w3[kind]) for kind in w1})
        else:
            yield from self._files(f"{prefix}.feed_forward.w1", w1)
            yield from self._files(f"{prefix}.feed_forward.w3", w3)
        del w1, w3
        yield from self._files(f"{prefix}.feed_forward.w2", self._projection(names.w2.format(i=i)))

    def _projection(self, prefix: str) -> Projection:
        """Every kind with output features on the last axis."""
        read, found = self._source.read, self._source.tensors
        if self._int4:
            columns = {
                "nibbles": unpack_awq(read(f"{prefix}.qweight")),
                "zeros": unpack_awq(read(f"{prefix}.qzeros")),
                "scales": read(f"{prefix}.scales"),
            }
        else:
            columns = {"weight": read(f"{prefix}.weight").t()}
        if f"{prefix}.bias" in found:
            columns["bias"] = read(f"{prefix}.bias")
        return columns

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
            kind = "scales" if self._int4 else "weight"
            wo["bias"] = torch.zeros(self._shape.config.hidden_size, dtype=wo[kind].dtype)
        return wo

    def _files(self, name: str, projection: Projection) -> Iterator[tuple[str, torch.Tensor]]:
        if "nibbles" in projection:
            yield f"{name}.{{rank}}.qweight", projection["nibbles"]
            yield f"{name}.{{rank}}.scales_zeros", pack_scales_zeros(projection["scales"], projection["zeros"])
        else:
            yield f"{name}.{{rank}}.weight", projection["weight"]
        if "bias" in projection:
            yield f"{name}.{{rank}}.bias", projection["bias"]

    def _pad_vocab(self, rows: torch.Tensor) -> torch.Tensor:
        extra = padded_vocab_size(rows.shape[0], self._tp) - rows.shape[0]
        return torch.nn.functional.pad(rows, (0, 0, 0, extra)) if extra else rows
