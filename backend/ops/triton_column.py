"""The CUDA column: REFERENCE with our kernels bound in. Importing this needs the triton package; a broken kernel raises here.

Linear layers are cuBLAS's, but for a few rows: there the time is that of reading the weight once, and ours read it faster, with the
norm before and the activation after in the same launch.
"""

import dataclasses
import functools
from typing import TypeGuard

import torch

from .kernels import fixed_order_linear, narrow_linear, skinny_linear
from .kernels.paged_decode_attention import paged_decode_attention
from .kernels.paged_prefill_attention import paged_prefill_attention
from .kernels.quantized_decode_attention import quantized_decode_attention
from .kernels.rms_norm import rms_norm
from .kernels.rotary_store_kv import rotary_store_kv
from .kernels.rotary_store_quantized_kv import rotary_store_quantized_kv
from .kernels.sample import sample
from .kernels.silu_and_mul import silu_and_mul
from .kernels.stage_decode import stage_decode
from .kernels.tuning import (
    MANY_OUTPUTS,
    MAX_NARROW_GATED_ROWS,
    MAX_NARROW_ROWS,
    MAX_SKINNY_NORM_ELEMENTS,
    MAX_W4A16_ROWS,
    next_power_of_2,
)
from .kernels.w4a16_linear import dequantize_w4a16, w4a16_gate_up, w4a16_linear
from .kernels.w8a8_linear import w8a8_linear
from .operands import AttentionBatch, DenseWeight, KvPages, LinearWeight, NormWeight, W4A16Tiles, W4A16Weight, W8A8Weight
from .reference import units
from .reference.attention import attention
from .reference.linear import dequantized, quantized_tokens
from .table import REFERENCE

__all__ = ["DETERMINISTIC", "TRITON", "UNITS_WITH_REFERENCE_PARTS"]


def _has_rows_stored(weight: LinearWeight, x: torch.Tensor, max_rows: int) -> TypeGuard[DenseWeight]:
    """A dense weight stored by outputs, and not too many rows."""
    return isinstance(weight, DenseWeight) and x.shape[0] <= max_rows and weight.weight.stride(0) == 1


def _is_skinny(weight: LinearWeight, x: torch.Tensor) -> TypeGuard[DenseWeight]:
    return _has_rows_stored(weight, x, skinny_linear.MAX_SKINNY_ROWS)


def _is_narrow(weight: LinearWeight, x: torch.Tensor) -> TypeGuard[DenseWeight]:
    if not _has_rows_stored(weight, x, MAX_NARROW_ROWS) or x.element_size() != 2:
        return False
    k, n = weight.weight.shape
    return k > n or n > MANY_OUTPUTS


def _norm_fits(x: torch.Tensor) -> bool:
    return next_power_of_2(x.shape[0]) * next_power_of_2(x.shape[1]) <= MAX_SKINNY_NORM_ELEMENTS


def linear(x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
    if _is_skinny(weight, x):
        return skinny_linear.linear(x, weight.weight, weight.bias)
    if _is_narrow(weight, x):
        return narrow_linear.linear(x, weight.weight, weight.bias)
    if isinstance(weight, W4A16Tiles):
        if x.shape[0] <= MAX_W4A16_ROWS and not weight.gated:
            return w4a16_linear(x, weight)
        return units.linear(x, DenseWeight(dequantize_w4a16(weight), weight.bias))
    if isinstance(weight, W8A8Weight):
        return w8a8_linear(x, weight)
    return units.linear(x, weight)


def norm_linear(
    x: torch.Tensor, residual: torch.Tensor | None, norm: NormWeight, weight: LinearWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_skinny(weight, x) and _norm_fits(x):
        return skinny_linear.norm_linear(x, residual, norm.weight, norm.eps, weight.weight, weight.bias)
    y, residual = rms_norm(x, norm.weight, norm.eps, residual)
    return linear(y, weight), residual


def norm_gate_up_silu(
    x: torch.Tensor, residual: torch.Tensor, norm: NormWeight, weight: LinearWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_skinny(weight, x) and _norm_fits(x):
        return skinny_linear.norm_gate_up(x, residual, norm.weight, norm.eps, weight.weight, weight.bias)
    if isinstance(weight, W4A16Tiles) and x.shape[0] <= MAX_W4A16_ROWS:
        y, residual = rms_norm(x, norm.weight, norm.eps, residual)
        return w4a16_gate_up(y, weight), residual
    if _has_rows_stored(weight, x, MAX_NARROW_GATED_ROWS) and x.element_size() == 2:
        y, residual = rms_norm(x, norm.weight, norm.eps, residual)
        return narrow_linear.gate_up(y, weight.weight, weight.bias), residual
    gate_up, residual = norm_linear(x, residual, norm, weight)
    return silu_and_mul(gate_up), residual


def fixed_order_product(x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
    """Every weight but int8, whose sums are exact in any order, through the one kernel; quantised ones widened first."""
    if isinstance(weight, W8A8Weight):
        return w8a8_linear(x, weight)
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
    x: torch.Tensor, residual: torch.Tensor | None, norm: NormWeight, weight: LinearWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    y, residual = rms_norm(x, norm.weight, norm.eps, residual)
    return fixed_order_product(y, weight), residual


def fixed_order_norm_gate_up_silu(
    x: torch.Tensor, residual: torch.Tensor, norm: NormWeight, weight: LinearWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up, residual = fixed_order_norm_linear(x, residual, norm, weight)
    return silu_and_mul(gate_up), residual


def fixed_order_attention(
    q: torch.Tensor, k_cache: KvPages, v_cache: KvPages, batch: AttentionBatch, scale: float, sliding_window: int
) -> torch.Tensor:
    """Decodes as chunks of one query: a query then sees its keys in the same tiles and order, alone, in a batch and in any chunk."""
    assert isinstance(k_cache, torch.Tensor), "refused when the engine starts"
    assert isinstance(v_cache, torch.Tensor), "refused when the engine starts"
    bounds = torch.arange(batch.num_decodes + 1, dtype=torch.int32, device=q.device)
    if batch.prefills:
        bounds = torch.cat((bounds[:-1], batch.cu_seqlens_q + batch.num_decodes))
    return paged_prefill_attention(q, k_cache, v_cache, batch.block_tables, batch.context_lens, bounds, scale, sliding_window)


TRITON = dataclasses.replace(
    REFERENCE,
    stage_decode=stage_decode,
    norm_qkv_rotary_store=functools.partial(
        units.norm_qkv_rotary_store,
        norm_linear=norm_linear,
        rms_norm=rms_norm,
        rotary_store_kv=rotary_store_kv,
        rotary_store_quantized_kv=rotary_store_quantized_kv,
    ),
    attention=functools.partial(
        attention,
        paged_decode_attention=paged_decode_attention,
        paged_prefill_attention=paged_prefill_attention,
        quantized_decode_attention=quantized_decode_attention,
    ),
    output_projection=functools.partial(units.output_projection, linear=linear),
    norm_gate_up_silu=norm_gate_up_silu,
    down_projection=functools.partial(units.down_projection, linear=linear),
    lm_head=functools.partial(units.lm_head, norm_linear=norm_linear),
    sample=sample,
)

#: `deterministic = 1`: whatever adds up has one order that the batch does not change. Cosines are torch's in every kind of step.
DETERMINISTIC = dataclasses.replace(
    TRITON,
    stage_decode=REFERENCE.stage_decode,
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

#: Parts of units above that run on plain torch where a kernel is missing, for the log and `check_env`. GEMMs are cuBLAS's by choice.
UNITS_WITH_REFERENCE_PARTS: tuple[str, ...] = (
    "linear over fp8 weights",
    "prefill over quantised KV (widened by torch, then the kernel)",
)
