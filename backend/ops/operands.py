"""What the ops take besides tensors: weights in their stored variants and the description of one step's batch.

Tokens of a step are laid out as

    [ decode 0 | decode 1 | ... | prefill chunk 0 ......... | prefill chunk 1 ... ]
      one token a row, num_decodes rows      the remaining rows, in order

A row is one sequence. Every tensor of a batch lives on the device of the KV cache; the plain integers live on the host, so an op
chooses its kernel and its launch sizes without waiting for the device.
"""

from dataclasses import dataclass

import torch

__all__ = ["AttentionBatch", "DenseWeight", "LinearWeight", "NormWeight", "QkvWeights", "SamplingBatch"]


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """y = x W (+ b).

    weight: [in_features, out_features], the compute dtype; any strides
    bias:   [out_features], the compute dtype, or None
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


#: A linear layer's weight. Quantised variants become further members of this union; an op dispatches on the type.
LinearWeight = DenseWeight


@dataclass(frozen=True, slots=True)
class NormWeight:
    """RMSNorm's gain: [hidden], and the epsilon added to the mean square."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class QkvWeights:
    """What stands before attention in a layer.

    qkv columns: [q heads | k heads | v heads], each head's rotary dims half-split (Hugging Face's order)
    q_norm, k_norm: gains over head_dim, before rotary; both or neither
    """

    norm: NormWeight
    qkv: LinearWeight
    q_norm: NormWeight | None = None
    k_norm: NormWeight | None = None


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where each token of the step stands and where its keys and values lie.

    cos, sin:     [num_tokens, rotary_dim / 2], fp32 (attention factor included)
    q_scale:      [num_tokens], fp32: logn attention's factor; None when the model has none
    slot_mapping: [num_tokens], int64: block * block_size + offset of the token's key and value; -1 stores nothing
    block_tables: [num_rows, max_blocks], int32: blocks of each row in sequence order; past its context any valid block
    context_lens: [num_rows], int32: keys that the row's last token may see, itself included
    num_decodes:  rows [0, num_decodes) have one query token each
    max_decode_context: largest context_lens entry of those rows, 0 when there is none
    cu_seqlens_q: [num_rows - num_decodes + 1], int32: query tokens of the remaining rows before each of them, and of all
    prefills:     (num_query_tokens, context_len) of each remaining row; its queries are the last positions of its context
    """

    cos: torch.Tensor
    sin: torch.Tensor
    q_scale: torch.Tensor | None
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    num_decodes: int
    max_decode_context: int
    cu_seqlens_q: torch.Tensor
    prefills: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters of the rows whose logits are drawn from; all tensors have one entry a row unless said.

    banned_rows, banned_ids: [num_banned], int64: token ids that row may not produce now, rows ascending; None when there are none
    banned_starts: [num_rows + 1], int64: where the ids of each row begin in banned_ids; None together with them
    bias_rows, bias_ids: [num_biased], int64, bias: [num_biased], fp32: added to these logits first; None when there are none
    temperature: [num_rows, 1], fp32; 1 where the request says 0 (greedy)
    repetition_penalty, presence_penalty, frequency_penalty: [num_rows, 1], fp32
    output_counts: [num_rows, vocab_size], int32: times the row has produced each token; None when no row has a penalty
    seen: [num_rows, vocab_size], bool: tokens in prompt or output; None together with output_counts
    random_rows: [num_random], int64: rows that are drawn, the others are greedy; None when all are greedy
    top_k: [num_random, 1], int64, in [1, vocab_size] (off: vocab_size);  top_p, min_p: [num_random, 1], fp32
    uniform: [num_random, 1], fp64 in [0, 1): from (seed, position, sample index), see model/sampler.py
    max_top_k: largest top_k; `filters`: some random row has top_k, top_p or min_p on
    """

    temperature: torch.Tensor | None = None  # None: all 1
    banned_rows: torch.Tensor | None = None
    banned_ids: torch.Tensor | None = None
    banned_starts: torch.Tensor | None = None
    bias_rows: torch.Tensor | None = None
    bias_ids: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    repetition_penalty: torch.Tensor | None = None
    presence_penalty: torch.Tensor | None = None
    frequency_penalty: torch.Tensor | None = None
    output_counts: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    random_rows: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None
    uniform: torch.Tensor | None = None
    max_top_k: int = 0
    filters: bool = False

    @property
    def is_plain_greedy(self) -> bool:
        """Every row takes its first largest logit that is not banned; temperatures do not change which that is."""
        return self.random_rows is None and self.output_counts is None and self.bias_ids is None
