"""Attention of one query token a sequence over 8 or 4 bit pages, read as they are stored (ops/operands.py for their meaning).

    out = softmax(q K^T scale, over positions max(0, L - window) <= p < L) V,     K = Kq s_n + z_n, V likewise (Kq: the stored numbers)

What such a kernel runs short of is registers and instructions before bytes, so stored numbers go to the matrix unit almost as they are.
s_n and z_n belong to a key's head, of 4 bit keys to each half of it; they are factored out of the products:

    K q = s_n (Kq q) + z_n sum q       V P = Vq P' + sum(P z_n),  P' = P s_n

Keys are signed bytes: a mask makes 4 of them, of nibbles 8. q is an integer of 16 bits, of the head's largest number 1/32512, in two digits
that are signed bytes too (q = 256 d0 + d1), so q K^T is exact. A value becomes fp16 by standing where fp16's bits stand: it is a subnormal
number then, 2^-24 of itself, and 2^-20 from a high nibble. (1024 + v, another number made of bits alone, loses the last places of a long
sum to the matrix unit, which cuts them off.) The maximum of the softmax is one of scores + log2 s_n, which keeps P' within fp16 whatever
the scales are. float8 e4m3: bits shifted into an fp16 number are 2^-8 of it, zeros are 0, and q's digits are fp16: q rounded, and what that
left. So are those of keys whose rows are no multiple of 16 bytes. fp32 models: all in fp32, nothing is rounded.

Tiling and splits are `paged_decode_attention`'s, transposed: keys and values are the left operands of mma.sync, and the query heads of a kv
head its columns, each twice, so that four heads fill the 8 columns. Of keys the two are q's digits. Of values they are the outputs of two
neighbouring bytes, which stand side by side as the operand's pair of "keys": P' is 0 for the one that is not the column's, and bytes of
different keys need not be brought together. With lane = 4 g + t and J = BLOCK_N / 8:

    K  lane (g, t) loads bytes 16 t .. 16 t + 15 (and on in steps of 64) of keys J g .. J g + J - 1
    S  lane (g, t) has the scores of its keys and head t (t + 4, ...), and loads their scales and zeros
    V  lane (g, t) loads bytes 8 g .. 8 g + 7 (8 bit: 16) of keys J t .. J t + J - 1 and J (t + 4) .. J (t + 4) + J - 1

A program is one warp. What a thread loads is its share of an operand, since the order of dims and keys of a product is free: keys and
values see no shared memory. The next tile's keys, scales and zeros are loaded while this one is worked on. Scores, softmax and sums in
fp32; P' is rounded to fp16. What lies in a block past the context is read and left out; other blocks are not touched.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import QuantizedPages, StaticInt8Pages

from .attention_tuning import quantized_decode_attention_config
from .fast_launch import launch
from .fast_math import fast_exp2, fast_log2
from .launch import has_pdl, launch_options, num_sms, wait_for_previous
from .paged_decode_attention import REDUCE_ELEMENTS, REDUCE_TILE, _add_splits, _key_range, _split_tokens
from .quantized_products import digits_of, k_dims_of, of_heads, products_of, v_dims_of, value_operand, weight_operand
from .quantized_words import (
    block_of,
    load_keys,
    load_params,
    load_values,
    nibbles,
    params_of,
    signed_bytes,
    widened,
)
from .split_sum import is_last_of, workspace
from .tuning import next_power_of_2

__all__ = ["quantized_decode_attention"]

Pages = QuantizedPages | StaticInt8Pages

LEEWAY_BITS = 0x41000000  # of 8.0 in fp32


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
    stride_k_params_block,
    stride_k_params_head,
    stride_v_params_block,
    stride_v_params_head,
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
    STRIDE_TOKEN: tl.constexpr,
    STRIDE_K_PARAMS: tl.constexpr,
    STRIDE_V_PARAMS: tl.constexpr,
    K_PARAMS: tl.constexpr,
    V_PARAMS: tl.constexpr,
    LEEWAY_BITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ASM: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    kv_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
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
    # q K^T by the integer matrix unit; triton 3.6 moves bytes between lanes wrongly (seen on sm_90) where their loads are not in one piece
    INTEGER: tl.constexpr = dtype == tl.float16 and not E4M3 and ALIGNED
    K_UNIT: tl.constexpr = 256.0 if E4M3 else 1.0  # what a number is, over what stands for it in the product
    V_UNIT: tl.constexpr = 256.0 if E4M3 else 16777216.0 if dtype == tl.float16 else 1.0
    HALF: tl.constexpr = HEAD_DIM // 2
    ROW: tl.constexpr = HALF if BITS == 4 else HEAD_DIM  # bytes of a key
    BLOCK_ROW: tl.constexpr = BLOCK_HALF if BITS == 4 else 2 * BLOCK_HALF
    J: tl.constexpr = BLOCK_N // 8  # keys of a lane in the scores
    Q: tl.constexpr = BLOCK_G // 4  # heads of a lane
    KW: tl.constexpr = BLOCK_ROW // 16  # words of a lane: of a key
    VW: tl.constexpr = BLOCK_ROW // 32  # and of a value

    # Columns are pairs of a head's digits.
    k_dims = k_dims_of(tl.arange(0, BLOCK_ROW), INTEGER)
    columns = tl.arange(0, 2 * BLOCK_G)
    q_ptrs = q_ptr + sequence * stride_q_row + (kv_head * GROUP_SIZE + columns // 2)[None, :] * stride_q_head + k_dims[:, None]
    mask_q = (columns // 2 < GROUP_SIZE)[None, :] & (k_dims < ROW)[:, None]
    q = tl.load(q_ptrs, mask=mask_q, other=0.0).to(tl.float32)  # [BLOCK_ROW, 2 BLOCK_G]
    largest = tl.max(tl.abs(q), axis=0)
    q_hi = q
    if BITS == 4:
        q_hi = tl.load(q_ptrs + HALF, mask=mask_q, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(q_hi), axis=0))
    largest = tl.where(largest > 0, largest, 1.0)
    scale_q = ((32512.0 if INTEGER else 1.0) / largest)[None, :]
    q, sum_lo = digits_of(q * scale_q, INTEGER, dtype)
    q_hi, sum_hi = digits_of(q_hi * scale_q, INTEGER, dtype)
    # Numbers of a (key, head) or a head stand as the products do: [J, 8, Q, 4]
    head_scale = of_heads(largest, Q) * (scale_log2 / (32512.0 if INTEGER else 1.0))
    sum_lo = of_heads(sum_lo, Q) * head_scale
    sum_hi = of_heads(sum_hi, Q) * head_scale
    k_unit = head_scale * K_UNIT
    high_unit = head_scale / 16
    low_plus = 0.0 * sum_lo if BITS == 4 or E4M3 or STATIC else 128 * sum_lo
    high_plus = 8 * sum_hi

    table_ptr = block_tables_ptr + sequence * stride_table_row
    k_head_ptr = k_data_ptr + kv_head * stride_data_head
    v_head_ptr = v_data_ptr + kv_head * stride_data_head
    k_params_head_ptr = k_params_ptr + kv_head * stride_k_params_head
    v_params_head_ptr = v_params_ptr + kv_head * stride_v_params_head
    offs_n = tl.reshape(tl.arange(0, 8)[None, :] * J + tl.arange(0, J)[:, None], (J, 8, 1, 1))

    maximum = tl.zeros((1, 1, Q, 4), tl.float32)
    total = tl.zeros((8, Q, 4), tl.float32)
    of_zeros = tl.zeros((8, Q, 4), tl.float32)
    acc = tl.zeros((16 * VW, 2 * BLOCK_G), tl.float32)
    acc_hi = acc
    last = tl.maximum(end - 1, 0)
    block = block_of(table_ptr, start, last, BLOCK_SIZE)
    next_block = block_of(table_ptr, start + BLOCK_N, last, BLOCK_SIZE)  # ids are read two tiles ahead
    k_words = load_keys(
        k_head_ptr, table_ptr, block, start, last, stride_data_block, STRIDE_TOKEN, BLOCK_SIZE, BLOCK_N, ROW, BLOCK_ROW
    )
    if not STATIC:
        k_params = load_params(
            k_params_head_ptr,
            table_ptr,
            block,
            start,
            last,
            stride_k_params_block,
            STRIDE_K_PARAMS,
            BLOCK_SIZE,
            BLOCK_N,
            K_PARAMS,
        )
        v_params = load_params(
            v_params_head_ptr,
            table_ptr,
            block,
            start,
            last,
            stride_v_params_block,
            STRIDE_V_PARAMS,
            BLOCK_SIZE,
            BLOCK_N,
            V_PARAMS,
        )
    # Every tile holds at least one key that is seen, so `maximum` is a score's after the first.
    for tile in tl.range(start, end, BLOCK_N, num_stages=1):
        block_after = block_of(table_ptr, tile + 2 * BLOCK_N, last, BLOCK_SIZE)
        v_words = load_values(
            v_head_ptr, table_ptr, block, tile, last, stride_data_block, STRIDE_TOKEN, BLOCK_SIZE, BLOCK_N, ROW, BLOCK_ROW
        )
        if STATIC:
            k_scale = tl.load(k_params_ptr + kv_head + offs_n * 0)
            k_zero = tl.load(k_zero_ptr + kv_head + offs_n * 0)
            v_scale = tl.load(v_params_ptr + kv_head + offs_n * 0)
            v_zero = tl.load(v_zero_ptr + kv_head + offs_n * 0) - 128 * v_scale
        else:
            k_scale, k_zero = params_of(k_params, 0, K_PARAMS, J, q_dtype)
            v_scale, v_zero = params_of(v_params, 0, V_PARAMS, J, q_dtype)
        # scores - maximum, in log2
        if BITS == 4:
            k_lo, k_hi = nibbles(k_words, INTEGER, dtype, ASM and ALIGNED)
            products = products_of(k_lo, q, J, KW, INTEGER) * k_unit
            products_hi = products_of(k_hi, q_hi, J, KW, INTEGER) * high_unit + high_plus
            k_scale_hi, k_zero_hi = k_scale, k_zero
            if HALVES:
                k_scale_hi, k_zero_hi = params_of(k_params, 1, K_PARAMS, J, q_dtype)
            scores = sum_lo * k_zero + (sum_hi * k_zero_hi - maximum)
            scores += products * k_scale + products_hi * k_scale_hi
        else:
            k_numbers = signed_bytes(k_words, INTEGER, E4M3, dtype, ASM and ALIGNED)
            products = products_of(k_numbers, q, J, KW, INTEGER) * k_unit + low_plus
            scores = products * k_scale + (sum_lo * k_zero - maximum)

        block = next_block
        next_block = block_after
        next_tile = tl.where(tile + BLOCK_N < end, tile + BLOCK_N, tile)
        k_words = load_keys(
            k_head_ptr, table_ptr, block, next_tile, last, stride_data_block, STRIDE_TOKEN, BLOCK_SIZE, BLOCK_N, ROW, BLOCK_ROW
        )
        if not STATIC:
            k_params = load_params(
                k_params_head_ptr,
                table_ptr,
                block,
                next_tile,
                last,
                stride_k_params_block,
                STRIDE_K_PARAMS,
                BLOCK_SIZE,
                BLOCK_N,
                K_PARAMS,
            )
            v_params = load_params(
                v_params_head_ptr,
                table_ptr,
                block,
                next_tile,
                last,
                stride_v_params_block,
                STRIDE_V_PARAMS,
                BLOCK_SIZE,
                BLOCK_N,
                V_PARAMS,
            )

        v_scale = tl.maximum(v_scale, 1e-20)
        # P' stays below 2^LEEWAY keys' of the maximum that they were made with: seldom rescaled, and within fp16.
        bits = (scores + fast_log2(v_scale, ASM)).to(tl.int32, bitcast=True)  # of numbers above 0 in their order
        is_large = tl.max(tl.reshape(bits, (J * 8 * BLOCK_G,)), axis=0) > LEEWAY_BITS
        if is_large | (tile == start) | (tile + BLOCK_N > end):
            seen = (tile + offs_n >= first) & (tile + offs_n < end)
            scores = tl.where(seen, scores, float("-inf"))
            v_scale = tl.where(seen, v_scale, 1.0)  # what lies in a block past the context may be NaN
            v_zero = tl.where(seen, v_zero, 0.0)
            largest_here = scores + fast_log2(v_scale, ASM)
            largest_here = tl.max(tl.max(largest_here, axis=0, keep_dims=True), axis=1, keep_dims=True)
            if tile > start:
                largest_here = tl.maximum(largest_here, 0.0)
            scores -= largest_here
            rescale = fast_exp2(tl.minimum(-largest_here, 0.0), ASM)
            of_columns = tl.broadcast_to(tl.reshape(rescale, (1, BLOCK_G, 1)), (1, BLOCK_G, 2))
            of_columns = tl.reshape(of_columns, (1, 2 * BLOCK_G))
            acc *= of_columns
            acc_hi *= of_columns
            total *= tl.reshape(rescale, (1, Q, 4))
            of_zeros *= tl.reshape(rescale, (1, Q, 4))
            maximum += largest_here
        weights = fast_exp2(scores, ASM)
        total += tl.sum(weights, axis=0)
        of_zeros += tl.sum(weights * v_zero, axis=0)
        rounded = weight_operand((weights * v_scale).to(dtype))
        if BITS == 4:
            v_lo, v_hi = widened(v_words, BITS, E4M3, dtype, ASM and ALIGNED)
            acc_hi = tl.dot(value_operand(v_hi, J, VW), rounded, acc=acc_hi, input_precision="ieee")
        else:
            v_lo, _ = widened(v_words, BITS, E4M3, dtype, ASM and ALIGNED)
        acc = tl.dot(value_operand(v_lo, J, VW), rounded, acc=acc, input_precision="ieee")

    heads = kv_head * GROUP_SIZE + tl.arange(0, BLOCK_G)
    mask_g = tl.arange(0, BLOCK_G) < GROUP_SIZE
    v_dims = v_dims_of(tl.arange(0, 16 * VW), VW)[:, None, None] + 2 * tl.arange(0, 2)[None, None, :]
    total = tl.reshape(tl.sum(total, axis=0), (BLOCK_G,))
    share = 1.0 / tl.where(total > 0, total, 1.0)  # total is 0 only for a sequence of no keys: zeros
    zeros = tl.reshape(tl.sum(of_zeros, axis=0), (BLOCK_G,)) * share
    SHAPE: tl.constexpr = (16 * VW, BLOCK_G, 2)
    acc = tl.reshape(acc, SHAPE) * (V_UNIT * share)[None, :, None] + zeros[None, :, None]
    if BITS == 4:
        acc_hi = tl.reshape(acc_hi, SHAPE) * (V_UNIT / 16 * share)[None, :, None] + zeros[None, :, None]
    mask = mask_g[None, :, None] & (v_dims < ROW)
    if num_used <= 1:
        out_ptrs = out_ptr + ((sequence * NUM_HEADS + heads) * HEAD_DIM)[None, :, None] + v_dims
        tl.store(out_ptrs, acc.to(q_dtype), mask=mask)
        if BITS == 4:
            tl.store(out_ptrs + HALF, acc_hi.to(q_dtype), mask=mask)
    elif not ONE_SPLIT:
        partial_rows = (sequence * NUM_HEADS + heads) * num_splits + split
        partial_ptrs = partial_ptr + (partial_rows * HEAD_DIM)[None, :, None] + v_dims
        tl.store(partial_ptrs, acc, mask=mask)
        if BITS == 4:
            tl.store(partial_ptrs + HALF, acc_hi, mask=mask)
        log_weight = tl.reshape(maximum, (BLOCK_G,)) + tl.log2(total)
        tl.store(log_weight_ptr + partial_rows, log_weight, mask=mask_g)
        if is_last_of(counters_ptr + sequence * tl.num_programs(0) + kv_head, num_used):
            first_head = sequence * NUM_HEADS + kv_head * GROUP_SIZE
            _add_splits(
                partial_ptr, log_weight_ptr, out_ptr, first_head, num_splits, num_used,
                GROUP_SIZE, HEAD_DIM, PADDED_GROUP, BLOCK_S, BLOCK_D,
            )  # fmt: skip


def quantized_decode_attention(
    q: torch.Tensor,
    k_pages: Pages,
    v_pages: Pages,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch on the current device and stream; nothing is read back, so it can be captured in a CUDA graph.

    q: [batch, num_heads, head_dim], fp16|bf16|fp32, contiguous inside a head; head h reads kv head h // group_size
    k_pages, v_pages: of one class, data with the same strides; QuantizedPages hold params of q's dtype, values' in one part
    block_tables, context_lens, sliding_window, out, result: as `paged_decode_attention`'s. Raises ConfigError when head_dim > 256 or no
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
    if out is None:
        out = torch.empty((batch, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    assert num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} kv heads"
    assert k_pages.data.stride() == v_pages.data.stride(), "keys and values are stored alike"
    assert 1 == q.stride(2) == k_pages.data.stride(3) == block_tables.stride(1) == context_lens.stride(0)
    k_data, v_data = (pages.data.view(torch.int32) for pages in (k_pages, v_pages))
    params, param_strides, words = _parameters(k_pages, v_pages)
    num_splits = config.num_splits
    one_split = num_splits == 1
    padded_group, block_d = next_power_of_2(num_heads // num_kv_heads), max(16, next_power_of_2(head_dim))
    partial = log_weight = counters = None
    if not one_split:
        counters = workspace(q.device)[1]
        assert batch * num_kv_heads <= counters.numel(), f"{batch} x {num_kv_heads} heads are too many to split"
        partial = torch.empty((batch, num_heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        log_weight = torch.empty((batch, num_heads, num_splits), dtype=torch.float32, device=q.device)
    launch(
        _quantized_split_kernel,
        (num_kv_heads, num_splits, batch),
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
        *k_data.stride()[:2],
        *(stride for strides in param_strides for stride in strides[:2]),
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        GROUP_SIZE=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SLIDING_WINDOW=sliding_window,
        BITS=k_pages.bits if isinstance(k_pages, QuantizedPages) else 8,
        STATIC=isinstance(k_pages, StaticInt8Pages),
        HALVES=isinstance(k_pages, QuantizedPages) and k_pages.num_parts == 2,
        E4M3=isinstance(k_pages, QuantizedPages) and k_pages.e4m3,
        ONE_SPLIT=one_split,
        MIN_SPLIT=config.min_split_tokens,
        STRIDE_TOKEN=k_data.stride(2),
        STRIDE_K_PARAMS=param_strides[0][2],
        STRIDE_V_PARAMS=param_strides[1][2],
        K_PARAMS=words[0],
        V_PARAMS=words[1],
        LEEWAY_BITS=LEEWAY_BITS,
        BLOCK_G=config.block_g,
        BLOCK_S=max(1, min(REDUCE_TILE, REDUCE_ELEMENTS * config.num_warps // (padded_group * block_d))),
        PADDED_GROUP=padded_group,
        BLOCK_N=config.block_n,
        BLOCK_HALF=config.block_half,
        BLOCK_D=block_d,
        ASM=q.is_cuda and q.dtype is not torch.float32,
        ALIGNED=k_data.shape[3] % 4 == 0 and all(stride % 16 == 0 for stride in k_data.stride()[:2]),
        num_warps=config.num_warps,
        **({"maxnreg": config.max_registers} if config.max_registers else {}),
        **launch_options(has_pdl(q.device)),
    )
    return out


class _Params(NamedTuple):
    """Where scales and zeros lie; pairs of 16 bit numbers are given as words."""

    tensors: tuple[torch.Tensor | None, ...]  # k scales, v scales, k zeros, v zeros
    strides: tuple[tuple[int, int, int], ...]  # k's, v's over block, head, token
    words: tuple[int, int]  # k's, v's of a key


def _parameters(k_pages: Pages, v_pages: Pages) -> _Params:
    if isinstance(k_pages, StaticInt8Pages):
        assert isinstance(v_pages, StaticInt8Pages)
        return _Params((k_pages.scale, v_pages.scale, k_pages.zero, v_pages.zero), ((0, 0, 0),) * 2, (0, 0))
    assert isinstance(v_pages, QuantizedPages)
    assert v_pages.num_parts == 1, "values have one scale a head"
    k_params, v_params = k_pages.params, v_pages.params
    assert 1 == k_params.stride(3) == v_params.stride(3)
    if k_params.element_size() == 2:
        k_params, v_params = k_params.view(torch.int32), v_params.view(torch.int32)
    strides = tuple((p.stride(0), p.stride(1), p.stride(2)) for p in (k_params, v_params))
    return _Params((k_params, v_params, None, None), strides, (k_params.shape[3], v_params.shape[3]))
