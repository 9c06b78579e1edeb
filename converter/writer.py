"""Writes tensor files and their manifest, and checks a finished folder against it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from turbotriton.contract.errors import WorkspaceError
from turbotriton.contract.layout import MANIFEST_NAME

__all__ = ["WeightWriter", "verify_weights"]

CHUNK_BYTES = 16 * 2**20


class WeightWriter:
    """Files of one weights folder. `finish` writes the manifest; without it the folder is incomplete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, dict[str, Any]] = {}
        self.num_bytes = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Raw little-endian values in C order."""
        assert name not in self._files, f"{name} written twice"
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        digest = hashlib.sha256(data)
        with open(self._folder / name, "wb", buffering=0) as file:
            done = 0
            while done < len(data):
                done += file.write(data[done : done + CHUNK_BYTES])
        self._files[name] = {"size": len(data), "sha256": digest.hexdigest()}
        self.num_bytes += len(data)

    def finish(self) -> None:
        content = {"version": 1, "files": self._files}
        (self._folder / MANIFEST_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def verify_weights(folder: Path) -> int:
    """Hashes every file that the manifest lists and returns their number. Raises WorkspaceError naming the first bad file."""
    path = folder / MANIFEST_NAME
    try:
        files: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["files"]
        listed = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise WorkspaceError(
            f"{path}: is missing, so nothing can be verified; LMDeploy writes none, convert the model again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WorkspaceError(f"{path}: is no manifest; convert the model again") from None
    for name, (size, sha256) in tqdm(listed.items(), desc="verifying", unit="file", disable=None):
        file = folder / name
        if not file.is_file():
            raise WorkspaceError(f"{file}: is missing; expected {size} bytes; convert the model again")
        found = file.stat().st_size
        if found != size:
            raise WorkspaceError(f"{file}: expected {size} bytes by the manifest, found {found}; convert the model again")
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != sha256:
            raise WorkspaceError(f"{file}: expected sha256 {sha256[:16]}..., found {digest[:16]}...; convert the model again")
    return len(listed)
