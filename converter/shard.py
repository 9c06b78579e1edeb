"""From a layer's source projections to the joined TurboMind tensor, and from there to the ranks' shares.

Everything here works on the last axis (output features) of tensors shaped [in, out] or [out], so the same functions serve
16 bit weights, biases, and the nibbles, zeros and scales of int4 weights.
"""

import torch

from turbotriton.contract.layout import Split

__all__ = ["interleave_rotary", "split_grouped", "split_ranks", "split_stacked"]


def interleave_rotary(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Hugging Face's rotary halves to pairs: within each head, new column 2i + s = old column s head_dim/2 + i."""
    *lead, size = x.shape
    halves = x.reshape(*lead, size // head_dim, 2, head_dim // 2)
    return halves.transpose(-1, -2).reshape(*lead, size)


def split_stacked(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[..., q | k | v], equal in size (no grouped-query model packs this way)."""
    return x.chunk(3, dim=-1)


def split_grouped(x: torch.Tensor, num_kv_heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """[..., per KV head: its q heads, k, v], each head_dim wide -> (q, k, v) with heads in order."""
    *lead, size = x.shape
    heads = x.reshape(*lead, num_kv_heads, size // (num_kv_heads * head_dim), head_dim)
    parts = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
    return tuple(part.reshape(*lead, -1) for part in parts)


def split_ranks(x: torch.Tensor, split: Split, tp: int, q_size: int, kv_size: int) -> list[torch.Tensor]:
    """One tensor a file: a single one for Split.NONE, else one a rank. Views where the layout allows it."""
    if split is Split.NONE:
        return [x]
    if split is Split.COPY:
        return [x] * tp
    if split is Split.ROWS:
        return list(x.chunk(tp, dim=0))
    if split is Split.COLUMNS:
        return list(x.chunk(tp, dim=-1))
    q, k, v = (part.chunk(tp, dim=-1) for part in torch.split(x, [q_size, kv_size, kv_size], dim=-1))
    return [torch.cat(parts, dim=-1) for parts in zip(q, k, v, strict=True)]
