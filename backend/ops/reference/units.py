"""The fused units of the decoder layer in plain torch. The contracts are the Protocols of `ops/table.py`.

Units that hold a primitive take it as a keyword, so another column binds its kernel there and keeps the rest. Projections leave the
residual to the next unit, as their contract allows.
"""

from collections.abc import Callable

import torch

from ..operands import (
    AttentionBatch,
    KvPages,
    LinearWeight,
    NormWeight,
    Projected,
    QkvBeforeRotary,
    QkvWeights,
    QuantizedRows,
    Unadded,
)
from .kv_pages import page_shape, rotary_store_quantized_kv
from .linear import linear
from .primitives import rms_norm, rotary_store_kv, silu_and_mul

__all__ = [
    "down_projection",
    "embed",
    "linear",
    "lm_head",
    "norm_gate_up_silu",
    "norm_linear",
    "norm_qkv_rotary_store",
    "output_projection",
]

RmsNorm = Callable[[Projected, torch.Tensor, float, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
Linear = Callable[[torch.Tensor, LinearWeight], torch.Tensor]
NormLinear = Callable[[Projected, torch.Tensor | None, NormWeight, LinearWeight], tuple[torch.Tensor, torch.Tensor]]
UnaddedNormLinear = Callable[[Projected, torch.Tensor | None, NormWeight, LinearWeight], tuple[Unadded, torch.Tensor]]
RotaryStoreKv = Callable[..., torch.Tensor | QkvBeforeRotary]


def embed(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(token_ids, weight)


def norm_linear(
    x: Projected, residual: torch.Tensor | None, norm: NormWeight, weight: LinearWeight, *, linear: Linear = linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """(linear of rms_norm(x + residual), x + residual); without a residual x itself."""
    y, residual = rms_norm(x, norm.weight, norm.eps, residual)
    return linear(y, weight), residual


def norm_qkv_rotary_store(
    x: Projected,
    residual: torch.Tensor | None,
    weights: QkvWeights,
    batch: AttentionBatch,
    k_cache: KvPages,
    v_cache: KvPages,
    *,
    norm_linear: UnaddedNormLinear = norm_linear,
    rms_norm: RmsNorm = rms_norm,
    rotary_store_kv: RotaryStoreKv = rotary_store_kv,
    rotary_store_quantized_kv: RotaryStoreKv = rotary_store_quantized_kv,
) -> tuple[torch.Tensor | QkvBeforeRotary, torch.Tensor]:
    qkv, residual = norm_linear(x, residual, weights.norm, weights.qkv)  # [num_tokens, (num_heads + 2 num_kv_heads) * head_dim]
    _, num_kv_heads, _, head_dim = page_shape(k_cache)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    if weights.q_norm is not None and weights.k_norm is not None:
        assert isinstance(qkv, torch.Tensor), "the norms of q and k take whole sums"
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        for gain, part in (
            (weights.q_norm, heads[:, :num_heads]),
            (weights.k_norm, heads[:, num_heads : num_heads + num_kv_heads]),
        ):
            part.copy_(rms_norm(part.reshape(-1, head_dim), gain.weight, gain.eps, None)[0].view(part.shape))
    store = rotary_store_kv if isinstance(k_cache, torch.Tensor) else rotary_store_quantized_kv
    q = store(qkv, batch.cos, batch.sin, batch.q_scale, k_cache, v_cache, batch.slot_mapping, num_heads, num_kv_heads)
    return q, residual


def output_projection(
    attended: torch.Tensor, weight: LinearWeight, residual: torch.Tensor | None = None, *, linear: Linear = linear
) -> torch.Tensor:
    return linear(attended.flatten(1), weight)


def norm_gate_up_silu(
    x: Projected, residual: torch.Tensor, norm: NormWeight, weight: LinearWeight, *, norm_linear: NormLinear = norm_linear
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up, residual = norm_linear(x, residual, norm, weight)
    return silu_and_mul(gate_up), residual


def down_projection(
    x: torch.Tensor | QuantizedRows, weight: LinearWeight, residual: torch.Tensor | None = None, *, linear: Linear = linear
) -> torch.Tensor:
    assert isinstance(x, torch.Tensor), "QuantizedRows are a column's own"
    return linear(x, weight)


def lm_head(
    x: Projected, residual: torch.Tensor, norm: NormWeight, weight: LinearWeight, *, norm_linear: NormLinear = norm_linear
) -> torch.Tensor:
    return norm_linear(x, residual, norm, weight)[0]
