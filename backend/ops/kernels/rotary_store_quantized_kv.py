"""Rotary embedding of q and k fused with quantisation and the write of k and v into quantised pages (ops/operands.py).

    x: k after rotary less the head's offset, or v, of one token and kv head; k and v are rounded to the compute dtype before
    made on the way   scale = (max x - min x) / (2^bits - 1), zero = min x, both rounded to the compute dtype; of 4 bit keys for each half
    static            scale and zero of the head;  q = (x - zero) / scale + 128
    q = round_half_even((x - zero) / scale), clamped.    8 bit: a byte a dim.  4 bit: dim j | dim j + head_dim / 2 << 4

Tiling: the grid is (num_tokens, blocks of BLOCK_H heads), first q's, then k's, then v's. A head is read as its lower and its upper
half, which is how 4 bit stores it; the partner of a rotated dim is read again from cache:

    lo: dims 0 .. head_dim/2 - 1     hi: the rest     two tiles [BLOCK_H, BLOCK_HALF]
"""

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import QuantizedPages, StaticInt8Pages, Unadded, parts_of

from .fast_launch import launch
from .launch import has_pdl, launch_options, wait_for_previous
from .split_sum import load_sum
from .tuning import QUANTIZED_ROTARY_LEAST_HEADS, ceil_div, next_power_of_2, rotary_config

__all__ = ["rotary_store_quantized_kv"]

Pages = QuantizedPages | StaticInt8Pages


@triton.jit
def _rotated(
    head_ptr, dims, mask, cos_ptr, sin_ptr, stride_part,
    ROTARY_HALF: tl.constexpr, ROTATE: tl.constexpr, NUM_PARTS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """fp32 values of the dims, [BLOCK_H, BLOCK_HALF]; with ROTATE the first 2 ROTARY_HALF turned."""
    x = load_sum(head_ptr + dims, mask, stride_part, NUM_PARTS, dtype).to(tl.float32)
    if ROTATE:
        turns = mask & (dims < 2 * ROTARY_HALF)
        is_first = dims < ROTARY_HALF
        pair = tl.where(is_first, dims, dims - ROTARY_HALF)
        others = head_ptr + tl.where(is_first, dims + ROTARY_HALF, dims - ROTARY_HALF)
        partner = load_sum(others, turns, stride_part, NUM_PARTS, dtype).to(tl.float32)
        cos = tl.load(cos_ptr + pair, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + pair, mask=turns, other=0.0)
        x = x * cos + tl.where(is_first, -partner, partner) * sin
    return x


@triton.jit
def _halves(
    head_ptr, offs_half, mask_lo, mask_hi, cos_ptr, sin_ptr, stride_part,
    HALF: tl.constexpr, ROTARY_HALF: tl.constexpr, ROTATE: tl.constexpr, NUM_PARTS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """`_rotated` of the lower and of the upper half of each head."""
    lo = _rotated(head_ptr, offs_half, mask_lo, cos_ptr, sin_ptr, stride_part, ROTARY_HALF, ROTATE, NUM_PARTS, dtype)
    hi = _rotated(head_ptr, offs_half + HALF, mask_hi, cos_ptr, sin_ptr, stride_part, ROTARY_HALF, ROTATE, NUM_PARTS, dtype)
    return lo, hi


@triton.jit
def _round(x):
    """To the nearest integer, ties to even: |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _steps(x, zero, scale, middle, STEPS: tl.constexpr):
    """The stored number, uint8."""
    return _round(tl.minimum(tl.maximum(tl.div_rn(x - zero, scale + x * 0) + middle, 0.0), STEPS)).to(tl.uint8)


@triton.jit
def _e4m3(x):
    """The byte of the nearest float8 e4m3 number, ties to even, |x| <= 448 after a clamp: by bits, the same on every chip."""
    bits = tl.minimum(tl.abs(x), 448.0).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponents are 120 apart; three of 23 bits of mantissa stay
    small = _round(tl.minimum(tl.abs(x), 1.0) * 512.0).to(tl.int32)  # below 2^-6: units of 2^-9
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 128
    return (tl.where(tl.abs(x) < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def _positive(scale):
    """0 makes every number 0, as infinity does."""
    return tl.where(scale > 0, scale, float("inf"))


@triton.jit
def _rotary_store_quantized_kv_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_scale_ptr,
    slot_ptr,
    q_out_ptr,
    k_data_ptr,
    v_data_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_zero_ptr,
    v_zero_ptr,
    k_offset_ptr,
    stride_qkv_row,
    stride_cos_row,
    stride_sin_row,
    stride_data_block,
    stride_data_head,
    stride_data_token,
    stride_k_params_block,
    stride_k_params_head,
    stride_k_params_token,
    stride_v_params_block,
    stride_v_params_head,
    stride_v_params_token,
    NUM_PARTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    STATIC: tl.constexpr,
    HALVES: tl.constexpr,
    E4M3: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    head_block = tl.program_id(1).to(tl.int64)
    NUM_Q_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    NUM_KV_BLOCKS: tl.constexpr = (NUM_KV_HEADS + BLOCK_H - 1) // BLOCK_H
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    offs_h = tl.arange(0, BLOCK_H)[:, None]
    offs_half = tl.arange(0, BLOCK_HALF)[None, :]
    mask_lo = offs_half < HALF
    mask_hi = offs_half + HALF < HEAD_DIM
    row_ptr = qkv_ptr + token * stride_qkv_row
    stride_part = tl.num_programs(0).to(tl.int64) * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    dtype: tl.constexpr = q_out_ptr.dtype.element_ty
    cos_row_ptr = cos_ptr + token * stride_cos_row
    sin_row_ptr = sin_ptr + token * stride_sin_row

    if head_block < NUM_Q_BLOCKS:
        heads = head_block * BLOCK_H + offs_h
        mask_h = heads < NUM_HEADS
        head_ptr = row_ptr + heads * HEAD_DIM
        lo, hi = _halves(
            head_ptr, offs_half, mask_h & mask_lo, mask_h & mask_hi, cos_row_ptr, sin_row_ptr, stride_part,
            HALF, ROTARY_HALF, True, NUM_PARTS, dtype,
        )  # fmt: skip
        if HAS_Q_SCALE:
            factor = tl.load(q_scale_ptr + token)
            lo *= factor
            hi *= factor
        out_ptr = q_out_ptr + (token * NUM_HEADS + heads) * HEAD_DIM + offs_half
        tl.store(out_ptr, lo.to(q_out_ptr.dtype.element_ty), mask=mask_h & mask_lo)
        tl.store(out_ptr + HALF, hi.to(q_out_ptr.dtype.element_ty), mask=mask_h & mask_hi)
        return

    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    kv_block = head_block - NUM_Q_BLOCKS
    if kv_block < NUM_KV_BLOCKS:
        heads = kv_block * BLOCK_H + offs_h
        mask_h = heads < NUM_KV_HEADS
        head_ptr = row_ptr + (NUM_HEADS + heads) * HEAD_DIM
        lo, hi = _halves(
            head_ptr, offs_half, mask_h & mask_lo, mask_h & mask_hi, cos_row_ptr, sin_row_ptr, stride_part,
            HALF, ROTARY_HALF, True, NUM_PARTS, dtype,
        )  # fmt: skip
        data_ptr = k_data_ptr
        scale_ptr = k_scale_ptr
        zero_ptr = k_zero_ptr
        params = block * stride_k_params_block + heads * stride_k_params_head + offset * stride_k_params_token
    else:
        heads = (kv_block - NUM_KV_BLOCKS) * BLOCK_H + offs_h
        mask_h = heads < NUM_KV_HEADS
        head_ptr = row_ptr + (NUM_HEADS + NUM_KV_HEADS + heads) * HEAD_DIM
        lo, hi = _halves(
            head_ptr, offs_half, mask_h & mask_lo, mask_h & mask_hi, cos_row_ptr, sin_row_ptr, stride_part,
            HALF, ROTARY_HALF, False, NUM_PARTS, dtype,
        )  # fmt: skip
        data_ptr = v_data_ptr
        scale_ptr = v_scale_ptr
        zero_ptr = v_zero_ptr
        params = block * stride_v_params_block + heads * stride_v_params_head + offset * stride_v_params_token
    lo = lo.to(dtype).to(tl.float32)
    hi = hi.to(dtype).to(tl.float32)

    mask_k = mask_h & (heads * 0 + kv_block < NUM_KV_BLOCKS)
    if HAS_OFFSET:
        offset_ptr = k_offset_ptr + heads * HEAD_DIM + offs_half
        lo -= tl.load(offset_ptr, mask=mask_k & mask_lo, other=0.0)
        hi -= tl.load(offset_ptr + HALF, mask=mask_k & mask_hi, other=0.0)

    STEPS: tl.constexpr = (1 << BITS) - 1
    if STATIC:
        scale = tl.load(scale_ptr + heads, mask=mask_h, other=1.0)  # [BLOCK_H, 1]
        zero = tl.load(zero_ptr + heads, mask=mask_h, other=0.0)
        lo = _steps(lo, zero, scale, 128.0, STEPS)
        hi = _steps(hi, zero, scale, 128.0, STEPS)
    else:
        inf = float("inf")
        low_lo = tl.min(tl.where(mask_lo, lo, inf), axis=1)[:, None]  # [BLOCK_H, 1]
        low_hi = tl.min(tl.where(mask_hi, hi, inf), axis=1)[:, None]
        high_lo = tl.max(tl.where(mask_lo, lo, -inf), axis=1)[:, None]
        high_hi = tl.max(tl.where(mask_hi, hi, -inf), axis=1)[:, None]
        low = tl.minimum(low_lo, low_hi)
        high = tl.maximum(high_lo, high_hi)
        if HALVES:
            low_lo, low_hi = tl.where(mask_k, low_lo, low), tl.where(mask_k, low_hi, low)
            high_lo, high_hi = tl.where(mask_k, high_lo, high), tl.where(mask_k, high_hi, high)
        else:
            low_lo, low_hi, high_lo, high_hi = low, low, high, high
        stored_type = scale_ptr.dtype.element_ty
        if E4M3:
            largest = tl.maximum(high, -low)
            scale_lo = tl.div_rn(largest, largest * 0 + 448.0).to(stored_type)
            low_lo = low * 0
        else:
            scale_lo = tl.div_rn(high_lo - low_lo, low_lo * 0 + STEPS).to(stored_type)
        scale_hi = tl.div_rn(high_hi - low_hi, low_hi * 0 + STEPS).to(stored_type)
        zero_lo = low_lo.to(stored_type)
        zero_hi = low_hi.to(stored_type)
        tl.store(scale_ptr + params, scale_lo, mask=mask_h)
        tl.store(scale_ptr + params + 1, zero_lo, mask=mask_h)
        if HALVES:
            tl.store(scale_ptr + params + 2, scale_hi, mask=mask_k)
            tl.store(scale_ptr + params + 3, zero_hi, mask=mask_k)
        if E4M3:
            step = _positive(scale_lo.to(tl.float32))
            lo = _e4m3(tl.div_rn(lo, step + lo * 0))
            hi = _e4m3(tl.div_rn(hi, step + hi * 0))
        else:
            lo = _steps(lo, zero_lo.to(tl.float32), _positive(scale_lo.to(tl.float32)), 0.0, STEPS)
            hi = _steps(hi, zero_hi.to(tl.float32), _positive(scale_hi.to(tl.float32)), 0.0, STEPS)
    target_ptr = data_ptr + block * stride_data_block + heads * stride_data_head + offset * stride_data_token + offs_half
    if BITS == 4:
        tl.store(target_ptr, lo | (hi << 4), mask=mask_h & mask_lo)
    else:
        tl.store(target_ptr, lo, mask=mask_h & mask_lo)
        tl.store(target_ptr + HALF, hi, mask=mask_h & mask_hi)


def rotary_store_quantized_kv(
    qkv: Unadded,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_cache: Pages,
    v_cache: Pages,
    slot_mapping: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """Launch on the current device and stream. k_cache and v_cache are modified at the slots.

    qkv: [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], fp16|bf16|fp32, rows of any stride, contiguous inside a row; or
        SplitSums of that
    cos, sin: [num_tokens, rotary_dim / 2], fp32, contiguous inside a row      q_scale: [num_tokens], fp32, contiguous, or None
    k_cache, v_cache: pages of one class, data of the same strides; QuantizedPages hold params of qkv's dtype, values' in one part
    slot_mapping: [num_tokens], int64, contiguous: block * block_size + offset; -1 stores nothing. Two tokens never share a slot

    Returns q': [num_tokens, num_heads, head_dim], new, contiguous, in qkv's dtype. num_tokens may be 0.
    Raises ConfigError when head_dim > 256 or rotary_dim is odd or larger than head_dim.
    """
    num_tokens, dtype = qkv.shape[0], qkv.dtype
    x, num_parts = parts_of(qkv)
    block_size, width = k_cache.data.shape[2:]
    static = isinstance(k_cache, StaticInt8Pages)
    bits = k_cache.bits if isinstance(k_cache, QuantizedPages) else 8
    head_dim = width * 8 // bits
    config = rotary_config(num_heads, num_kv_heads, head_dim, 2 * cos.shape[1], least_heads=QUANTIZED_ROTARY_LEAST_HEADS)
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim, f"qkv has {qkv.shape[1]} columns"
    assert k_cache.data.stride() == v_cache.data.stride(), "keys and values are stored alike"
    assert 1 == x.stride(-1) == k_cache.data.stride(3) == slot_mapping.stride(0)
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=dtype, device=x.device)
    if num_tokens == 0:
        return q
    offset = None
    if isinstance(k_cache, StaticInt8Pages) and isinstance(v_cache, StaticInt8Pages):
        parts = k_cache.scale, v_cache.scale, k_cache.zero, v_cache.zero
        param_strides: tuple[int, ...] = (0,) * 6
    else:
        assert isinstance(k_cache, QuantizedPages)
        assert isinstance(v_cache, QuantizedPages)
        assert v_cache.num_parts == 1, "values have one scale a head"
        assert v_cache.offset is None, "values are stored as they are"
        offset = k_cache.offset
        assert offset is None or offset.is_contiguous()
        parts = k_cache.params, v_cache.params, k_cache.params, v_cache.params
        param_strides = (*k_cache.params.stride()[:3], *v_cache.params.stride()[:3])
    launch(
        _rotary_store_quantized_kv_kernel,
        (num_tokens, ceil_div(num_heads, config.block_h) + 2 * ceil_div(num_kv_heads, config.block_h)),
        x,
        cos,
        sin,
        q_scale,
        slot_mapping,
        q,
        k_cache.data,
        v_cache.data,
        *parts,
        offset,
        x.stride(-2),
        cos.stride(0),
        sin.stride(0),
        *k_cache.data.stride()[:3],
        *param_strides,
        NUM_PARTS=num_parts,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_HALF=cos.shape[1],
        BLOCK_SIZE=block_size,
        BITS=bits,
        STATIC=static,
        HALVES=isinstance(k_cache, QuantizedPages) and k_cache.num_parts == 2,
        E4M3=isinstance(k_cache, QuantizedPages) and k_cache.e4m3,
        HAS_OFFSET=offset is not None,
        HAS_Q_SCALE=q_scale is not None,
        BLOCK_H=config.block_h,
        BLOCK_HALF=next_power_of_2((head_dim + 1) // 2),
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return q
