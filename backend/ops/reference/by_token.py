"""Every unit on one token at a time, for results that do not depend on the batch: `deterministic = 1` in plain torch.

A product's last bits depend on the number of its rows, an activation's on how far an element is from the end of its tensor. So
each token is copied into tensors of its own, whose shapes (and for attention, whose number of keys) depend on the token alone.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from ..operands import (
    AttentionBatch,
    DenseWeight,
    KvPages,
    LinearWeight,
    NormWeight,
    Projected,
    QkvBeforeRotary,
    QkvWeights,
    QuantizedRows,
    W4A16Weight,
)
from . import units
from .attention import attention as mixed_attention
from .linear import dequantized

__all__ = [
    "attention",
    "down_projection",
    "lm_head",
    "norm_gate_up_silu",
    "norm_qkv_rotary_store",
    "output_projection",
]


OTHERS = "quantised rows, and sums that are split or added, are other columns'"


def _tokens(x: torch.Tensor) -> Iterator[torch.Tensor]:
    return (x[i : i + 1].clone() for i in range(len(x)))


def _plain(weight: LinearWeight, dtype: torch.dtype) -> LinearWeight:
    """4 bit weights widened once for all tokens."""
    return DenseWeight(dequantized(weight, dtype), weight.bias) if isinstance(weight, W4A16Weight) else weight


def _pairs(of_token: Callable[[int], tuple[torch.Tensor, torch.Tensor]], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = zip(*(of_token(i) for i in range(num_tokens)), strict=True)
    return torch.cat(first), torch.cat(second)


def norm_qkv_rotary_store(
    x: Projected,
    residual: torch.Tensor | None,
    weights: QkvWeights,
    batch: AttentionBatch,
    k_cache: KvPages,
    v_cache: KvPages,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(x, torch.Tensor), OTHERS
    weights = dataclasses.replace(weights, qkv=_plain(weights.qkv, x.dtype))

    def of_token(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        mine = slice(i, i + 1)
        token = dataclasses.replace(
            batch,
            cos=batch.cos[mine],
            sin=batch.sin[mine],
            q_scale=None if batch.q_scale is None else batch.q_scale[mine],
            slot_mapping=batch.slot_mapping[mine],
        )
        before = None if residual is None else residual[mine].clone()
        q, residual_after = units.norm_qkv_rotary_store(x[mine].clone(), before, weights, token, k_cache, v_cache)
        assert isinstance(q, torch.Tensor), OTHERS
        return q, residual_after

    return _pairs(of_token, len(x))


def attention(
    q: torch.Tensor | QkvBeforeRotary,
    k_cache: KvPages,
    v_cache: KvPages,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each query as a decode of its own, prompts' as well."""
    assert isinstance(q, torch.Tensor), OTHERS
    contexts = batch.context_lens.tolist()
    rows = [(row, contexts[row]) for row in range(batch.num_decodes)]
    for row, (num_queries, context) in enumerate(batch.prefills, batch.num_decodes):
        rows += [(row, seen) for seen in range(context - num_queries + 1, context + 1)]
    parts = []
    for query, (row, seen) in zip(_tokens(q), rows, strict=True):
        token = dataclasses.replace(
            batch,
            block_tables=batch.block_tables[row : row + 1],
            context_lens=torch.tensor([seen], dtype=torch.int32, device=q.device),
            num_decodes=1,
            max_decode_context=seen,
            prefills=(),
        )
        parts.append(mixed_attention(query, k_cache, v_cache, token, scale, sliding_window))
    return torch.cat(parts, out=out)


def output_projection(attended: torch.Tensor, weight: LinearWeight, residual: torch.Tensor | None = None) -> torch.Tensor:
    return down_projection(attended.flatten(1), weight)


def norm_gate_up_silu(
    x: Projected, residual: torch.Tensor, norm: NormWeight, weight: LinearWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(x, torch.Tensor), OTHERS
    plain, tokens, befores = _plain(weight, x.dtype), list(_tokens(x)), list(_tokens(residual))
    return _pairs(lambda i: units.norm_gate_up_silu(tokens[i], befores[i], norm, plain), len(tokens))


def down_projection(x: torch.Tensor | QuantizedRows, weight: LinearWeight, residual: torch.Tensor | None = None) -> torch.Tensor:
    assert isinstance(x, torch.Tensor), OTHERS
    plain = _plain(weight, x.dtype)
    return torch.cat([units.down_projection(token, plain) for token in _tokens(x)])


def lm_head(x: Projected, residual: torch.Tensor, norm: NormWeight, weight: LinearWeight) -> torch.Tensor:
    assert isinstance(x, torch.Tensor), OTHERS
    plain = _plain(weight, x.dtype)
    return torch.cat([units.lm_head(*token, norm, plain) for token in zip(_tokens(x), _tokens(residual), strict=True)])
