"""Arrays between host and device without waiting: on CUDA through pinned memory, to the device on the current stream, to the host on a
stream of their own behind it.

Torch's pinned allocator gives a buffer out again only when the copies that were recorded on it are done, so nothing is reused early.
"""

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["copy_into", "new_stream", "to_device", "to_host"]


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy of `array` on `device`; on CUDA the copy is queued behind what the stream has to do."""
    if device.type != "cuda":
        return torch.from_numpy(np.array(array))
    return _pinned(array).to(device, non_blocking=True)


def copy_into(target: torch.Tensor, array: npt.NDArray[np.generic]) -> None:
    """`to_device` to where `target` lies, which has the array's shape and dtype."""
    target.copy_(_pinned(array) if target.device.type == "cuda" else torch.from_numpy(array), non_blocking=True)


def _pinned(array: npt.NDArray[np.generic]) -> torch.Tensor:
    staged = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, pin_memory=True)
    staged.numpy()[...] = array
    return staged


def to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Queues a copy of `tensor` beside what the stream does next; the call that is returned waits for it and gives the host's tensor."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    stream = _stream_of_copies(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        staged.copy_(tensor, non_blocking=True)
        copied.record(stream)
    tensor.record_stream(stream)

    def wait() -> torch.Tensor:
        copied.synchronize()
        return staged

    return wait


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@functools.cache
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    return new_stream(device)
