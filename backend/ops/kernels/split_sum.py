"""Sums over K that several programs share: each leaves its part in a workspace, and the last to arrive adds all of them up in order.

The result does not depend on who is last. Counters return to zero, so a captured graph can be replayed; one workspace a device serves
every launch on a stream, since a kernel waits for the one before it before it writes here.
"""

import functools

import torch
import triton
import triton.language as tl

__all__ = ["is_last_of", "load_sum", "sum_of_splits", "workspace"]

WORKSPACE_ELEMENTS = 9 << 20  # fp32: 36 MiB
NUM_COUNTERS = 8192


@functools.cache
def workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp32 parts [WORKSPACE_ELEMENTS], int32 counters [NUM_COUNTERS], zero between launches)."""
    parts = torch.zeros(WORKSPACE_ELEMENTS, dtype=torch.float32, device=device)
    return parts, torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def load_sum(ptrs, mask, stride_part, NUM_PARTS: tl.constexpr, dtype: tl.constexpr):
    """What an operand that may be SplitSums has there, rounded to the dtype: NUM_PARTS parts added up in their order."""
    x = tl.load(ptrs, mask=mask, other=0.0)
    for part in tl.static_range(1, NUM_PARTS):
        x += tl.load(ptrs + part * stride_part, mask=mask, other=0.0)
    return x.to(dtype)


@triton.jit
def is_last_of(counter_ptr, num_programs):
    """Whether the others of `num_programs` have been here; what they stored before can be read then, past the L1 cache. The last sets the
    counter back."""
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def sum_of_splits(acc, parts_ptr, counters_ptr, tile, split, NUM_SPLITS: tl.constexpr):
    """(acc summed over the splits of `tile`, whether this program is the last of them: the others have a sum of no use).

    acc: [R, C], fp32, or int32 with parts_ptr to match; the same shape in all programs of the launch
    """
    R: tl.constexpr = acc.shape[0]
    C: tl.constexpr = acc.shape[1]
    offs = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    first_ptr = parts_ptr + tile.to(tl.int64) * NUM_SPLITS * R * C + offs
    tl.store(first_ptr + split * R * C, acc)
    is_last = is_last_of(counters_ptr + tile, NUM_SPLITS)
    if is_last:
        acc = tl.zeros((R, C), acc.dtype)
        for other in range(NUM_SPLITS):
            acc += tl.load(first_ptr + other * R * C, cache_modifier=".cg")
    return acc, is_last
