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

weight_type int4 replaces each linear's `.weight` by `.qweight` and `.scales_zeros` and fuses w1 and w3 into w13: docs/weights.md.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from .ini import ModelConfig

__all__ = ["MANIFEST_NAME", "Split", "TensorSpec", "dense_tensor_specs", "padded_vocab_size"]

MANIFEST_NAME = "manifest.json"


class Split(enum.Enum):
    NONE = "none"  # one file, no rank in its name
    COLUMNS = "columns"  # contiguous share of the last axis
    QKV_COLUMNS = "qkv"  # last axis is [q | k | v], each shared out, then joined a rank
    ROWS = "rows"  # contiguous share of the first axis
    COPY = "copy"  # the same values in every rank's file


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One logical tensor: `name` has `{rank}` where files are split; `shape` is the joined (tp = 1, padded) shape."""

    name: str
    shape: tuple[int, ...]
    split: Split

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
