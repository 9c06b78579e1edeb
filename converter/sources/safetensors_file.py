"""One .safetensors file: 8 bytes length, a JSON header, then the tensors' bytes.

Read with plain reads, not through a memory map: mapped pages count as resident, and a conversion must stay near one layer.
The header is untrusted: every offset is checked against the file's size before a tensor is read.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from turbotriton.contract.errors import CheckpointError

from .base import TensorInfo

__all__ = ["SafetensorsFile"]

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFile:
    """Raises CheckpointError from the constructor for a truncated or corrupt file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts: dict[str, int] = {}
        self._tensors: dict[str, TensorInfo] = {}
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                if size < 8 or header_size > min(MAX_HEADER_BYTES, size - 8):
                    raise CheckpointError(
                        f"{path}: is truncated or no safetensors file: the header claims {header_size} bytes, the file has {size}"
                    )
                header = json.loads(file.read(header_size))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it again") from None
        except ValueError:
            raise CheckpointError(f"{path}: is corrupt: its header is no JSON; download it again") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: is corrupt: its header is no JSON object; download it again")
        for name, entry in header.items():
            if name != "__metadata__":
                self._add(name, entry, data_start=8 + header_size, file_size=size)

    def _add(self, name: str, entry: Any, *, data_start: int, file_size: int) -> None:
        try:
            dtype = DTYPES[entry["dtype"]]
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except KeyError as error:
            raise CheckpointError(f"{self._path}: tensor {name}: unknown or missing {error} in its header entry") from None
        except (TypeError, ValueError):
            raise CheckpointError(f"{self._path}: tensor {name}: its header entry is corrupt; download the file again") from None
        expected = math.prod(shape) * dtype.itemsize
        if min((*shape, begin), default=0) < 0 or end - begin != expected:
            raise CheckpointError(
                f"{self._path}: tensor {name}: shape {list(shape)} of {entry['dtype']} expected {expected} bytes, "
                f"found {end - begin}"
            )
        if data_start + end > file_size:
            raise CheckpointError(
                f"{self._path}: is truncated: tensor {name} expected to end at byte {data_start + end}, found {file_size} bytes; "
                "download it again"
            )
        self._starts[name] = data_start + begin
        self._tensors[name] = TensorInfo(shape, dtype, self._path)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        info = self._tensors[name]
        buffer = bytearray(math.prod(info.shape) * info.dtype.itemsize)
        if not buffer:
            return torch.empty(info.shape, dtype=info.dtype)
        try:
            with open(self._path, "rb", buffering=0) as file:
                file.seek(self._starts[name])
                view, done = memoryview(buffer), 0
                while done < len(buffer):
                    count = file.readinto(view[done:])
                    if not count:
                        raise CheckpointError(f"{self._path}: tensor {name}: the file ended early; download it again")
                    done += count
                # Read once: without this the page cache of a container with a memory limit fills up.
                os.posix_fadvise(file.fileno(), self._starts[name], len(buffer), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{self._path}: tensor {name}: cannot be read ({error.strerror})") from None
        return torch.frombuffer(buffer, dtype=info.dtype).view(info.shape)
