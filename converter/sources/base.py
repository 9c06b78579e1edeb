"""What every checkpoint format offers: the shapes of all tensors at once, the values one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

__all__ = ["Source", "TensorInfo"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path  # the file to blame


class Source(Protocol):
    """A checkpoint. Opening it reads headers only."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> torch.Tensor:
        """A fresh copy of the tensor in its stored dtype: the caller may write to it, and nothing of the file stays in memory.

        Raises CheckpointError when the file cannot be read.
        """
        ...
