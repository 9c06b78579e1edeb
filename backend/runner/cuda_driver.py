"""A GPU by the C interface of CUDA's driver, for what is to go on while torch is being imported.

torch shares the context that is made here: it is the device's primary one, which lives as long as the process.
"""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Gpu", "device_index", "open_gpu"]

NAME_BYTES = 256


class Gpu(NamedTuple):
    name: str
    free_bytes: int


def device_index(name: str) -> int | None:
    """Of the option `device`: "cuda:1" is 1, "cuda" and "auto" 0 (if there is one), None is no GPU."""
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cuda") or (index and not index.isdecimal()):
        return None
    return int(index or 0)


def open_gpu(index: int) -> Gpu | None:
    """Makes the context of a device that CUDA_VISIBLE_DEVICES leaves visible; None: there is no such device, no driver, or it refuses."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    name = ctypes.create_string_buffer(NAME_BYTES)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    calls: tuple[Callable[[], int], ...] = (  # each lets Python go on meanwhile
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), index),
        lambda: cuda.cuDeviceGetName(name, NAME_BYTES, device),
        lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        lambda: cuda.cuCtxPushCurrent_v2(context),
        lambda: cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
        lambda: cuda.cuCtxPopCurrent_v2(ctypes.byref(context)),
    )
    if any(call() for call in calls):  # up to the first code of an error
        return None
    return Gpu(name.value.decode(errors="replace"), free.value)
