"""The decoder: embeddings, layers, head. It reads ModelConfig's flags and knows no architecture name.

    ids -> embed -> layer 0 .. n-1 -> (rows that are sampled) -> final norm, head -> logits

Weights are in the device's layout (`runner/weights.py` makes it); keys and values live in the paged cache that the caller passes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turbotriton.backend.ops.operands import Added, AttentionBatch, KvPages, LinearWeight, NormWeight, Projected, Unadded
from turbotriton.backend.ops.table import OpTable
from turbotriton.contract.ini import ModelConfig

from .layers import LayerWeights, run_layer

__all__ = ["Decoder", "ModelWeights", "logn_scale"]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embeddings: torch.Tensor  # [rows >= vocab_size, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: NormWeight
    head: LinearWeight  # [hidden, vocab_size]

    @property
    def num_elements(self) -> int:
        """Matrix elements, each used once for a token; a tied head counts as the head it is."""
        layers = sum(
            linear.num_elements for layer in self.layers for linear in (layer.qkv.qkv, layer.output, layer.gate_up, layer.down)
        )
        return layers + self.head.num_elements


def logn_scale(positions: torch.Tensor, max_position_embeddings: int) -> torch.Tensor:
    """Logn attention's factor on q, fp32: max(1, ln(position + 1) / ln(max_position_embeddings)). positions: [num_tokens]."""
    return (torch.log(positions.float() + 1) / math.log(max_position_embeddings)).clamp(min=1.0)


class Decoder:
    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: OpTable) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.attention_rule = (config.head_dim**-0.5, config.sliding_window)

    def hidden_states(
        self, token_ids: torch.Tensor, batch: AttentionBatch, k_caches: Sequence[KvPages], v_caches: Sequence[KvPages]
    ) -> tuple[Unadded, torch.Tensor]:
        """token_ids: [num_tokens]; k_caches, v_caches: one KvPages a layer, modified.

        Returns (x, residual), both [num_tokens, hidden], whose sum enters the final norm.
        """
        x: Projected = self.ops.embed(token_ids, self.weights.embeddings)
        residual: torch.Tensor | None = None
        last = self.weights.layers[-1]
        for layer, k_cache, v_cache in zip(self.weights.layers, k_caches, v_caches, strict=True):
            x, residual = run_layer(
                self.ops, layer, x, residual, batch, (k_cache, v_cache), self.attention_rule, is_last=layer is last
            )
        assert residual is not None
        assert not isinstance(x, Added)
        return x, residual

    def logits(self, x: Unadded, residual: torch.Tensor) -> torch.Tensor:
        """x, residual: [num_rows, hidden] of the sampled rows -> [num_rows, vocab_size], in the compute dtype."""
        return self.ops.lm_head(x, residual, self.weights.final_norm, self.weights.head)
