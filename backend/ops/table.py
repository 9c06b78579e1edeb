"""The op table: one field for each fused unit that the decoder calls, typed by a Protocol that is the op's contract.

    REFERENCE   plain torch, any device: the definition of every op
    TRITON      our kernels where they exist, written out as replacements in REFERENCE (`triton_column.py`)

`ops_for(device)` chooses a column once, when the model is built. Nothing falls back: a kernel that cannot be imported raises, and
`reference_ops(column)` names the fields that a column shares with REFERENCE.
"""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Protocol

import torch

from .operands import (
    AttentionBatch,
    KvPages,
    LinearWeight,
    NormWeight,
    Projected,
    QkvBeforeRotary,
    QkvWeights,
    QuantizedRows,
    SamplingBatch,
)
from .reference import by_token
from .reference.attention import attention
from .reference.sample import sample
from .reference.stage_decode import advance_decode, stage_decode
from .reference.units import down_projection, embed, lm_head, norm_gate_up_silu, norm_qkv_rotary_store, output_projection

__all__ = ["DETERMINISTIC_REFERENCE", "REFERENCE", "OpTable", "ops_for", "reference_ops"]

logger = logging.getLogger(__name__)


class StageDecode(Protocol):
    """Gathers what a step of decodes needs from the state that is kept by slot; one token a row.

    slots, positions: [num_rows], int64, of each row's token; position -1 is padding, which sees no key and stores none
    token_ids: [num_slots, session_len + 1], int32      block_tables: [num_slots, max_blocks], int32
    inverse_frequencies: [num_slots, rotary_dim / 2], fp32      rope_factor: multiplies cos and sin

    Returns (token ids [num_rows] int32, cos and sin [num_rows, rotary_dim / 2] fp32, slot mapping [num_rows] int64 (-1: padding),
    block tables [num_rows, max_blocks] int32, context lengths [num_rows] int32 (0: padding)). What padding has else is any valid id.
    """

    def __call__(
        self,
        slots: torch.Tensor,
        positions: torch.Tensor,
        token_ids: torch.Tensor,
        block_tables: torch.Tensor,
        inverse_frequencies: torch.Tensor,
        rope_factor: float,
        block_size: int,
    ) -> tuple[torch.Tensor, ...]: ...


class AdvanceDecode(Protocol):
    """Writes the drawn tokens of a step of decodes behind the rows' tokens, and moves the rows on to them, in place.

    slots, positions: [num_padded], int64, as `StageDecode` had them      token_ids: [num_slots, session_len + 1], int32
    drawn: [num_rows], int64: of the first rows; the others, padding, stay as they are
    """

    def __call__(self, slots: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor, drawn: torch.Tensor) -> None: ...


class Embed(Protocol):
    """token_ids: [num_tokens], int32|int64, each in [0, rows)      weight: [rows, hidden]

    out[t] = weight[token_ids[t]];  returns [num_tokens, hidden] in weight's dtype.
    """

    def __call__(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...


class NormQkvRotaryStore(Protocol):
    """All that stands before attention in a layer; writes the step's keys and values into the cache.

    x:        [num_tokens, hidden], the output of the layer before (or the embeddings)
    residual: [num_tokens, hidden], the residual stream without x; None in the first layer
    k_cache, v_cache: this layer's, of one format (KvPages), modified at batch.slot_mapping

        r = x + residual;   y = rms_norm(r);   q, k, v = y W_qkv + b
        q, k = rms_norm over head_dim          where the model has q_norm and k_norm
        q, k = rotary(q), rotary(k);   q *= q_scale;   cache[slot_mapping] = k, v      (quantised as the pages' class says)

    Rounds to the compute dtype after each line; rotary on half-split pairs (i, i + rotary_dim / 2) in fp32.
    Returns (q: [num_tokens, num_heads, head_dim], r: [num_tokens, hidden]). A column whose attention of decodes does the last line gives
    QkvBeforeRotary for q.
    """

    def __call__(
        self,
        x: Projected,
        residual: torch.Tensor | None,
        weights: QkvWeights,
        batch: AttentionBatch,
        k_cache: KvPages,
        v_cache: KvPages,
    ) -> tuple[torch.Tensor | QkvBeforeRotary, torch.Tensor]: ...


class Attention(Protocol):
    """Causal grouped-query attention of a mixed batch over the paged cache, which holds the step's own keys unless q is QkvBeforeRotary.

    q: [num_tokens, num_heads, head_dim], of the column's own NormQkvRotaryStore; head h reads kv head h // (num_heads / num_kv_heads)
    k_cache, v_cache: this layer's, of one format; quantised ones stand for the values that their class defines
    scale: multiplies q k^T, usually head_dim ** -0.5
    sliding_window: keys that a query sees, itself included; 0: all

        a query at position p sees keys max(0, p + 1 - sliding_window) <= j <= p of its own row

    out: of the result's shape and dtype, contiguous: filled and returned; None: a new tensor

    Scores, softmax and the sum over values in fp32, rounded once. Returns [num_tokens, num_heads, head_dim].
    """

    def __call__(
        self,
        q: torch.Tensor | QkvBeforeRotary,
        k_cache: KvPages,
        v_cache: KvPages,
        batch: AttentionBatch,
        scale: float,
        sliding_window: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class OutputProjection(Protocol):
    """attended: [num_tokens, num_heads, head_dim] -> attended W_o + b: [num_tokens, hidden]. The next op adds it to the residual.

    A column may leave the last sum to that op (SplitSums), or add to `residual`, [num_tokens, hidden], in place (Added); not where
    there is none. Nobody reads the residual in between.
    """

    def __call__(self, attended: torch.Tensor, weight: LinearWeight, residual: torch.Tensor | None = None) -> Projected: ...


class NormGateUpSilu(Protocol):
    """Residual sum, norm, and first half of the gated feed-forward network (Shazeer 2020, arXiv:2002.05202).

    x: [num_tokens, hidden], attention's output projection      residual: [num_tokens, hidden]
    weight: hidden -> 2 inter_size, columns [gate | up]

        r = x + residual;   y = rms_norm(r);   out = silu(y W_gate) * (y W_up)

    Rounds to the compute dtype after each line. Returns (out: [num_tokens, inter_size], r: [num_tokens, hidden]). Over 8 bit weights a
    column may return out as QuantizedRows, what the down projection would make of it.
    """

    def __call__(
        self, x: Projected, residual: torch.Tensor, norm: NormWeight, weight: LinearWeight
    ) -> tuple[torch.Tensor | QuantizedRows, torch.Tensor]: ...


class DownProjection(Protocol):
    """x: [num_tokens, inter_size], as the column's norm_gate_up_silu gives it -> x W_down: [num_tokens, hidden]. The next op adds it to
    the residual and normalises; of a column's SplitSums and Added OutputProjection says what they are."""

    def __call__(
        self, x: torch.Tensor | QuantizedRows, weight: LinearWeight, residual: torch.Tensor | None = None
    ) -> Projected: ...


class LmHead(Protocol):
    """Final residual sum, norm and projection to the vocabulary, of the rows that are sampled only.

    x, residual: [num_rows, hidden]      weight: hidden -> vocab_size

    Returns rms_norm(x + residual) W: [num_rows, vocab_size], in the compute dtype.
    """

    def __call__(self, x: Projected, residual: torch.Tensor, norm: NormWeight, weight: LinearWeight) -> torch.Tensor: ...


class Sample(Protocol):
    """The next token of each row. logits: [num_rows, vocab_size], not modified. Returns [num_rows], int64.

    In fp32, an operation at a time, and in this order: NaN to -inf;  l += bias;  banned ids to -inf;  l = l / temperature;  where seen,
    l = l p if l < 0 else l / p (p = repetition_penalty, arXiv:1909.05858);  l -= presence_penalty [count > 0];
    l -= frequency_penalty count (counts of the output).

    Greedy rows (top_k 1) and rows without a finite logit: the first largest logit. The others in whole numbers, so that neither the
    order of a sum nor the device matters:

        w = floor(2^44 e^(l - largest l)),   `integer_weights` in reference/sample.py
        top-k: the k largest;   top-p: of those, descending, each whose predecessors sum to less than top_p times the sum of all k
        (arXiv:1904.09751);   min-p: w >= 2^44 min_p;   then every w that is at least the smallest kept
        C = running sums of the kept w over ascending ids: the first id with C[id] > floor(uniform C[last])

    Products with top_p and uniform in fp64. The draw depends on the row's logits, parameters and uniform number alone.
    """

    def __call__(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class OpTable:
    """One column: an implementation of every op, for one kind of device."""

    stage_decode: StageDecode
    advance_decode: AdvanceDecode
    embed: Embed
    norm_qkv_rotary_store: NormQkvRotaryStore
    attention: Attention
    output_projection: OutputProjection
    norm_gate_up_silu: NormGateUpSilu
    down_projection: DownProjection
    lm_head: LmHead
    sample: Sample


REFERENCE = OpTable(
    stage_decode=stage_decode,
    advance_decode=advance_decode,
    embed=embed,
    norm_qkv_rotary_store=norm_qkv_rotary_store,
    attention=attention,
    output_projection=output_projection,
    norm_gate_up_silu=norm_gate_up_silu,
    down_projection=down_projection,
    lm_head=lm_head,
    sample=sample,
)


#: `deterministic = 1` without a GPU.
DETERMINISTIC_REFERENCE = dataclasses.replace(
    REFERENCE,
    norm_qkv_rotary_store=by_token.norm_qkv_rotary_store,
    attention=by_token.attention,
    output_projection=by_token.output_projection,
    norm_gate_up_silu=by_token.norm_gate_up_silu,
    down_projection=by_token.down_projection,
    lm_head=by_token.lm_head,
)


def reference_ops(column: OpTable) -> list[str]:
    """Names of the ops that `column` takes unchanged from REFERENCE."""
    return [f.name for f in dataclasses.fields(OpTable) if getattr(column, f.name) is getattr(REFERENCE, f.name)]


def ops_for(device: torch.device, *, deterministic: bool = False) -> OpTable:
    """The column for a device: TRITON on CUDA, REFERENCE elsewhere, or those whose results do not depend on the batch.

    Raises ImportError when a kernel does not import.
    """
    if device.type != "cuda":
        return DETERMINISTIC_REFERENCE if deterministic else REFERENCE
    from .deterministic_column import DETERMINISTIC
    from .kernels.compiled import name_kernels
    from .triton_column import TRITON

    name_kernels()
    column = DETERMINISTIC if deterministic else TRITON
    logger.info("ops on the plain torch reference: %s", ", ".join(reference_ops(column)))
    return column
