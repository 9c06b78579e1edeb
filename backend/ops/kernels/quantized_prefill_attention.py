"""Causal attention of prompt chunks over 8 or 4 bit pages: the blocks that the chunks read are widened, then `paged_prefill_attention`.

    x' = q * scale + zero in fp32, rounded once to the compute dtype          (ops/operands.py; keys stay less their offset)

Arithmetic bounds a prefill, so keys and values are widened once instead of once for each query tile. Tiling: the grid is (rows, blocks,
kv heads); a program widens the keys and the values of one block and head. Blocks of a row stand one after the other in scratch:

    scratch   | row 0: ceil(L0 / block_size) blocks | row 1 ... |        base of row r = blocks of the rows before it, summed by the program

The host knows every length, so nothing waits for the device. Rows are taken in groups whose scratch fits MAX_SCRATCH_BYTES (one row at
least), and torch's allocator hands the same memory to group after group and layer after layer.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import QuantizedPages, StaticInt8Pages

from .fast_launch import launch
from .launch import has_pdl, launch_options, wait_for_previous
from .paged_prefill_attention import paged_prefill_attention
from .tuning import ceil_div, next_power_of_2

__all__ = ["quantized_prefill_attention"]

Pages = QuantizedPages | StaticInt8Pages
MAX_SCRATCH_BYTES = 512 << 20


@triton.jit
def _from_e4m3(codes):
    """Bytes of float8 e4m3 as fp32: an fp16 number of the same bits has an exponent that is 8 less."""
    wide = codes.to(tl.int16)
    return (((wide & 128) << 8) | ((wide & 127) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _widen_block(
    data_ptr,
    params_ptr,
    zero_ptr,
    out_ptr,
    kv_head,
    stride_data_token,
    stride_params_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    STATIC: tl.constexpr,
    HALVES: tl.constexpr,
    E4M3: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """data_ptr, params_ptr: of the block and head; out_ptr: [BLOCK_SIZE, HEAD_DIM], contiguous."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    offs_t = tl.arange(0, BLOCK_T)
    offs_half = tl.arange(0, BLOCK_HALF)
    mask_t = offs_t < BLOCK_SIZE
    mask_lo = mask_t[:, None] & (offs_half < HALF)[None, :]
    mask_hi = mask_t[:, None] & (offs_half + HALF < HEAD_DIM)[None, :]
    data_ptrs = data_ptr + offs_t[:, None] * stride_data_token + offs_half[None, :]
    lo = tl.load(data_ptrs, mask=mask_lo, other=0)
    if BITS == 4:
        hi = lo >> 4
        lo = lo & 15
    else:
        hi = tl.load(data_ptrs + HALF, mask=mask_hi, other=0)
    if STATIC:
        scale = tl.load(params_ptr + kv_head + offs_t * 0)
        zero = tl.load(zero_ptr + kv_head + offs_t * 0) - 128 * scale
        scale_hi = scale
        zero_hi = zero
    else:
        params_ptrs = params_ptr + offs_t * stride_params_token
        scale = tl.load(params_ptrs, mask=mask_t, other=0.0).to(tl.float32)
        zero = tl.load(params_ptrs + 1, mask=mask_t, other=0.0).to(tl.float32)
        scale_hi = scale
        zero_hi = zero
        if HALVES:
            scale_hi = tl.load(params_ptrs + 2, mask=mask_t, other=0.0).to(tl.float32)
            zero_hi = tl.load(params_ptrs + 3, mask=mask_t, other=0.0).to(tl.float32)
    if E4M3:
        lo = _from_e4m3(lo)
        hi = _from_e4m3(hi)
    out_ptrs = out_ptr + offs_t[:, None] * HEAD_DIM + offs_half[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptrs, (lo.to(tl.float32) * scale[:, None] + zero[:, None]).to(dtype), mask=mask_lo)
    tl.store(out_ptrs + HALF, (hi.to(tl.float32) * scale_hi[:, None] + zero_hi[:, None]).to(dtype), mask=mask_hi)


# Tables and lengths are slices whose alignment changes from step to step: it must not choose another compiled kernel.
@triton.jit(do_not_specialize=["block_tables_ptr", "context_lens_ptr", "cu_seqlens_ptr", "stride_table_row", "stride_out_row"])
def _widen_pages_kernel(
    k_data_ptr,
    v_data_ptr,
    k_params_ptr,
    v_params_ptr,
    k_zero_ptr,
    v_zero_ptr,
    block_tables_ptr,
    context_lens_ptr,
    cu_seqlens_ptr,
    k_out_ptr,
    v_out_ptr,
    tables_out_ptr,
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
    stride_out_row,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    BITS: tl.constexpr,
    STATIC: tl.constexpr,
    HALVES: tl.constexpr,
    E4M3: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0)
    index = tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    context_len = tl.load(context_lens_ptr + row)
    if index * BLOCK_SIZE >= context_len:
        return
    base = row * 0
    for start in range(0, row, ROWS_AT_ONCE):
        before = start + tl.arange(0, ROWS_AT_ONCE)
        lens = tl.load(context_lens_ptr + before, mask=before < row, other=0)
        base += tl.sum((lens + BLOCK_SIZE - 1) // BLOCK_SIZE, axis=0)
    target = (base + index).to(tl.int64)
    if kv_head == 0:
        tl.store(tables_out_ptr + row * stride_out_row + index, base + index)
    if SLIDING_WINDOW > 0:  # blocks that no query of the chunk sees stay as they are
        num_queries = tl.load(cu_seqlens_ptr + row + 1) - tl.load(cu_seqlens_ptr + row)
        if (index + 1) * BLOCK_SIZE <= context_len - num_queries + 1 - SLIDING_WINDOW:
            return
    block = tl.load(block_tables_ptr + row.to(tl.int64) * stride_table_row + index).to(tl.int64)
    k_params = k_params_ptr
    v_params = v_params_ptr
    if not STATIC:
        k_params += block * stride_k_params_block + kv_head * stride_k_params_head
        v_params += block * stride_v_params_block + kv_head * stride_v_params_head
    data = block * stride_data_block + kv_head * stride_data_head
    out = (target * NUM_KV_HEADS + kv_head) * (BLOCK_SIZE * HEAD_DIM)
    _widen_block(
        k_data_ptr + data,
        k_params,
        k_zero_ptr,
        k_out_ptr + out,
        kv_head,
        stride_data_token,
        stride_k_params_token,
        HEAD_DIM,
        BLOCK_SIZE,
        BITS,
        STATIC,
        HALVES,
        E4M3,
        BLOCK_T,
        BLOCK_HALF,
    )
    _widen_block(
        v_data_ptr + data,
        v_params,
        v_zero_ptr,
        v_out_ptr + out,
        kv_head,
        stride_data_token,
        stride_v_params_token,
        HEAD_DIM,
        BLOCK_SIZE,
        BITS,
        STATIC,
        False,
        E4M3,
        BLOCK_T,
        BLOCK_HALF,
    )


def quantized_prefill_attention(
    q: torch.Tensor,
    k_pages: Pages,
    v_pages: Pages,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    scale: float,
    sliding_window: int,
    prefills: Sequence[tuple[int, int]],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launches on the current device and stream; nothing is read back.

    k_pages, v_pages: of one class, data with the same strides; values in one part
    prefills: (num_query_tokens, context_len) of each row
    the rest and the result: as `paged_prefill_attention`'s
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_size = k_pages.data.shape[2]
    block_bytes = 2 * k_pages.data[0].numel() * (8 // _bits(k_pages)) * q.element_size()
    first_token = 0
    for begin, end in _groups([ceil_div(context, block_size) for _, context in prefills], MAX_SCRATCH_BYTES // block_bytes):
        num_tokens = sum(queries for queries, _ in prefills[begin:end])
        tables, lens, starts = block_tables[begin:end], context_lens[begin:end], cu_seqlens_q[begin : end + 1]
        if begin:
            starts = starts - starts[0]
        k, v, places = _widened(k_pages, v_pages, tables, lens, starts, q.dtype, sliding_window, prefills[begin:end])
        mine = slice(first_token, first_token + num_tokens)
        paged_prefill_attention(q[mine], k, v, places, lens, starts, scale, sliding_window, out[mine])
        first_token += num_tokens
    return out


def _groups(num_blocks: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of consecutive rows that have at most `most` blocks together; one row at least."""
    begin, total = 0, 0
    for row, count in enumerate(num_blocks):
        if row > begin and total + count > most:
            yield begin, row
            begin, total = row, 0
        total += count
    yield begin, len(num_blocks)


def _bits(pages: Pages) -> int:
    return pages.bits if isinstance(pages, QuantizedPages) else 8


def _widened(
    k_pages: Pages,
    v_pages: Pages,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    dtype: torch.dtype,
    sliding_window: int,
    prefills: Sequence[tuple[int, int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(keys, values: [blocks of all rows, num_kv_heads, block_size, head_dim], tables of them), new."""
    _, num_kv_heads, block_size, width = k_pages.data.shape
    head_dim = width * 8 // _bits(k_pages)
    counts = [ceil_div(context, block_size) for _, context in prefills]
    device = k_pages.data.device
    k, v = (torch.empty((sum(counts), num_kv_heads, block_size, head_dim), dtype=dtype, device=device) for _ in "kv")
    tables = torch.empty((len(counts), max(counts)), dtype=torch.int32, device=device)
    assert k_pages.data.stride() == v_pages.data.stride(), "keys and values are stored alike"
    assert 1 == k_pages.data.stride(3) == block_tables.stride(1) == context_lens.stride(0) == cu_seqlens_q.stride(0)
    if isinstance(k_pages, StaticInt8Pages) and isinstance(v_pages, StaticInt8Pages):
        params: tuple[torch.Tensor | None, ...] = (k_pages.scale, v_pages.scale, k_pages.zero, v_pages.zero)
        param_strides: tuple[int, ...] = (0,) * 6
    else:
        assert isinstance(k_pages, QuantizedPages)
        assert isinstance(v_pages, QuantizedPages)
        assert v_pages.num_parts == 1, "values have one scale a head"
        params = (k_pages.params, v_pages.params, None, None)
        param_strides = (*k_pages.params.stride()[:3], *v_pages.params.stride()[:3])
    launch(
        _widen_pages_kernel,
        (len(counts), max(counts), num_kv_heads),
        k_pages.data,
        v_pages.data,
        *params,
        block_tables,
        context_lens,
        cu_seqlens_q,
        k,
        v,
        tables,
        *k_pages.data.stride()[:3],
        *param_strides,
        block_tables.stride(0),
        tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SLIDING_WINDOW=sliding_window,
        BITS=_bits(k_pages),
        STATIC=isinstance(k_pages, StaticInt8Pages),
        HALVES=isinstance(k_pages, QuantizedPages) and k_pages.num_parts == 2,
        E4M3=isinstance(k_pages, QuantizedPages) and k_pages.e4m3,
        ROWS_AT_ONCE=32,
        BLOCK_T=next_power_of_2(block_size),
        BLOCK_HALF=next_power_of_2((head_dim + 1) // 2),
        num_warps=4,
        **launch_options(has_pdl(device)),
    )
    return k, v, tables
