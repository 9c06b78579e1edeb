"""Meta's own format: consolidated.NN.pth (or .pt), one file a model-parallel rank, beside params.json.

    column-parallel (joined on axis 0): wq wk wv w1 w3 output          row-parallel (joined on axis 1): w2 wo tok_embeddings
    everything else is equal in all ranks and taken from the first

Llama 3 shares out tok_embeddings by rows of the vocabulary (axis 0); the parts' shapes tell which.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from turbotriton.contract.errors import CheckpointError

from .base import TensorInfo
from .torch_file import TorchFile

__all__ = ["MetaSource"]

JOIN_AXIS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "w2": 1, "wo": 1, "tok_embeddings": 1}


class MetaSource:
    def __init__(self, folder: Path, hidden_size: int) -> None:
        paths = sorted(folder.glob("*.pth")) or sorted(folder.glob("*.pt"))
        if not paths:
            raise CheckpointError(f"{folder}: holds no *.pth and no *.pt; the format 'llama' expects Meta's consolidated files")
        self._shards = [TorchFile(path) for path in paths]
        self._hidden_size = hidden_size
        first = self._shards[0].tensors
        for shard, path in zip(self._shards[1:], paths[1:], strict=True):
            if shard.tensors.keys() != first.keys():
                name = sorted(shard.tensors.keys() ^ first.keys())[0]
                raise CheckpointError(
                    f"{path}: tensor {name}: expected the same tensors in every rank's file, found it in one only"
                )
        self._tensors = {name: self._joined(name) for name in first}

    def _axis(self, name: str) -> int | None:
        """Axis on which the ranks' parts are joined; None: every rank holds the whole tensor."""
        if len(self._shards) == 1:
            return None
        parts = name.split(".")
        key, kind = (parts[-2], parts[-1]) if len(parts) >= 2 else (name, "")
        axis = JOIN_AXIS.get(key)
        if axis == 1 and kind == "bias":
            return None
        if key == "tok_embeddings" and self._shards[0].tensors[name].shape[-1] == self._hidden_size:
            return 0
        return axis

    def _joined(self, name: str) -> TensorInfo:
        infos = [shard.tensors[name] for shard in self._shards]
        for info in infos[1:]:
            if info.shape != infos[0].shape:
                raise CheckpointError(
                    f"{info.path}: tensor {name}: expected shape {list(infos[0].shape)} as in {infos[0].path.name}, "
                    f"found {list(info.shape)}"
                )
        shape = list(infos[0].shape)
        axis = self._axis(name)
        if axis is not None and axis < len(shape):
            shape[axis] *= len(infos)
        return TensorInfo(tuple(shape), infos[0].dtype, infos[0].path)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        axis = self._axis(name)
        if axis is None:
            return self._shards[0].read(name)
        return torch.cat([shard.read(name) for shard in self._shards], dim=axis)
