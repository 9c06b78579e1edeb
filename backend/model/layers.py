"""A decoder layer: its weights and its five op calls."""

from dataclasses import dataclass

import torch

from turbotriton.backend.ops.operands import AttentionBatch, KvPages, LinearWeight, NormWeight, Projected, QkvWeights
from turbotriton.backend.ops.table import OpTable

__all__ = ["LayerWeights", "run_layer"]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    qkv: QkvWeights
    output: LinearWeight  # [num_heads * head_dim, hidden]
    ffn_norm: NormWeight
    gate_up: LinearWeight  # [hidden, 2 inter_size], columns [gate | up]
    down: LinearWeight  # [inter_size, hidden]


def run_layer(
    ops: OpTable,
    weights: LayerWeights,
    x: Projected,
    residual: torch.Tensor | None,
    batch: AttentionBatch,
    kv: tuple[KvPages, KvPages],
    attention_rule: tuple[float, int],
    *,
    is_last: bool = False,
) -> tuple[Projected, torch.Tensor]:
    """x, residual: [num_tokens, hidden]; kv: this layer's (k_cache, v_cache), modified; attention_rule: (scale, sliding_window).
    residual may be changed.

    Returns (x, residual), whose sum is the layer's output; of the last layer x is not Added, since only some rows of it are read.
    """
    q, residual = ops.norm_qkv_rotary_store(x, residual, weights.qkv, batch, *kv)
    attended = ops.attention(q, *kv, batch, *attention_rule)
    projected = ops.output_projection(attended, weights.output, residual)
    activated, residual = ops.norm_gate_up_silu(projected, residual, weights.ffn_norm, weights.gate_up)
    return ops.down_projection(activated, weights.down, None if is_last else residual), residual
