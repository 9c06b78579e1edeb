"""A quantised checkpoint folder: safetensors, config.json with quantization_config, the tokenizer's files; whole or not at all.

Tensors are added layer by layer and leave memory with each shard. The folder is a temporary sibling until `new_checkpoint` ends well.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from turbotriton.contract.errors import CheckpointError, ConfigError

from .model import SourceModel

__all__ = ["CheckpointWriter", "new_folder"]

SHARD_BYTES = 2 * 2**30
#: Of the source's folder: everything that is small and no weight.
COPIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.py", "LICENSE*")


class CheckpointWriter:
    def __init__(self, folder: Path, float_dtype: torch.dtype) -> None:
        self._folder, self._float_dtype = folder, float_dtype
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._pending_bytes = self._num_bytes = 0

    def add(self, name: str, tensor: torch.Tensor, *, keep_dtype: bool = False) -> None:
        """Floats are cast to the checkpoint's type unless `keep_dtype`. Raises CheckpointError for values that it cannot hold."""
        if tensor.is_floating_point() and not keep_dtype:
            tensor = cast(name, tensor, self._float_dtype)
        tensor = tensor.detach().cpu().contiguous().clone()  # safetensors refuses memory that tensors share
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > SHARD_BYTES:
            self._write_shard()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._num_bytes += size

    def _shard_name(self, number: int) -> str:
        return f"model-{number:05}.part"

    def _write_shard(self) -> None:
        save_file(self._pending, self._folder / self._shard_name(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def finish(self, model: SourceModel, quantization_config: Mapping[str, Any], **changes: Any) -> None:
        """The last shard, the index, config.json and what is copied of the source."""
        self._write_shard()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
            (self._folder / self._shard_name(number)).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        for pattern in COPIED:
            for path in sorted(model.folder.glob(pattern)):
                if path.is_file() and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, self._folder / path.name)
        if count > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        config = {**model.file.values, "quantization_config": dict(quantization_config), **changes}
        config.pop("dtype", None)
        config["torch_dtype"] = str(self._float_dtype).removeprefix("torch.")
        (self._folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = tensor.to(dtype)
    if not bool(result.isfinite().all()):
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"tensor {name}: holds NaN, or values that {kind} cannot: up to {tensor.abs().max():g}")
    return result


@contextmanager
def new_folder(work_dir: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `work_dir` when the block ends without an error. An existing one must be empty."""
    if work_dir.exists() and (not work_dir.is_dir() or any(work_dir.iterdir())):
        raise ConfigError(f"--work-dir {work_dir}: exists and is not empty; nothing is overwritten, choose another folder")
    parent = work_dir.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{work_dir.name}.", suffix=".writing", dir=parent))
    except OSError as error:
        raise ConfigError(f"--work-dir {work_dir}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        if work_dir.exists():
            work_dir.rmdir()
        temporary.rename(work_dir.resolve())
    except OSError as error:
        raise ConfigError(f"--work-dir {work_dir}: {error.filename or ''} {error.strerror}; nothing was written") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
