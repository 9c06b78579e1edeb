"""The CUDA column of `deterministic = 1`: results of a token that do not depend on what else is in its step, bit for bit.

Whatever adds up has one order that the batch does not change: linear layers of any number of rows go through one kernel, decodes
through the attention of prompt chunks. Norm, rotary, SiLU and sampling work on rows by themselves and stay as they are.
"""

import dataclasses
import functools

import torch

from .kernels import fixed_order_linear
from .kernels.paged_prefill_attention import paged_prefill_attention
from .kernels.quantize_rows import quantize_rows
from .kernels.rms_norm import rms_norm
from .kernels.rotary_store_kv import rotary_store_kv
from .kernels.rotary_store_quantized_kv import rotary_store_quantized_kv
from .kernels.silu_and_mul import silu_and_mul
from .kernels.w4a16_dequantize import dequantize_w4a16
from .kernels.w8a8_linear import w8a8_linear
from .operands import (
    AttentionBatch,
    DenseWeight,
    KvPages,
    LinearWeight,
    NormWeight,
    Projected,
    QkvBeforeRotary,
    W4A16Tiles,
    W4A16Weight,
    W8A8Weight,
)
from .reference import units
from .reference.linear import dequantized, quantized_tokens
from .table import REFERENCE
from .triton_column import TRITON

__all__ = ["DETERMINISTIC"]


def fixed_order_product(x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
    """Every weight but int8, whose sums are exact, through the one kernel; quantised ones widened first."""
    if isinstance(weight, W8A8Weight):
        return w8a8_linear(quantize_rows(x, weight.weight.dtype), weight)
    if isinstance(weight, DenseWeight):
        return fixed_order_linear.linear(x, weight.weight, weight.bias)
    if isinstance(weight, W4A16Tiles):
        return fixed_order_linear.linear(x, dequantize_w4a16(weight), weight.bias)
    if isinstance(weight, W4A16Weight):
        return fixed_order_linear.linear(x, dequantized(weight, x.dtype), weight.bias)
    quantized, scale = quantized_tokens(x, weight.weight.dtype)
    y = fixed_order_linear.linear(quantized.float(), weight.weight.float()) * scale * weight.scale
    return (y if weight.bias is None else y + weight.bias.float()).to(x.dtype)


def fixed_order_norm_linear(
    x: Projected, residual: torch.Tensor | None, norm: NormWeight, weight: LinearWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    y, residual = rms_norm(x, norm.weight, norm.eps, residual)
    return fixed_order_product(y, weight), residual


def fixed_order_norm_gate_up_silu(
    x: Projected, residual: torch.Tensor, norm: NormWeight, weight: LinearWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up, residual = fixed_order_norm_linear(x, residual, norm, weight)
    return silu_and_mul(gate_up), residual


def fixed_order_attention(
    q: torch.Tensor | QkvBeforeRotary,
    k_cache: KvPages,
    v_cache: KvPages,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decodes as chunks of one query: a query then sees its keys in the same tiles and order, alone, in a batch and in any chunk."""
    assert isinstance(q, torch.Tensor), "QkvBeforeRotary is the other column's"
    assert isinstance(k_cache, torch.Tensor), "refused when the engine starts"
    assert isinstance(v_cache, torch.Tensor), "refused when the engine starts"
    bounds = torch.arange(batch.num_decodes + 1, dtype=torch.int32, device=q.device)
    if batch.prefills:
        bounds = torch.cat((bounds[:-1], batch.cu_seqlens_q + batch.num_decodes))
    return paged_prefill_attention(
        q, k_cache, v_cache, batch.block_tables, batch.context_lens, bounds, scale, sliding_window, out
    )


DETERMINISTIC = dataclasses.replace(
    TRITON,
    stage_decode=REFERENCE.stage_decode,  # cosines are torch's in every kind of step
    norm_qkv_rotary_store=functools.partial(
        units.norm_qkv_rotary_store,
        norm_linear=fixed_order_norm_linear,
        rms_norm=rms_norm,
        rotary_store_kv=rotary_store_kv,
        rotary_store_quantized_kv=rotary_store_quantized_kv,
    ),
    attention=fixed_order_attention,
    output_projection=functools.partial(units.output_projection, linear=fixed_order_product),
    norm_gate_up_silu=fixed_order_norm_gate_up_silu,
    down_projection=functools.partial(units.down_projection, linear=fixed_order_product),
    lm_head=functools.partial(units.lm_head, norm_linear=fixed_order_norm_linear),
)
