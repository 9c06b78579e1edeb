"""The CUDA column: REFERENCE with our kernels bound in. Importing this needs the triton package; a broken kernel raises here.

Linear layers are cuBLAS's, but for a few rows: there the time is that of reading the weight once, and ours read it faster, with the
norm before and the activation after in the same launch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeGuard

import torch

from .kernels import (
    hopper_gate_up,
    hopper_row_linear,
    hopper_row_qkv,
    hopper_row_w4a16,
    narrow_linear,
    skinny_linear,
    skinny_qkv,
)
from .kernels.hopper_tuning import is_for_hopper_gate_up
from .kernels.launch import is_hopper, shared_memory_bytes
from .kernels.paged_decode_attention import paged_decode_attention, rotary_decode_attention, takes_rotary
from .kernels.paged_prefill_attention import paged_prefill_attention
from .kernels.quantize_rows import quantize_rows, rms_norm_rows
from .kernels.quantized_decode_attention import quantized_decode_attention
from .kernels.quantized_prefill_attention import quantized_prefill_attention
from .kernels.rms_norm import rms_norm
from .kernels.rotary_store_kv import rotary_store_kv
from .kernels.rotary_store_quantized_kv import rotary_store_quantized_kv
from .kernels.sample import sample
from .kernels.silu_and_mul import silu_and_mul
from .kernels.split_product import split_product
from .kernels.stage_decode import advance_decode, stage_decode
from .kernels.tuning import (
    MANY_OUTPUTS,
    MAX_NARROW_GATED_ROWS,
    MAX_NARROW_ROWS,
    MAX_NARROW_ROWS_OF_ANY,
    MAX_ROWS_BEFORE_NARROW,
    MAX_SKINNY_NORM_ELEMENTS,
    MAX_SPLIT_PRODUCT_ROWS,
    MAX_TURNING_ROWS,
    MAX_W4A16_ROWS,
    MIN_NARROW_SHARED_BYTES,
    ceil_div,
    next_power_of_2,
    num_product_parts,
)
from .kernels.w4a16_dequantize import dequantize_w4a16
from .kernels.w4a16_linear import w4a16_gate_up, w4a16_linear, w4a16_split_linear
from .kernels.w8a8_linear import w8a8_gate_up, w8a8_linear, w8a8_split_linear
from .operands import (
    Added,
    AttentionBatch,
    DenseWeight,
    Fp8Weight,
    KvPages,
    LinearWeight,
    NormWeight,
    Projected,
    QkvBeforeRotary,
    QkvWeights,
    QuantizedRows,
    Unadded,
    W4A16Tiles,
    W8A8Weight,
)
from .reference import units
from .reference.attention import attention as by_kind_of_rows
from .table import REFERENCE

__all__ = ["TRITON", "is_by_library"]

_attention = functools.partial(
    by_kind_of_rows,
    paged_decode_attention=paged_decode_attention,
    paged_prefill_attention=paged_prefill_attention,
    quantized_decode_attention=quantized_decode_attention,
    quantized_prefill_attention=quantized_prefill_attention,
)
NormAndLayer = Callable[..., tuple[torch.Tensor, torch.Tensor]]
EIGHT_BIT = (W8A8Weight, Fp8Weight)  # a union would be made anew at each question


def _has_rows_stored(weight: LinearWeight, x: torch.Tensor, max_rows: int) -> TypeGuard[DenseWeight]:
    """A dense weight stored by outputs, and not too many rows."""
    return isinstance(weight, DenseWeight) and x.shape[0] <= max_rows and weight.weight.stride(0) == 1


def _may_be_narrow(x: torch.Tensor) -> bool:
    return x.element_size() == 2 and shared_memory_bytes(x.device) >= MIN_NARROW_SHARED_BYTES


def _is_skinny(weight: LinearWeight, x: torch.Tensor) -> TypeGuard[DenseWeight]:
    if x.shape[0] > skinny_linear.MAX_SKINNY_ROWS and x.shape[0] > MAX_ROWS_BEFORE_NARROW:
        return False  # known without asking the device
    return _has_rows_stored(weight, x, MAX_ROWS_BEFORE_NARROW if _may_be_narrow(x) else skinny_linear.MAX_SKINNY_ROWS)


def _fits_narrow(weight: LinearWeight, x: torch.Tensor, max_rows: int) -> TypeGuard[DenseWeight]:
    return _has_rows_stored(weight, x, max_rows) and _may_be_narrow(x)


def _is_narrow(weight: LinearWeight, x: torch.Tensor) -> TypeGuard[DenseWeight]:
    if not _fits_narrow(weight, x, MAX_NARROW_ROWS):
        return False
    k, n = weight.weight.shape
    return k >= n or n > MANY_OUTPUTS or x.shape[0] <= MAX_NARROW_ROWS_OF_ANY


def _is_hopper_gate_up(weight: LinearWeight, x: torch.Tensor) -> TypeGuard[DenseWeight]:
    """Enough rows for the gated layer of prompts, where the device and the weight are what it takes."""
    return isinstance(weight, DenseWeight) and is_for_hopper_gate_up(x.shape[0]) and hopper_gate_up.takes(x, weight.weight)


def is_by_library(weight: LinearWeight, x: torch.Tensor, *, gated: bool = False) -> bool:
    """Whether a layer after a norm may be cuBLAS's: a kernel of ours is loaded once for all numbers of rows."""
    if gated:
        return not (_fits_narrow(weight, x, MAX_NARROW_GATED_ROWS) or _is_hopper_gate_up(weight, x))
    return not _is_narrow(weight, x)


def _turns_whole(batch: AttentionBatch, k_cache: torch.Tensor) -> bool:
    """Whether rotary takes all dims of a head."""
    return 2 * batch.cos.shape[1] == k_cache.shape[3]


def _norm_fits(x: torch.Tensor) -> bool:
    return next_power_of_2(x.shape[0]) * next_power_of_2(x.shape[1]) <= MAX_SKINNY_NORM_ELEMENTS


def _in_8_bit(x: torch.Tensor | QuantizedRows, weight: W8A8Weight | Fp8Weight) -> QuantizedRows:
    return x if isinstance(x, QuantizedRows) else quantize_rows(x, weight.weight.dtype)


def linear(x: torch.Tensor | QuantizedRows, weight: LinearWeight) -> torch.Tensor:
    if isinstance(weight, EIGHT_BIT):
        return w8a8_linear(_in_8_bit(x, weight), weight)
    assert isinstance(x, torch.Tensor), "8 bit rows meet 8 bit weights only"
    if _is_skinny(weight, x):
        of_few = hopper_row_linear.linear if hopper_row_linear.takes(x, weight.weight) else skinny_linear.linear
        return of_few(x, weight.weight, weight.bias)
    if _is_narrow(weight, x):
        return narrow_linear.linear(x, weight.weight, weight.bias)
    if isinstance(weight, W4A16Tiles):
        if hopper_row_w4a16.takes(x, weight) and not weight.gated:
            return hopper_row_w4a16.linear(x, weight)
        if x.shape[0] <= MAX_W4A16_ROWS and not weight.gated:
            return w4a16_linear(x, weight)
        return units.linear(x, DenseWeight(dequantize_w4a16(weight), weight.bias))
    return units.linear(x, weight)


def down_projection(x: torch.Tensor | QuantizedRows, weight: LinearWeight, residual: torch.Tensor | None = None) -> Projected:
    """`linear` before a norm. Few rows leave it their last sums; the product of many adds to the residual stream, whose rows it reads
    and writes while it computes, where the norm would do nothing else for as long."""
    if isinstance(weight, EIGHT_BIT):
        return w8a8_split_linear(_in_8_bit(x, weight), weight)
    if isinstance(weight, W4A16Tiles) and isinstance(x, torch.Tensor):
        if x.shape[0] <= MAX_W4A16_ROWS:
            return linear(x, weight) if hopper_row_w4a16.takes(x, weight) else w4a16_split_linear(x, weight)
        weight = DenseWeight(dequantize_w4a16(weight), weight.bias)
    if isinstance(weight, DenseWeight) and weight.bias is None and isinstance(x, torch.Tensor) and not _is_skinny(weight, x):
        if x.shape[0] > MAX_SPLIT_PRODUCT_ROWS and residual is not None:
            return Added(residual.addmm_(x, weight.weight))
        if _is_narrow(weight, x):
            return narrow_linear.split_linear(x, weight.weight)
        if is_hopper(x.device) and x.element_size() == 2:
            k, n = weight.weight.shape
            num_parts = num_product_parts(x.shape[0], n, k)
            if num_parts > 1:
                return split_product(x, weight.weight, num_parts)
    return linear(x, weight)


def output_projection(attended: torch.Tensor, weight: LinearWeight, residual: torch.Tensor | None = None) -> Projected:
    return down_projection(attended.flatten(1), weight, residual)


def _joined(
    functions: tuple[NormAndLayer, NormAndLayer, NormAndLayer],
    x: Projected,
    residual: torch.Tensor | None,
    norm: NormWeight,
    weight: LinearWeight,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A norm and a layer in one launch, by a function for one row on Hopper, few rows, or 4 bits; None: there is none for these."""
    of_row, of_few, of_4_bits = functions
    if not isinstance(x, torch.Tensor):
        return None
    if _is_skinny(weight, x) and _norm_fits(x):
        function = of_row if hopper_row_linear.takes(x, weight.weight) else of_few
        return function(x, residual, norm.weight, norm.eps, weight.weight, weight.bias)
    if isinstance(weight, W4A16Tiles) and hopper_row_w4a16.takes(x, weight):
        return of_4_bits(x, residual, norm.weight, norm.eps, weight)
    return None


def _norm_rows(
    x: Projected, residual: torch.Tensor | None, norm: NormWeight, weight: W8A8Weight | Fp8Weight
) -> tuple[QuantizedRows, torch.Tensor]:
    summed, residual = (x.total, None) if isinstance(x, Added) else (x, residual)
    return rms_norm_rows(summed, norm.weight, norm.eps, residual, weight.weight.dtype)


def norm_linear(
    x: Projected, residual: torch.Tensor | None, norm: NormWeight, weight: LinearWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(weight, EIGHT_BIT):
        rows, residual = _norm_rows(x, residual, norm, weight)
        return w8a8_linear(rows, weight), residual
    functions = hopper_row_linear.norm_linear, skinny_linear.norm_linear, hopper_row_w4a16.norm_linear
    if (joined := _joined(functions, x, residual, norm, weight)) is not None:
        return joined
    y, residual = rms_norm(x, norm.weight, norm.eps, residual)
    return linear(y, weight), residual


def _norm_linear_before_rotary(
    x: Projected, residual: torch.Tensor | None, norm: NormWeight, weight: LinearWeight
) -> tuple[Unadded, torch.Tensor]:
    """`norm_linear` whose last sums are left to rotary."""
    if isinstance(weight, EIGHT_BIT):
        rows, residual = _norm_rows(x, residual, norm, weight)
        return w8a8_split_linear(rows, weight), residual
    if isinstance(weight, W4A16Tiles):
        if x.shape[0] > MAX_W4A16_ROWS or (isinstance(x, torch.Tensor) and hopper_row_w4a16.takes(x, weight)):
            return norm_linear(x, residual, norm, weight)
        y, residual = rms_norm(x, norm.weight, norm.eps, residual)
        return w4a16_split_linear(y, weight), residual
    if not isinstance(weight, DenseWeight) or (isinstance(x, torch.Tensor) and _is_skinny(weight, x)):
        return norm_linear(x, residual, norm, weight)
    y, residual = rms_norm(x, norm.weight, norm.eps, residual)
    is_narrow = _is_narrow(weight, y)
    return narrow_linear.split_linear(y, weight.weight, weight.bias) if is_narrow else linear(y, weight), residual


def _rotary_by_attention(qkv: Unadded, *angles_caches_and_slots: Any) -> torch.Tensor | QkvBeforeRotary:
    """`rotary_store_kv` of a graph's decodes, left to their attention where its tiles have room and that is faster."""
    *_, num_heads, num_kv_heads = angles_caches_and_slots
    if qkv.shape[0] <= MAX_TURNING_ROWS and takes_rotary(num_heads // num_kv_heads):
        return QkvBeforeRotary(qkv)
    return rotary_store_kv(qkv, *angles_caches_and_slots)


def norm_qkv_rotary_store(
    x: Projected,
    residual: torch.Tensor | None,
    weights: QkvWeights,
    batch: AttentionBatch,
    k_cache: KvPages,
    v_cache: KvPages,
) -> tuple[torch.Tensor | QkvBeforeRotary, torch.Tensor]:
    qkv = weights.qkv
    is_few = weights.q_norm is None and isinstance(x, torch.Tensor) and _is_skinny(qkv, x) and _norm_fits(x)
    if isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor) and is_few and _turns_whole(batch, k_cache):
        assert isinstance(qkv, DenseWeight)
        assert isinstance(x, torch.Tensor)
        is_row = hopper_row_qkv.takes(x, qkv.weight, k_cache.shape[3])
        of_few = hopper_row_qkv.norm_qkv_rotary_store if is_row else skinny_qkv.norm_qkv_rotary_store
        return of_few(
            x,
            residual,
            weights.norm.weight,
            weights.norm.eps,
            qkv.weight,
            qkv.bias,
            batch.cos,
            batch.sin,
            batch.q_scale,
            k_cache,
            v_cache,
            batch.slot_mapping,
        )
    return units.norm_qkv_rotary_store(
        x,
        residual,
        weights,
        batch,
        k_cache,
        v_cache,
        norm_linear=norm_linear if weights.q_norm is not None else _norm_linear_before_rotary,
        rms_norm=rms_norm,
        rotary_store_kv=_rotary_by_attention if batch.is_captured else rotary_store_kv,
        rotary_store_quantized_kv=rotary_store_quantized_kv,
    )


def attention(
    q: torch.Tensor | QkvBeforeRotary,
    k_cache: KvPages,
    v_cache: KvPages,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if not isinstance(q, QkvBeforeRotary):
        return _attention(q, k_cache, v_cache, batch, scale, sliding_window, out)
    assert out is None, "steps of decodes alone are one graph"
    assert isinstance(k_cache, torch.Tensor)
    assert isinstance(v_cache, torch.Tensor)
    tables, lens = batch.decode_rows
    tables = tables[:, : ceil_div(batch.max_decode_context, k_cache.shape[2])]
    return rotary_decode_attention(
        q.qkv, batch.cos, batch.sin, batch.q_scale, k_cache, v_cache, batch.slot_mapping, tables, lens, scale, sliding_window
    )


def norm_gate_up_silu(
    x: Projected, residual: torch.Tensor, norm: NormWeight, weight: LinearWeight
) -> tuple[torch.Tensor | QuantizedRows, torch.Tensor]:
    if isinstance(weight, EIGHT_BIT):  # all of a model's layers are stored alike: down_projection is 8 bit too
        rows, residual = _norm_rows(x, residual, norm, weight)
        return w8a8_gate_up(rows, weight), residual
    functions = hopper_row_linear.norm_gate_up, skinny_linear.norm_gate_up, hopper_row_w4a16.norm_gate_up
    if (joined := _joined(functions, x, residual, norm, weight)) is not None:
        return joined
    y, residual = rms_norm(x, norm.weight, norm.eps, residual)
    if isinstance(weight, W4A16Tiles) and x.shape[0] <= MAX_W4A16_ROWS:
        return w4a16_gate_up(y, weight), residual
    if _fits_narrow(weight, y, MAX_NARROW_GATED_ROWS):
        return narrow_linear.gate_up(y, weight.weight, weight.bias), residual
    if _is_hopper_gate_up(weight, y):
        return hopper_gate_up.gate_up(y, weight.weight, weight.bias), residual
    return silu_and_mul(linear(y, weight)), residual


TRITON = dataclasses.replace(
    REFERENCE,
    stage_decode=stage_decode,
    advance_decode=advance_decode,
    norm_qkv_rotary_store=norm_qkv_rotary_store,
    attention=attention,
    output_projection=output_projection,
    norm_gate_up_silu=norm_gate_up_silu,
    down_projection=down_projection,
    lm_head=functools.partial(units.lm_head, norm_linear=norm_linear),
    sample=sample,
)
