"""What a launch needs to know of the device, and programmatic dependent launch (sm_90 on): a kernel starts while the one before it
ends, and waits inside for its results.

A kernel that takes part calls `wait_for_previous` before it touches anything that another kernel writes, and is launched with
`launch_options`. Every one lets its successor start at once: a successor waits for all of it, so only launch costs overlap.

What was written before the last kernel that takes no part may be read before the wait, since that one ended before its successors began.
In a decode step the embedding is such a kernel: layers may read lengths, block tables and the keys of earlier steps at once.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["chosen", "has_pdl", "is_hopper", "launch_options", "num_sms", "shared_memory_bytes", "wait_for_previous"]

CPU_NUM_SMS = 4  # for the interpreter: enough to give several splits
CPU_SHARED_BYTES = 227 << 10  # the same: what the chip has that is tuned for


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@functools.cache
def has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else CPU_NUM_SMS


@functools.cache
def shared_memory_bytes(device: torch.device) -> int:
    """The most that one program can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else CPU_SHARED_BYTES


@functools.lru_cache(maxsize=4096)
def chosen(choice: Callable[..., Any], *numbers: Any, **more: Any) -> Any:
    """choice(*numbers, **more), a pure function out of tuning.py, whose constants nobody changes without `chosen.cache_clear()`."""
    return choice(*numbers, **more)


def launch_options(pdl: bool) -> dict[str, bool]:
    """Keywords of a launch; without programmatic launch none, since other targets do not know the option."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
