"""Attention of one query token a sequence over 8 or 4 bit pages, read as they are stored (ops/operands.py for their meaning).

    out = softmax(q K^T scale, over positions max(0, L - window) <= p < L) V,      K = (Kq - c) s_n + z_n,   V likewise,
                                                        c = 128 (8 bit) or 8 (4 bit), z_n = zero + c s_n: Kq - c is exact in q's dtype

    q K^T  = (q (Kq - c)^T) s_n + (sum over dims of q) z_n                  s_n, z_n: of the key's token, or of the head
    P V    = (P s_n) (Vq - c) + (sum over keys of P z_n)

Tiling and splits are `paged_decode_attention`'s. A head is two tiles of half the dims, which is how a 4 bit byte holds it: low halves
of the bytes are the first dims, high ones the rest; 8 bit reads two tiles. Scores, softmax and sums in fp32; P s_n is rounded to
q's dtype for the second product, the result once.
"""

import math

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import QuantizedPages, StaticInt8Pages

from .launch import has_pdl, launch_options, num_sms, wait_for_previous
from .paged_decode_attention import REDUCE_TILE, _key_range, _reduce_kernel, _split_tokens
from .paged_prefill_attention import _compute_capability as compute_capability
from .tuning import next_power_of_2, quantized_decode_attention_config

__all__ = ["quantized_decode_attention"]

Pages = QuantizedPages | StaticInt8Pages


@triton.jit
def _halves(data_ptr, rows, offs_half, mask_lo, mask_hi, HALF: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Both halves of the keys' heads less c, in `dtype`: two tiles [BLOCK_N, BLOCK_HALF], 0 where masked."""
    lo_bytes = tl.load(data_ptr + rows[:, None] + offs_half[None, :], mask=mask_lo, other=0)
    if BITS == 4:
        hi_bytes = lo_bytes >> 4
        lo_bytes = lo_bytes & 15
        middle: tl.constexpr = 8
    else:
        hi_bytes = tl.load(data_ptr + rows[:, None] + HALF + offs_half[None, :], mask=mask_hi, other=0)
        middle: tl.constexpr = 128
    lo = tl.where(mask_lo, lo_bytes.to(tl.int16) - middle, 0).to(dtype)
    hi = tl.where(mask_hi, hi_bytes.to(tl.int16) - middle, 0).to(dtype)
    return lo, hi


@triton.jit
def _scale_and_zero(params_ptr, rows, seen, scale, zero, BITS: tl.constexpr, STATIC: tl.constexpr):
    """fp32 (s_n, z_n), [BLOCK_N]; 0 where not seen: what lies there may be NaN."""
    if STATIC:
        s = tl.where(seen, scale, 0.0)
        return s, tl.where(seen, zero, 0.0)
    s = tl.load(params_ptr + rows, mask=seen, other=0.0).to(tl.float32)
    z = tl.load(params_ptr + rows + 1, mask=seen, other=0.0).to(tl.float32)
    middle: tl.constexpr = 8 if BITS == 4 else 128
    return s, z + middle * s


@triton.jit(do_not_specialize=["stride_table_row", "num_splits"])
def _quantized_split_kernel(
    q_ptr,
    k_data_ptr,
    v_data_ptr,
    k_params_ptr,
    v_params_ptr,
    k_zero_ptr,
    v_zero_ptr,
    block_tables_ptr,
    context_lens_ptr,
    out_ptr,
    partial_ptr,
    log_weight_ptr,
    num_splits,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_data_block,
    stride_data_head,
    stride_data_token,
    stride_params_block,
    stride_params_head,
    stride_params_token,
    stride_table_row,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    BITS: tl.constexpr,
    STATIC: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    first, start, end = _key_range(context_lens_ptr, sequence, SLIDING_WINDOW, BLOCK_N)
    if not ONE_SPLIT:
        split_tokens = _split_tokens(end - start, num_splits, MIN_SPLIT, BLOCK_N)
        start += split * split_tokens
        if start >= end:
            return
        end = tl.minimum(start + split_tokens, end)

    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    offs_g = tl.arange(0, BLOCK_G)
    offs_n = tl.arange(0, BLOCK_N)
    offs_half = tl.arange(0, BLOCK_HALF)
    mask_lo = offs_half < HALF
    mask_hi = offs_half + HALF < HEAD_DIM
    mask_g = offs_g < GROUP_SIZE
    heads = kv_head * GROUP_SIZE + offs_g
    q_rows_ptr = q_ptr + sequence * stride_q_row + heads[:, None] * stride_q_head + offs_half[None, :]
    q_lo = tl.load(q_rows_ptr, mask=mask_g[:, None] & mask_lo[None, :], other=0.0)
    q_hi = tl.load(q_rows_ptr + HALF, mask=mask_g[:, None] & mask_hi[None, :], other=0.0)
    q_sum = tl.sum(q_lo.to(tl.float32), axis=1) + tl.sum(q_hi.to(tl.float32), axis=1)
    table_ptr = block_tables_ptr + sequence * stride_table_row
    k_scale = 0.0
    k_zero = 0.0
    v_scale = 0.0
    v_zero = 0.0
    if STATIC:
        k_scale = tl.load(k_params_ptr + kv_head)
        k_zero = tl.load(k_zero_ptr + kv_head)
        v_scale = tl.load(v_params_ptr + kv_head)
        v_zero = tl.load(v_zero_ptr + kv_head)

    maximum = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    of_zeros = tl.zeros((BLOCK_G,), tl.float32)
    acc_lo = tl.zeros((BLOCK_G, BLOCK_HALF), tl.float32)
    acc_hi = tl.zeros((BLOCK_G, BLOCK_HALF), tl.float32)
    # Every tile holds at least one key that is seen, so `maximum` is finite after the first.
    for tile in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        positions = tile + offs_n
        seen = (positions >= first) & (positions < end)
        block = tl.load(table_ptr + positions // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        offset = positions % BLOCK_SIZE
        data_rows = block * stride_data_block + kv_head * stride_data_head + offset * stride_data_token
        param_rows = block * stride_params_block + kv_head * stride_params_head + offset * stride_params_token
        tile_lo = seen[:, None] & mask_lo[None, :]
        tile_hi = seen[:, None] & mask_hi[None, :]

        k_lo, k_hi = _halves(k_data_ptr, data_rows, offs_half, tile_lo, tile_hi, HALF, BITS, dtype)
        s, z = _scale_and_zero(k_params_ptr, param_rows, seen, k_scale, k_zero, BITS, STATIC)
        products = tl.dot(q_lo, tl.trans(k_lo), input_precision=PRECISION)  # [BLOCK_G, BLOCK_N]
        products = tl.dot(q_hi, tl.trans(k_hi), acc=products, input_precision=PRECISION)
        scores = (products * s[None, :] + q_sum[:, None] * z[None, :]) * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        rescale = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[:, None])

        v_lo, v_hi = _halves(v_data_ptr, data_rows, offs_half, tile_lo, tile_hi, HALF, BITS, dtype)
        s, z = _scale_and_zero(v_params_ptr, param_rows, seen, v_scale, v_zero, BITS, STATIC)
        total = total * rescale + tl.sum(weights, axis=1)
        of_zeros = of_zeros * rescale + tl.sum(weights * z[None, :], axis=1)
        scaled = (weights * s[None, :]).to(dtype)
        acc_lo = tl.dot(scaled, v_lo, acc=acc_lo * rescale[:, None], input_precision=PRECISION)
        acc_hi = tl.dot(scaled, v_hi, acc=acc_hi * rescale[:, None], input_precision=PRECISION)
        maximum = new_maximum

    share = 1.0 / tl.where(total > 0, total, 1.0)  # total is 0 only for a sequence of no keys: zeros
    acc_lo = (acc_lo + of_zeros[:, None]) * share[:, None]
    acc_hi = (acc_hi + of_zeros[:, None]) * share[:, None]
    if ONE_SPLIT:
        rows_ptr = out_ptr + ((sequence * NUM_HEADS + heads) * HEAD_DIM)[:, None] + offs_half[None, :]
        tl.store(rows_ptr, acc_lo.to(dtype), mask=mask_g[:, None] & mask_lo[None, :])
        tl.store(rows_ptr + HALF, acc_hi.to(dtype), mask=mask_g[:, None] & mask_hi[None, :])
    else:
        partial_rows = (sequence * NUM_HEADS + heads) * num_splits + split
        rows_ptr = partial_ptr + (partial_rows * HEAD_DIM)[:, None] + offs_half[None, :]
        tl.store(rows_ptr, acc_lo, mask=mask_g[:, None] & mask_lo[None, :])
        tl.store(rows_ptr + HALF, acc_hi, mask=mask_g[:, None] & mask_hi[None, :])
        tl.store(log_weight_ptr + partial_rows, maximum + tl.log2(total), mask=mask_g)


def quantized_decode_attention(
    q: torch.Tensor,
    k_pages: Pages,
    v_pages: Pages,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Launch on the current device and stream; nothing is read back, so it can be captured in a CUDA graph.

    q: [batch, num_heads, head_dim], fp16|bf16|fp32, contiguous inside a head; head h reads kv head h // group_size
    k_pages, v_pages: of one class with the same strides; QuantizedPages hold params of q's dtype
    block_tables, context_lens, sliding_window, result: as `paged_decode_attention`'s. Raises ConfigError when head_dim > 256.
    """
    batch, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_pages.data.shape
    bits, params, param_strides = _parameters(k_pages, v_pages)
    config = quantized_decode_attention_config(
        batch=batch,
        num_kv_heads=num_kv_heads,
        group_size=num_heads // num_kv_heads,
        head_dim=head_dim,
        element_bytes=q.element_size(),
        max_context=block_tables.shape[1] * block_size,
        num_sms=num_sms(q.device),
        compute_capability=compute_capability(q.device),
        bits=bits,
    )
    out = torch.empty((batch, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    assert num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} kv heads"
    assert k_pages.data.stride() == v_pages.data.stride(), "keys and values are stored alike"
    assert 1 == q.stride(2) == k_pages.data.stride(3) == block_tables.stride(1) == context_lens.stride(0)
    num_splits = config.num_splits
    one_split = num_splits == 1
    partial = log_weight = None
    if not one_split:
        partial = torch.empty((batch, num_heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        log_weight = torch.empty((batch, num_heads, num_splits), dtype=torch.float32, device=q.device)
    _quantized_split_kernel[(batch, num_kv_heads, num_splits)](
        q,
        k_pages.data,
        v_pages.data,
        *params,
        block_tables,
        context_lens,
        out,
        partial,
        log_weight,
        num_splits,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        *k_pages.data.stride()[:3],
        *param_strides,
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        GROUP_SIZE=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SLIDING_WINDOW=sliding_window,
        BITS=bits,
        STATIC=isinstance(k_pages, StaticInt8Pages),
        ONE_SPLIT=one_split,
        MIN_SPLIT=config.min_split_tokens,
        PRECISION="ieee",
        BLOCK_G=config.block_g,
        BLOCK_N=config.block_n,
        BLOCK_HALF=config.block_d,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        **launch_options(has_pdl(q.device)),
    )
    if not one_split:
        _reduce_kernel[(batch, num_heads)](
            partial,
            log_weight,
            context_lens,
            out,
            num_splits,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            SLIDING_WINDOW=sliding_window,
            MIN_SPLIT=config.min_split_tokens,
            BLOCK_S=REDUCE_TILE,
            BLOCK_N=config.block_n,
            BLOCK_D=max(16, next_power_of_2(head_dim)),
            num_warps=4,
            **launch_options(has_pdl(q.device)),
        )
    return out


def _parameters(k_pages: Pages, v_pages: Pages) -> tuple[int, tuple[torch.Tensor | None, ...], tuple[int, ...]]:
    """(bits, (k scales, v scales, k zeros, v zeros), strides of the scales over block, head, token)."""
    if isinstance(k_pages, StaticInt8Pages):
        assert isinstance(v_pages, StaticInt8Pages)
        return 8, (k_pages.scale, v_pages.scale, k_pages.zero, v_pages.zero), (0, 0, 0)
    assert isinstance(v_pages, QuantizedPages)
    assert k_pages.params.stride() == v_pages.params.stride(), "keys and values are stored alike"
    assert k_pages.params.stride(3) == 1
    return k_pages.bits, (k_pages.params, v_pages.params, None, None), k_pages.params.stride()[:3]
