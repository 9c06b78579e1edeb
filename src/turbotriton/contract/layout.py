"""The weight files of a workspace: name, stored shape and how ranks split it. One table, read by the writer and the loader.

Raw little-endian values in C order, no header. Dense weights are [in, out] (y = x W), the transpose of Hugging Face's.
With H hidden_size, D head_dim, NH heads, KV kv heads, I inter_size, V vocab_size, T tp and VP = V rounded up to a multiple of T:

    file                                   stored shape             split
    tok_embeddings.weight                  [VP, H]                  none (zero rows appended)
    output.weight                          [VP, H]                  none; absent when the head is tied
    norm.weight                            [H]                      none
    layers.i.attention_norm.weight         [H]                      none
    layers.i.ffn_norm.weight               [H]                      none
    layers.i.attention.w_qkv.r.weight      [H, (NH+2KV) D / T]      columns, as [q part | k part | v part]
    layers.i.attention.w_qkv.r.bias        [(NH+2KV) D / T]         the same
    layers.i.attention.wo.r.weight         [NH D / T, H]            rows
    layers.i.attention.wo.r.bias           [H]                      a full copy in every rank, added once
    layers.i.attention.q_norm.weight       [D]                      none (ours: qk_norm)
    layers.i.attention.k_norm.weight       [D]                      none (ours: qk_norm)
    layers.i.feed_forward.w1.r.weight      [H, I / T]               columns (gate)
    layers.i.feed_forward.w3.r.weight      [H, I / T]               columns (up)
    layers.i.feed_forward.w2.r.weight      [I / T, H]               rows (down)

q and k columns (and biases, and q_norm/k_norm entries) are stored interleaved for rotary: within the first `rotary` dims of a
head, new column 2i + s = Hugging Face column s * rotary/2 + i (s in 0, 1); the rest of the head stays as it is.

weight_type int4 replaces each linear's `.weight` by `.qweight` and `.scales_zeros` and fuses w1 and w3 into w13; int8 and fp8 (ours)
keep `.weight`, a byte a value, and add `.scale`: docs/weights.md.

manifest.json, beside the tensors: {"version": 1, "files": {name: {"size": bytes, "sha256": hex}}} for every tensor file.
config.ini is not in it: people edit it.
"""

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

from .ini import ModelConfig

__all__ = [
    "MANIFEST_NAME",
    "Split",
    "Storage",
    "TensorSpec",
    "dense_tensor_specs",
    "int4_tensor_specs",
    "kv_scale_file",
    "padded_vocab_size",
    "scaled_tensor_specs",
    "tensor_specs",
]

MANIFEST_NAME = "manifest.json"


class Split(enum.Enum):
    NONE = "none"  # one file, no rank in its name
    COLUMNS = "columns"  # contiguous share of the last axis
    QKV_COLUMNS = "qkv"  # last axis is [q | k | v], each shared out, then joined a rank
    ROWS = "rows"  # contiguous share of the first axis
    COPY = "copy"  # the same values in every rank's file


class Storage(enum.Enum):
    """What a file's bytes are."""

    FLOAT = "float"  # values of the workspace's dtype (fp16 where weight_type is int4)
    NIBBLES = "int4"  # 4 bit values of a [in, out] matrix in 32 x 32 tiles, 512 bytes each
    SCALES_ZEROS = "scales_zeros"  # uint32: fp16 scale in the high half, fp16 of 64 + zero in the low one
    INT8 = "int8"
    FP8 = "fp8"  # float8 e4m3
    SCALE = "scale"  # fp32


#: Bytes of a value where the workspace's float type does not decide.
VALUE_BYTES = {Storage.SCALES_ZEROS: 4, Storage.INT8: 1, Storage.FP8: 1, Storage.SCALE: 4}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One logical tensor: `name` has `{rank}` where files are split; `shape` is the joined (tp = 1, padded) shape."""

    name: str
    shape: tuple[int, ...]
    split: Split
    storage: Storage = Storage.FLOAT

    def rank_bytes(self, tp: int, float_size: int) -> int:
        """Size of one rank's file; `float_size` is the bytes of a FLOAT value."""
        values = math.prod(self.rank_shape(tp))
        if self.storage is Storage.NIBBLES:
            return values // 2
        return values * VALUE_BYTES.get(self.storage, float_size)

    def file_names(self, tp: int) -> list[str]:
        if self.split is Split.NONE:
            return [self.name]
        return [self.name.format(rank=rank) for rank in range(tp)]

    def rank_shape(self, tp: int) -> tuple[int, ...]:
        """Stored shape of one rank's file."""
        if self.split is Split.ROWS:
            return (self.shape[0] // tp, *self.shape[1:])
        if self.split in (Split.COLUMNS, Split.QKV_COLUMNS):
            return (*self.shape[:-1], self.shape[-1] // tp)
        return self.shape


def kv_scale_file(layer: int, rank: int) -> str:
    """Static KV scales of a layer and rank, which LMDeploy v0.3's kv_qparams adds to a finished workspace; in no manifest."""
    return f"layers.{layer}.past_kv_scale.{rank}.weight"


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    return -(-vocab_size // tp) * tp


def dense_tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of a 16 or 32 bit workspace, in the order they are written."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    vocab = padded_vocab_size(config.vocab_size, config.tp)
    yield TensorSpec("tok_embeddings.weight", (vocab, hidden), Split.NONE)
    yield TensorSpec("norm.weight", (hidden,), Split.NONE)
    if not config.tie_word_embeddings:
        yield TensorSpec("output.weight", (vocab, hidden), Split.NONE)
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        yield TensorSpec(f"{prefix}.attention_norm.weight", (hidden,), Split.NONE)
        yield TensorSpec(f"{prefix}.ffn_norm.weight", (hidden,), Split.NONE)
        yield TensorSpec(f"{prefix}.attention.w_qkv.{{rank}}.weight", (hidden, q_size + 2 * kv_size), Split.QKV_COLUMNS)
        yield TensorSpec(f"{prefix}.attention.wo.{{rank}}.weight", (q_size, hidden), Split.ROWS)
        if config.attn_bias:
            yield TensorSpec(f"{prefix}.attention.w_qkv.{{rank}}.bias", (q_size + 2 * kv_size,), Split.QKV_COLUMNS)
            yield TensorSpec(f"{prefix}.attention.wo.{{rank}}.bias", (hidden,), Split.COPY)
        if config.qk_norm:
            yield TensorSpec(f"{prefix}.attention.q_norm.weight", (head_dim,), Split.NONE)
            yield TensorSpec(f"{prefix}.attention.k_norm.weight", (head_dim,), Split.NONE)
        yield TensorSpec(f"{prefix}.feed_forward.w1.{{rank}}.weight", (hidden, config.inter_size), Split.COLUMNS)
        yield TensorSpec(f"{prefix}.feed_forward.w3.{{rank}}.weight", (hidden, config.inter_size), Split.COLUMNS)
        yield TensorSpec(f"{prefix}.feed_forward.w2.{{rank}}.weight", (config.inter_size, hidden), Split.ROWS)


def int4_tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of an int4 workspace: the dense ones, each linear replaced by its two files, w1 and w3 by w13."""
    group_size = config.group_size
    for spec in dense_tensor_specs(config):
        linear = spec.name.removesuffix(".{rank}.weight")
        if linear == spec.name:
            yield spec
            continue
        rows, columns = spec.shape
        if linear.endswith(".w3"):
            continue
        if linear.endswith(".w1"):
            linear, columns = linear.removesuffix("1") + "13", 2 * columns
        yield TensorSpec(f"{linear}.{{rank}}.qweight", (rows, columns), spec.split, Storage.NIBBLES)
        yield TensorSpec(f"{linear}.{{rank}}.scales_zeros", (rows // group_size, columns), spec.split, Storage.SCALES_ZEROS)


def scaled_tensor_specs(config: ModelConfig, storage: Storage) -> Iterator[TensorSpec]:
    """Every tensor of an int8 or fp8 workspace: the dense ones, each linear's values in a byte, with a scale an output."""
    for spec in dense_tensor_specs(config):
        linear = spec.name.removesuffix(".{rank}.weight")
        if linear == spec.name:
            yield spec
            continue
        yield TensorSpec(spec.name, spec.shape, spec.split, storage)
        split = Split.COPY if spec.split is Split.ROWS else spec.split  # outputs are whole in every rank of a row split
        yield TensorSpec(f"{linear}.{{rank}}.scale", (spec.shape[1],), split, Storage.SCALE)


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor file's description, whatever the weight_type."""
    if config.weight_type == "int4":
        return int4_tensor_specs(config)
    if config.weight_type in ("int8", "fp8"):
        return scaled_tensor_specs(config, Storage.INT8 if config.weight_type == "int8" else Storage.FP8)
    return dense_tensor_specs(config)
