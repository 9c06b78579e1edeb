"""Storing into and reading from one layer's keys (or values), whatever their format. The formulas stand in `ops/operands.py`."""

import torch

from ..operands import KvPages, QuantizedPages, StaticInt8Pages, Unadded, whole
from .primitives import rotary_store_kv

__all__ = ["e4m3_tokens", "gathered_pages", "page_shape", "quantized_tokens", "rotary_store_quantized_kv", "store_pages"]


E4M3_MAX = 448.0


def page_shape(pages: KvPages) -> tuple[int, int, int, int]:
    """(num_blocks, num_kv_heads, block_size, head_dim)."""
    data = pages if isinstance(pages, torch.Tensor) else pages.data
    num_blocks, num_kv_heads, block_size, width = data.shape
    return num_blocks, num_kv_heads, block_size, width * 8 // pages.bits if isinstance(pages, QuantizedPages) else width


def rotary_store_quantized_kv(
    qkv: Unadded,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_cache: KvPages,
    v_cache: KvPages,
    slot_mapping: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """As `rotary_store_kv`, with keys and values rounded to the compute dtype and then quantised."""
    head_dim, qkv = page_shape(k_cache)[3], whole(qkv)
    k, v = (qkv.new_empty((qkv.shape[0], num_kv_heads, 1, head_dim)) for _ in range(2))  # blocks of one token
    slots = torch.arange(qkv.shape[0], device=qkv.device)
    q = rotary_store_kv(qkv, cos, sin, q_scale, k, v, slots, num_heads, num_kv_heads)
    store_pages(k_cache, slot_mapping, k.squeeze(2))
    store_pages(v_cache, slot_mapping, v.squeeze(2))
    return q


def store_pages(pages: KvPages, slot_mapping: torch.Tensor, values: torch.Tensor) -> None:
    """values: [num_tokens, num_kv_heads, head_dim], the compute dtype; written at slot_mapping: [num_tokens], -1 stores nothing."""
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        slot_mapping, values = slot_mapping[kept], values[kept]
    block_size = page_shape(pages)[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    if isinstance(pages, torch.Tensor):
        pages[block, :, offset] = values.to(pages.dtype)
    elif isinstance(pages, StaticInt8Pages):
        scaled = (values.float() - pages.zero[:, None]) / pages.scale[:, None] + 128
        pages.data[block, :, offset] = scaled.round().clamp(0, 255).to(torch.uint8)
    else:
        if pages.offset is not None:
            values = values.float() - pages.offset
        dtype = pages.params.dtype
        data, params = e4m3_tokens(values, dtype) if pages.e4m3 else quantized_tokens(values, pages.bits, dtype, pages.num_parts)
        pages.data[block, :, offset] = data
        pages.params[block, :, offset] = params


def quantized_tokens(
    values: torch.Tensor, bits: int, dtype: torch.dtype, num_parts: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """values: [..., head_dim] -> (uint8 [..., head_dim * bits / 8], params [..., 2 num_parts] in `dtype`), as QuantizedPages holds them."""
    wide = values.float().reshape(*values.shape[:-1], num_parts, values.shape[-1] // num_parts)
    steps = 2**bits - 1
    low, high = wide.aminmax(dim=-1, keepdim=True)
    params = torch.cat(((high - low) / steps, low), dim=-1).to(dtype)  # [..., num_parts, 2]
    scale, zero = params.float().chunk(2, dim=-1)
    q = ((wide - zero) / scale.where(scale > 0, torch.inf)).round().clamp(0, steps).to(torch.uint8).flatten(-2)
    if bits == 4:
        first, second = q.chunk(2, dim=-1)
        q = first | (second << 4)
    return q, params.flatten(-2)


def e4m3_tokens(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """values: [..., head_dim] -> (bytes of float8 e4m3, of the same shape, params [..., 2] in `dtype`: scale and 0)."""
    wide = values.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / E4M3_MAX).to(dtype)
    steps = scale.float()
    q = (wide / steps.where(steps > 0, torch.inf)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return q.view(torch.uint8), torch.cat((scale, torch.zeros_like(scale)), dim=-1)


def gathered_pages(pages: QuantizedPages | StaticInt8Pages, blocks: torch.Tensor) -> torch.Tensor:
    """The values of `blocks`, keys less their offset: [num] int64 -> [num, num_kv_heads, block_size, head_dim], fp32."""
    data = pages.data[blocks]
    if isinstance(pages, StaticInt8Pages):
        return (data.float() - 128) * pages.scale[:, None, None] + pages.zero[:, None, None]
    if pages.bits == 4:
        data = torch.cat((data & 0xF, data >> 4), dim=-1)
    params = pages.params[blocks].float()
    scale, zero = params.view(*params.shape[:-1], pages.num_parts, 2).chunk(2, dim=-1)  # [..., num_parts, 1]
    if pages.e4m3:
        data = data.view(torch.float8_e4m3fn)
    parts = data.float().reshape(*data.shape[:-1], pages.num_parts, -1)
    return (parts * scale + zero).flatten(-2)
