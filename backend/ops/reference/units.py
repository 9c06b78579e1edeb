"""The fused units of the decoder layer in plain torch. The contracts are the Protocols of `ops/table.py`.

Units that hold a primitive take it as a keyword, so another column binds its kernel there and keeps the rest.
"""

from collections.abc import Callable

import torch

from ..operands import AttentionBatch, LinearWeight, NormWeight, QkvWeights
from .primitives import rms_norm as reference_rms_norm
from .primitives import rotary_store_kv as reference_rotary_store_kv

__all__ = ["down_projection", "embed", "gate_up_silu", "linear", "lm_head", "norm_qkv_rotary_store", "output_projection_norm"]

RmsNorm = Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
RotaryStoreKv = Callable[..., torch.Tensor]


def linear(x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
    """x: [num_tokens, in_features] -> [num_tokens, out_features]."""
    if weight.bias is None:
        return x @ weight.weight
    return torch.addmm(weight.bias, x, weight.weight)


def embed(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(token_ids, weight)


def norm_qkv_rotary_store(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weights: QkvWeights,
    batch: AttentionBatch,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    rms_norm: RmsNorm = reference_rms_norm,
    rotary_store_kv: RotaryStoreKv = reference_rotary_store_kv,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, residual = rms_norm(x, weights.norm.weight, weights.norm.eps, residual)
    qkv = linear(y, weights.qkv)  # [num_tokens, (num_heads + 2 num_kv_heads) * head_dim]
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    if weights.q_norm is not None and weights.k_norm is not None:
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        for gain, part in (
            (weights.q_norm, heads[:, :num_heads]),
            (weights.k_norm, heads[:, num_heads : num_heads + num_kv_heads]),
        ):
            part.copy_(rms_norm(part.reshape(-1, head_dim), gain.weight, gain.eps, None)[0].view(part.shape))
    q = rotary_store_kv(qkv, batch.cos, batch.sin, batch.q_scale, k_cache, v_cache, batch.slot_mapping, num_heads, num_kv_heads)
    return q, residual


def output_projection_norm(
    attended: torch.Tensor,
    weight: LinearWeight,
    residual: torch.Tensor,
    norm: NormWeight,
    *,
    rms_norm: RmsNorm = reference_rms_norm,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm(linear(attended.flatten(1), weight), norm.weight, norm.eps, residual)


def gate_up_silu(x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
    gate, up = linear(x, weight).chunk(2, dim=-1)  # [num_tokens, inter_size] each
    return torch.nn.functional.silu(gate) * up


def down_projection(x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
    return linear(x, weight)


def lm_head(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: NormWeight,
    weight: LinearWeight,
    *,
    rms_norm: RmsNorm = reference_rms_norm,
) -> torch.Tensor:
    return linear(rms_norm(x, norm.weight, norm.eps, residual)[0], weight).float()
