"""One file that torch.save wrote (.bin, .pth, .pt): read with weights_only, so that no code in it can run.

The file is memory-mapped. Mapped pages that were touched count as resident, so the map is dropped and made again after
`REOPEN_BYTES` of reading.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from turbotriton.contract.errors import CheckpointError

from .base import TensorInfo

__all__ = ["TorchFile"]

REOPEN_BYTES = 64 * 2**20


class TorchFile:
    """Raises CheckpointError from the constructor for a corrupt file and for one that needs unpickling."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loaded: dict[str, torch.Tensor] | None = self._load()
        self._bytes_read = 0
        self._tensors = {name: TensorInfo(tuple(t.shape), t.dtype, path) for name, t in self._loaded.items()}

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            content = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{self._path}: holds more than tensors and would need unpickling, which can run code; "
                "save it as safetensors and convert that"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{self._path}: is truncated or corrupt ({error.strerror}); download it again") from None
        except (RuntimeError, EOFError, ValueError) as error:
            if "_use_new_zipfile_serialization" in str(error):
                raise CheckpointError(
                    f"{self._path}: is in torch's format from before 1.6, which cannot be read tensor by tensor; "
                    "save it as safetensors"
                ) from None
            raise CheckpointError(
                f"{self._path}: is truncated or corrupt ({str(error).splitlines()[0]}); download it again"
            ) from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{self._path}: holds a {type(content).__name__}, expected a dict of tensors")
        for name, value in content.items():
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(f"{self._path}: entry {name} is a {type(value).__name__}, expected a tensor")
        return content

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        if self._loaded is None:
            self._loaded = self._load()
        tensor = self._loaded[name].detach().clone(memory_format=torch.contiguous_format)
        self._bytes_read += tensor.numel() * tensor.element_size()
        if self._bytes_read > REOPEN_BYTES:
            self._loaded, self._bytes_read = None, 0
        return tensor
