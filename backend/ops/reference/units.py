"""The fused units of the decoder layer in plain torch. The contracts are the Protocols of `ops/table.py`.

Units that hold a primitive take it as a keyword, so another column binds its kernel there and keeps the rest.
"""

from collections.abc import Callable

import torch

from ..operands import AttentionBatch, KvPages, LinearWeight, NormWeight, QkvWeights
from .kv_pages import page_shape
from .kv_pages import store_pages as reference_store_pages
from .linear import linear as reference_linear
from .primitives import rms_norm as reference_rms_norm
from .primitives import rotary_store_kv as reference_rotary_store_kv
from .primitives import silu_and_mul as reference_silu_and_mul

__all__ = ["down_projection", "embed", "gate_up_silu", "lm_head", "norm_qkv_rotary_store", "output_projection_norm"]

RmsNorm = Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
RotaryStoreKv = Callable[..., torch.Tensor]
SiluAndMul = Callable[[torch.Tensor], torch.Tensor]
Linear = Callable[[torch.Tensor, LinearWeight], torch.Tensor]
StorePages = Callable[[KvPages, torch.Tensor, torch.Tensor], None]


def embed(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(token_ids, weight)


def norm_qkv_rotary_store(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weights: QkvWeights,
    batch: AttentionBatch,
    k_cache: KvPages,
    v_cache: KvPages,
    *,
    rms_norm: RmsNorm = reference_rms_norm,
    rotary_store_kv: RotaryStoreKv = reference_rotary_store_kv,
    linear: Linear = reference_linear,
    store_pages: StorePages = reference_store_pages,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, residual = rms_norm(x, weights.norm.weight, weights.norm.eps, residual)
    qkv = linear(y, weights.qkv)  # [num_tokens, (num_heads + 2 num_kv_heads) * head_dim]
    _, num_kv_heads, _, head_dim = page_shape(k_cache)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    if weights.q_norm is not None and weights.k_norm is not None:
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        for gain, part in (
            (weights.q_norm, heads[:, :num_heads]),
            (weights.k_norm, heads[:, num_heads : num_heads + num_kv_heads]),
        ):
            part.copy_(rms_norm(part.reshape(-1, head_dim), gain.weight, gain.eps, None)[0].view(part.shape))
    rotary = (qkv, batch.cos, batch.sin, batch.q_scale)
    if isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor):
        return rotary_store_kv(*rotary, k_cache, v_cache, batch.slot_mapping, num_heads, num_kv_heads), residual
    # quantised pages take the step's keys and values from a cache of one-token blocks
    k, v = (qkv.new_empty((qkv.shape[0], num_kv_heads, 1, head_dim)) for _ in range(2))
    slots = torch.arange(qkv.shape[0], device=qkv.device)
    q = rotary_store_kv(*rotary, k, v, slots, num_heads, num_kv_heads)
    store_pages(k_cache, batch.slot_mapping, k.squeeze(2))
    store_pages(v_cache, batch.slot_mapping, v.squeeze(2))
    return q, residual


def output_projection_norm(
    attended: torch.Tensor,
    weight: LinearWeight,
    residual: torch.Tensor,
    norm: NormWeight,
    *,
    rms_norm: RmsNorm = reference_rms_norm,
    linear: Linear = reference_linear,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm(linear(attended.flatten(1), weight), norm.weight, norm.eps, residual)


def gate_up_silu(
    x: torch.Tensor,
    weight: LinearWeight,
    *,
    silu_and_mul: SiluAndMul = reference_silu_and_mul,
    linear: Linear = reference_linear,
) -> torch.Tensor:
    return silu_and_mul(linear(x, weight))


def down_projection(x: torch.Tensor, weight: LinearWeight, *, linear: Linear = reference_linear) -> torch.Tensor:
    return linear(x, weight)


def lm_head(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: NormWeight,
    weight: LinearWeight,
    *,
    rms_norm: RmsNorm = reference_rms_norm,
    linear: Linear = reference_linear,
) -> torch.Tensor:
    return linear(rms_norm(x, norm.weight, norm.eps, residual)[0], weight).float()
