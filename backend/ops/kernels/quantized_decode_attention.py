"""Attention of one query token a sequence over 8 or 4 bit pages, read as they are stored (ops/operands.py for their meaning).

    out = softmax(q K^T scale, over positions max(0, L - window) <= p < L) V,     K = Kq s_n + z_n, V likewise (Kq: the stored numbers)

Stored numbers are widened to fp16 by their bits alone: 0x6400 | v is 1024 + v, and 0x6400 | v << 4 is 1024 + 16 v. The rest is factored
out of the products; s_n and z_n belong to a key's head, of 4 bit keys to each half of it:

    K q'   = (Kw q' - 1024 sum q') s_n + (sum q') z_n          Kw: the widened numbers;  q' = q / max |q|
    P V    = Vw P' - 1024 sum P' + sum(P' z_n / s_n)           P' = P s_n: log2 s_n is added to the scores of the softmax, whose maximum
    sum P  = sum(P' / s_n)                                     then keeps P' in fp16's range whatever the scales are

Tiling and splits are `paged_decode_attention`'s, transposed: keys and values are the left operands of mma.m16n8k16 and the query heads
of a kv head its 8 columns. A program is one warp. What a thread loads, 4 to 16 bytes at once, is its share of an operand, since the order
of the dims of a product is free: keys and values see no shared memory. With lane = 4 g + t and halves of a head of 16 NW = 32 VW bytes
(4 bit: low halves of bytes are the first half of the dims, high ones the second; 8 bit: two halves of bytes):

    K  8 keys:  lane (g, t) loads bytes 4 NW t .. 4 NW (t + 1) of key g                  `k_dims`: which dim stands where in the product
    V  16 keys: lane (g, t) loads bytes 4 VW g .. 4 VW (g + 1) of keys 4 t .. 4 t + 3    `v_dims`

float8 e4m3: bits shifted into an fp16 number are 2^-8 of it, nothing is added, zeros are 0.

The next tile's keys are loaded while this one is worked on. Scores, softmax and sums in fp32; q' and P' are rounded to fp16, in fp32
models to nothing. What lies in a block past the context is read and left out; other blocks are not touched.
"""

import math

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import QuantizedPages, StaticInt8Pages

from .launch import has_pdl, launch_options, num_sms, wait_for_previous
from .paged_decode_attention import REDUCE_ELEMENTS, REDUCE_TILE, _add_splits, _key_range, _split_tokens
from .quantized_words import (
    block_of,
    fast_exp2,
    fast_inverse,
    fast_log2,
    key_rows,
    load_params,
    load_words,
    tile_start,
    widened,
)
from .split_sum import is_last_of, workspace
from .tuning import next_power_of_2, quantized_decode_attention_config

__all__ = ["quantized_decode_attention"]

Pages = QuantizedPages | StaticInt8Pages


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
    counters_ptr,
    num_splits,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_data_block,
    stride_data_head,
    stride_data_token,
    stride_k_params_block,
    stride_k_params_head,
    stride_k_params_token,
    stride_v_params_block,
    stride_v_params_head,
    stride_v_params_token,
    stride_table_row,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    BITS: tl.constexpr,
    STATIC: tl.constexpr,
    HALVES: tl.constexpr,
    E4M3: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    first, start, end = _key_range(context_lens_ptr, sequence, SLIDING_WINDOW, BLOCK_N)
    num_used = 1
    if not ONE_SPLIT:
        split_tokens = _split_tokens(end - start, num_splits, MIN_SPLIT, BLOCK_N)
        num_used = tl.cdiv(end - start, split_tokens)
        start += split * split_tokens
        if (start >= end) & (split > 0):
            return
        end = tl.minimum(start + split_tokens, end)

    q_dtype: tl.constexpr = q_ptr.dtype.element_ty
    dtype: tl.constexpr = tl.float32 if q_dtype == tl.float32 else tl.float16
    PLUS: tl.constexpr = 0.0 if dtype == tl.float32 or E4M3 else 1024.0
    UNIT: tl.constexpr = 256.0 if E4M3 else 1.0  # of a widened number
    LEEWAY: tl.constexpr = 8.0
    HIGH: tl.constexpr = 1 / 16 if BITS == 4 else 1.0
    HALF: tl.constexpr = HEAD_DIM // 2
    IS_PADDED: tl.constexpr = HALF != BLOCK_HALF
    N8: tl.constexpr = BLOCK_N // 8
    NW: tl.constexpr = BLOCK_HALF // 16  # words of a lane: keys
    VW: tl.constexpr = BLOCK_HALF // 32  # and values

    offs_g = tl.arange(0, BLOCK_G)
    offs_n = tl.arange(0, BLOCK_N)
    offs_half = tl.arange(0, BLOCK_HALF)
    k_dims = (
        offs_half // 4 % 4 * (4 * NW) + offs_half // 32 * 8 + offs_half % 2 * 4 + offs_half // 16 % 2 * 2 + offs_half // 2 % 2
    )
    v_dims = offs_half % 8 * (4 * VW) + offs_half // 32 * 4 + offs_half // 8 % 4
    mask_g = offs_g < GROUP_SIZE
    heads = kv_head * GROUP_SIZE + offs_g
    q_ptrs = q_ptr + sequence * stride_q_row + heads[None, :] * stride_q_head + k_dims[:, None]
    mask_q = mask_g[None, :] & (k_dims < HALF)[:, None]
    q_lo = tl.load(q_ptrs, mask=mask_q, other=0.0).to(tl.float32)  # [BLOCK_HALF, BLOCK_G]
    q_hi = tl.load(q_ptrs + HALF, mask=mask_q, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(q_lo), axis=0), tl.max(tl.abs(q_hi), axis=0))
    largest = tl.where(largest > 0, largest, 1.0)
    q_lo = (q_lo / largest[None, :]).to(dtype)
    q_hi = (q_hi / largest[None, :]).to(dtype)
    # sums over dims by the matrix unit: they stand where a product's columns stand, and need not be moved there for every tile
    ones = tl.full((16, BLOCK_HALF), 1.0, dtype)
    sum_lo = tl.sum(tl.dot(ones, q_lo, input_precision="ieee"), axis=0) / 16
    sum_hi = tl.sum(tl.dot(ones, q_hi, input_precision="ieee"), axis=0) / 16
    head_scale = largest * scale_log2

    table_ptr = block_tables_ptr + sequence * stride_table_row
    k_head_ptr = k_data_ptr + kv_head * stride_data_head
    v_head_ptr = v_data_ptr + kv_head * stride_data_head
    k_params_head_ptr = k_params_ptr + kv_head * stride_k_params_head
    v_params_head_ptr = v_params_ptr + kv_head * stride_v_params_head
    place = tl.arange(0, 32 * N8)  # lanes of 8 keys after 8 keys
    k_places = (place % 4 * NW)[:, None] + tl.arange(0, NW)[None, :]
    v_places = (place % 32 // 4 * VW)[:, None] + tl.arange(0, VW)[None, :]
    k_keys = place // 4
    v_keys = place // 64 * 16 + place % 4 * 4 + place // 32 % 2 * 2

    maximum = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    of_zeros = tl.zeros((BLOCK_G,), tl.float32)
    of_ones = tl.zeros((16, BLOCK_G), tl.float32)
    acc_lo = tl.zeros((BLOCK_HALF, BLOCK_G), tl.float32)
    acc_hi = tl.zeros((BLOCK_HALF, BLOCK_G), tl.float32)
    last = tl.maximum(end - 1, 0)
    block = block_of(table_ptr, start, last, BLOCK_SIZE)
    next_block = block_of(table_ptr, start + BLOCK_N, last, BLOCK_SIZE)  # ids are read two tiles ahead
    first_rows = key_rows(table_ptr, start, k_keys, last, stride_data_block, stride_data_token, BLOCK_SIZE, BLOCK_N)
    k_tile_ptr = k_head_ptr + tile_start(block, start, stride_data_block, stride_data_token, BLOCK_SIZE, BLOCK_N)
    k_words = load_words(k_tile_ptr, first_rows, k_places, HALF, IS_PADDED)
    k_words_hi = k_words
    if BITS == 8:
        k_words_hi = load_words(k_tile_ptr + HALF // 4, first_rows, k_places, HALF, IS_PADDED)
    # Every tile holds at least one key that is seen, so `maximum` is finite after the first.
    for tile in tl.range(start, end, BLOCK_N, num_stages=1):
        block_after = block_of(table_ptr, tile + 2 * BLOCK_N, last, BLOCK_SIZE)
        even_rows = key_rows(table_ptr, tile, v_keys, last, stride_data_block, stride_data_token, BLOCK_SIZE, BLOCK_N)
        odd_rows = key_rows(table_ptr, tile, v_keys + 1, last, stride_data_block, stride_data_token, BLOCK_SIZE, BLOCK_N)
        v_tile_ptr = v_head_ptr + tile_start(block, tile, stride_data_block, stride_data_token, BLOCK_SIZE, BLOCK_N)
        v_words = tl.join(
            load_words(v_tile_ptr, even_rows, v_places, HALF, IS_PADDED),
            load_words(v_tile_ptr, odd_rows, v_places, HALF, IS_PADDED),
        )
        v_words_hi = v_words
        if BITS == 8:
            v_words_hi = tl.join(
                load_words(v_tile_ptr + HALF // 4, even_rows, v_places, HALF, IS_PADDED),
                load_words(v_tile_ptr + HALF // 4, odd_rows, v_places, HALF, IS_PADDED),
            )
        if STATIC:
            k_scale_lo = tl.load(k_params_ptr + kv_head + offs_n * 0)
            k_zero_lo = tl.load(k_zero_ptr + kv_head + offs_n * 0) - 128 * k_scale_lo
            v_scale = tl.load(v_params_ptr + kv_head + offs_n * 0)
            v_zero = tl.load(v_zero_ptr + kv_head + offs_n * 0) - 128 * v_scale
        else:
            k_rows = key_rows(table_ptr, tile, offs_n, last, stride_k_params_block, stride_k_params_token, BLOCK_SIZE, BLOCK_N)
            v_rows = key_rows(table_ptr, tile, offs_n, last, stride_v_params_block, stride_v_params_token, BLOCK_SIZE, BLOCK_N)
            k_at = k_params_head_ptr + tile_start(block, tile, stride_k_params_block, stride_k_params_token, BLOCK_SIZE, BLOCK_N)
            v_at = v_params_head_ptr + tile_start(block, tile, stride_v_params_block, stride_v_params_token, BLOCK_SIZE, BLOCK_N)
            k_scale_lo, k_zero_lo = load_params(k_at, k_rows, 0, q_dtype)
            v_scale, v_zero = load_params(v_at, v_rows, 0, q_dtype)
            if HALVES:
                k_scale_hi, k_zero_hi = load_params(k_at, k_rows, 1, q_dtype)
        k_lo, k_hi = widened(k_words, BITS, E4M3, dtype, ASM)  # [32 N8, NW, 2, 2]
        if BITS == 8:
            k_hi, _ = widened(k_words_hi, BITS, E4M3, dtype, ASM)
        products = tl.dot(_key_operand(k_lo), q_lo, input_precision="ieee")  # [BLOCK_N, BLOCK_G]
        if HALVES:
            products_hi = tl.dot(_key_operand(k_hi), q_hi, input_precision="ieee")
            scores = products * k_scale_lo[:, None] + products_hi * (k_scale_hi * HIGH)[:, None]
            scores += sum_lo[None, :] * (k_zero_lo - PLUS * k_scale_lo)[:, None]
            scores += sum_hi[None, :] * (k_zero_hi - PLUS * HIGH * k_scale_hi)[:, None]
        else:
            if BITS == 8:
                products = tl.dot(_key_operand(k_hi), q_hi, acc=products, input_precision="ieee")
            else:
                products += HIGH * tl.dot(_key_operand(k_hi), q_hi, input_precision="ieee")
            k_scale_lo *= UNIT
            products -= (PLUS * (sum_lo + HIGH * sum_hi))[None, :]
            scores = products * k_scale_lo[:, None] + (sum_lo + sum_hi)[None, :] * k_zero_lo[:, None]
        next_tile = tl.minimum(tile + BLOCK_N, last // BLOCK_N * BLOCK_N)
        next_rows = key_rows(table_ptr, next_tile, k_keys, last, stride_data_block, stride_data_token, BLOCK_SIZE, BLOCK_N)
        next_start = tile_start(next_block, next_tile, stride_data_block, stride_data_token, BLOCK_SIZE, BLOCK_N)
        k_words = load_words(k_head_ptr + next_start, next_rows, k_places, HALF, IS_PADDED)
        k_words_hi = k_words
        if BITS == 8:
            k_words_hi = load_words(k_head_ptr + next_start + HALF // 4, next_rows, k_places, HALF, IS_PADDED)

        seen = (tile + offs_n >= first) & (tile + offs_n < end)
        block = next_block
        next_block = block_after
        v_scale = tl.where(seen, tl.maximum(v_scale, 1e-20), 1.0)  # what lies in a block past the context may be NaN
        v_zero = tl.where(seen, v_zero, 0.0)
        scores = scores * head_scale[None, :] + fast_log2(v_scale, ASM)[:, None]
        scores = tl.where(seen[:, None], scores, float("-inf"))
        largest_here = tl.max(scores, axis=0)
        # Sums stay below 2^LEEWAY keys' of the maximum that they were made with: seldom rescaled, and within fp16.
        if tl.max(largest_here - maximum, axis=0) > LEEWAY:
            new_maximum = tl.maximum(maximum, largest_here)
            rescale = fast_exp2(maximum - new_maximum, ASM)
            acc_lo *= rescale[None, :]
            acc_hi *= rescale[None, :]
            of_ones *= rescale[None, :]
            total *= rescale
            of_zeros *= rescale
            maximum = new_maximum
        weights = fast_exp2(scores - maximum[None, :], ASM)
        inverse = fast_inverse(v_scale, ASM)
        total += tl.sum(weights * inverse[:, None], axis=0)
        of_zeros += tl.sum(weights * (v_zero * inverse)[:, None], axis=0)
        rounded = weights.to(dtype)
        if PLUS > 0:
            of_ones = tl.dot(tl.full((16, BLOCK_N), 1.0, dtype), rounded, acc=of_ones)
        v_lo, v_hi = widened(v_words, BITS, E4M3, dtype, ASM)  # [32 N8, VW, 2, 2, 2]
        if BITS == 8:
            v_hi, _ = widened(v_words_hi, BITS, E4M3, dtype, ASM)
        acc_lo = tl.dot(_value_operand(v_lo), rounded, acc=acc_lo, input_precision="ieee")
        acc_hi = tl.dot(_value_operand(v_hi), rounded, acc=acc_hi, input_precision="ieee")

    plus = PLUS * tl.sum(of_ones, axis=0) / 16
    share = 1.0 / tl.where(total > 0, total, 1.0)  # total is 0 only for a sequence of no keys: zeros
    acc_lo = ((acc_lo - plus[None, :]) * UNIT + of_zeros[None, :]) * share[None, :]
    acc_hi = ((acc_hi - plus[None, :]) * (HIGH * UNIT) + of_zeros[None, :]) * share[None, :]
    mask = mask_g[None, :] & (v_dims < HALF)[:, None]
    if num_used <= 1:
        out_ptrs = out_ptr + ((sequence * NUM_HEADS + heads) * HEAD_DIM)[None, :] + v_dims[:, None]
        tl.store(out_ptrs, acc_lo.to(q_dtype), mask=mask)
        tl.store(out_ptrs + HALF, acc_hi.to(q_dtype), mask=mask)
    elif not ONE_SPLIT:
        partial_rows = (sequence * NUM_HEADS + heads) * num_splits + split
        partial_ptrs = partial_ptr + (partial_rows * HEAD_DIM)[None, :] + v_dims[:, None]
        tl.store(partial_ptrs, acc_lo, mask=mask)
        tl.store(partial_ptrs + HALF, acc_hi, mask=mask)
        tl.store(log_weight_ptr + partial_rows, maximum + tl.log2(total), mask=mask_g)
        if is_last_of(counters_ptr + sequence * tl.num_programs(1) + kv_head, num_used):
            first_head = sequence * NUM_HEADS + kv_head * GROUP_SIZE
            _add_splits(
                partial_ptr, log_weight_ptr, out_ptr, first_head, num_splits, num_used,
                GROUP_SIZE, HEAD_DIM, PADDED_GROUP, BLOCK_S, BLOCK_D,
            )  # fmt: skip


@triton.jit
def _key_operand(numbers):
    """[32 N8, NW, 2, 2] -> [BLOCK_N, BLOCK_HALF], dims in the order of `k_dims`."""
    N8: tl.constexpr = numbers.shape[0] // 32
    NW: tl.constexpr = numbers.shape[1]
    parts = tl.reshape(numbers, (N8, 8, 4, NW // 2, 2, 2, 2))  # n8 g t wp k1 i_low i_high
    return tl.reshape(tl.permute(parts, (0, 1, 3, 6, 2, 5, 4)), (8 * N8, 16 * NW))


@triton.jit
def _value_operand(numbers):
    """[32 N8, VW, 2, 2, 2] -> [BLOCK_HALF, BLOCK_N], dims in the order of `v_dims`."""
    N16: tl.constexpr = numbers.shape[0] // 64
    VW: tl.constexpr = numbers.shape[1]
    parts = tl.reshape(numbers, (N16, 2, 8, 4, VW, 2, 2, 2))  # n16 k2 g t w k1 i_low i_high
    return tl.reshape(tl.permute(parts, (4, 7, 6, 2, 0, 3, 1, 5)), (32 * VW, 16 * N16))


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
    k_pages, v_pages: of one class, data with the same strides; QuantizedPages hold params of q's dtype, values' in one part
    block_tables, context_lens, sliding_window, result: as `paged_decode_attention`'s. Raises ConfigError when head_dim > 256 or no
    multiple of 8.
    """
    batch, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_pages.data.shape
    config = quantized_decode_attention_config(
        batch=batch,
        num_kv_heads=num_kv_heads,
        group_size=num_heads // num_kv_heads,
        head_dim=head_dim,
        element_bytes=q.element_size(),
        max_context=block_tables.shape[1] * block_size,
        num_sms=num_sms(q.device),
        bits=k_pages.bits if isinstance(k_pages, QuantizedPages) else 8,
    )
    out = torch.empty((batch, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    assert num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} kv heads"
    assert k_pages.data.stride() == v_pages.data.stride(), "keys and values are stored alike"
    assert 1 == q.stride(2) == k_pages.data.stride(3) == block_tables.stride(1) == context_lens.stride(0)
    k_data, v_data = (pages.data.view(torch.int32) for pages in (k_pages, v_pages))
    bits, params, param_strides = _parameters(k_pages, v_pages)
    num_splits = config.num_splits
    one_split = num_splits == 1
    padded_group, block_d = next_power_of_2(num_heads // num_kv_heads), max(16, next_power_of_2(head_dim))
    partial = log_weight = counters = None
    if not one_split:
        counters = workspace(q.device)[1]
        assert batch * num_kv_heads <= counters.numel(), f"{batch} x {num_kv_heads} heads are too many to split"
        partial = torch.empty((batch, num_heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        log_weight = torch.empty((batch, num_heads, num_splits), dtype=torch.float32, device=q.device)
    _quantized_split_kernel[(batch, num_kv_heads, num_splits)](
        q,
        k_data,
        v_data,
        *params,
        block_tables,
        context_lens,
        out,
        partial,
        log_weight,
        counters,
        num_splits,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        *k_data.stride()[:3],
        *param_strides,
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        GROUP_SIZE=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SLIDING_WINDOW=sliding_window,
        BITS=bits,
        STATIC=isinstance(k_pages, StaticInt8Pages),
        HALVES=isinstance(k_pages, QuantizedPages) and k_pages.num_parts == 2,
        E4M3=isinstance(k_pages, QuantizedPages) and k_pages.e4m3,
        ONE_SPLIT=one_split,
        MIN_SPLIT=config.min_split_tokens,
        BLOCK_G=config.block_g,
        BLOCK_S=max(1, min(REDUCE_TILE, REDUCE_ELEMENTS * config.num_warps // (padded_group * block_d))),
        PADDED_GROUP=padded_group,
        BLOCK_N=config.block_n,
        BLOCK_HALF=config.block_half,
        BLOCK_D=block_d,
        ASM=q.is_cuda and q.dtype is not torch.float32,
        num_warps=config.num_warps,
        **({"maxnreg": config.max_registers} if config.max_registers else {}),
        **launch_options(has_pdl(q.device)),
    )
    return out


def _parameters(k_pages: Pages, v_pages: Pages) -> tuple[int, tuple[torch.Tensor | None, ...], tuple[int, ...]]:
    """(bits, (k scales, v scales, k zeros, v zeros), strides of k's and v's scales over block, head, token).

    Pairs of 16 bit numbers are given as words.
    """
    if isinstance(k_pages, StaticInt8Pages):
        assert isinstance(v_pages, StaticInt8Pages)
        return 8, (k_pages.scale, v_pages.scale, k_pages.zero, v_pages.zero), (0,) * 6
    assert isinstance(v_pages, QuantizedPages)
    assert v_pages.num_parts == 1, "values have one scale a head"
    assert 1 == k_pages.params.stride(3) == v_pages.params.stride(3)
    k_params, v_params = k_pages.params, v_pages.params
    if k_params.element_size() == 2:
        k_params, v_params = k_params.view(torch.int32), v_params.view(torch.int32)
    return k_pages.bits, (k_params, v_params, None, None), (*k_params.stride()[:3], *v_params.stride()[:3])
