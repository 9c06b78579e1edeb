"""A Hugging Face folder: one file, files named by an index, or every file that matches; safetensors before .bin."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from turbotriton.contract.errors import CheckpointError

from .base import Source, TensorInfo
from .safetensors_file import SafetensorsFile
from .torch_file import TorchFile

__all__ = ["FilesSource", "open_source"]


class FilesSource:
    """The tensors of several files as one checkpoint."""

    def __init__(self, files: Mapping[Path, Source]) -> None:
        self._owner: dict[str, Source] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for path, source in files.items():
            for name, info in source.tensors.items():
                if name in self._tensors:
                    raise CheckpointError(f"{path}: tensor {name}: is in {self._tensors[name].path.name} too; expected it once")
                self._owner[name] = source
                self._tensors[name] = info

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        return self._owner[name].read(name)


def open_source(path: Path) -> Source:
    """Opens the weights of a folder, or the one file that `path` names. Raises CheckpointError."""
    if path.is_file():
        return _open_file(path)
    for single, index, pattern in (
        ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (path / single).is_file():
            return _open_file(path / single)
        if (path / index).is_file():
            return _open_index(path / index)
        found = sorted(path.glob(pattern))
        if found:
            return FilesSource({file: _open_file(file) for file in found})
    raise CheckpointError(f"{path}: holds no *.safetensors and no pytorch_model*.bin; is this a model folder?")


def _open_file(path: Path) -> Source:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _open_index(path: Path) -> Source:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: is no weight index: expected a JSON object with weight_map; download it again") from None
    for tensor, name in weight_map.items():
        if not name or name != Path(str(name)).name or name in (".", ".."):
            raise CheckpointError(f"{path}: tensor {tensor}: points to {name!r}; expected a file name inside the folder")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: tensor {tensor}: points to {name}, which is missing; download it again")
    source = FilesSource({path.parent / name: _open_file(path.parent / name) for name in names})
    for tensor, name in weight_map.items():
        if tensor not in source.tensors:
            raise CheckpointError(f"{path.parent / name}: tensor {tensor}: is missing; the index {path.name} expected it here")
        if source.tensors[tensor].path.name != name:
            raise CheckpointError(
                f"{path}: tensor {tensor}: expected in {name} by the index, found in {source.tensors[tensor].path.name}"
            )
    return source
