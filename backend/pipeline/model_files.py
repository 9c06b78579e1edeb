"""From MODEL_PATH to a workspace's weights and tokenizer.

    workspace (of `turbotriton convert` or LMDeploy)   as it is
    folder of a checkpoint                             converted once into the cache, then found there
    anything that is no path                           a hub id: downloaded first (`converter/hub.py`)

    <cache>/workspaces/<key>/      a converted checkpoint
                      <key>.lock   held exclusively while it is made or removed, shared while it is read

The key is a hash of the checkpoint's path, of the content of its small files, of the size and time of change of its large ones, and
of the options and the version that convert it: a checkpoint that changes is converted again. The KEPT_WORKSPACES used last stay.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import turbotriton
from turbotriton.contract import env
from turbotriton.contract.chat_templates import guess_template_name, template_session_len
from turbotriton.contract.errors import CheckpointError, WorkspaceError
from turbotriton.contract.ini import read_workspace_config

from .options import EngineOptions

__all__ = ["ModelFiles", "open_model"]

logger = logging.getLogger(__name__)

SMALL_FILE_BYTES = 1 << 20
KEPT_WORKSPACES = 3


@dataclass(slots=True)
class ModelFiles:
    """Use as a context manager while reading: until then nobody removes the files.

    template_name: the chat template's row by the model's name or path, or None.
    """

    weights: Path
    tokenizer: Path
    name: str
    template_name: str | None = None
    lock: int | None = None  # a descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def open_model(model_path: str | os.PathLike[str], options: EngineOptions) -> ModelFiles:
    """`options.model_name`: a template's name. Raises CheckpointError, WorkspaceError, ConfigError."""
    from turbotriton.converter.hub import local_model_path
    from turbotriton.converter.repository import find_weights

    path = local_model_path(model_path, revision=options.revision, download_dir=options.download_dir)
    if not path.is_dir():
        raise CheckpointError(f"{path}: is no folder; give a workspace, a checkpoint's folder, or a hub id")
    if find_weights(path) is None:
        return _open_checkpoint(path, str(model_path), options)
    files = _workspace_files(path)
    if options.model_name is not None:
        files.name = options.model_name
    files.template_name = guess_template_name(files.name, str(path))
    return files


def _workspace_files(root: Path) -> ModelFiles:
    from turbotriton.converter.repository import find_weights

    weights = find_weights(root)
    assert weights is not None
    return ModelFiles(weights, _find_tokenizer(root, weights), read_workspace_config(weights / "config.ini").llama.model_name)


def _find_tokenizer(root: Path, weights: Path) -> Path:
    repositories = [root / "model_repository"]
    version = weights.resolve().parent
    if version.name == "1":  # <repository>/<door>/1/weights
        repositories.append(version.parent.parent)
    places = [root / "triton_models" / "tokenizer", weights.parent / "tokenizer"]
    places += [place for repository in repositories for place in sorted(repository.glob("*/1/tokenizer"))]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise WorkspaceError(
            f"{root}: holds weights but no tokenizer; give the workspace's own folder, or convert the model again"
        )
    return found


def _open_checkpoint(path: Path, asked: str, options: EngineOptions) -> ModelFiles:
    root = env.cache_dir() / "workspaces"
    root.mkdir(parents=True, exist_ok=True)
    key = _key(path, options)
    workspace, lock_path = root / key, root / f"{key}.lock"
    while True:
        lock = _lock(lock_path, fcntl.LOCK_SH)
        if workspace.is_dir():
            break
        os.close(lock)
        exclusive = _lock(lock_path, fcntl.LOCK_EX)
        try:
            if not workspace.is_dir():
                _convert(path, workspace, options)
        finally:
            os.close(exclusive)
    try:
        os.utime(lock_path)
        _remove_old(root)
        files = _workspace_files(workspace)
    except BaseException:
        os.close(lock)
        raise
    files.lock = lock
    files.name = options.model_name or Path(asked).name or asked
    files.template_name = guess_template_name(options.model_name or "", asked)
    return files


def _convert(path: Path, workspace: Path, options: EngineOptions) -> None:
    from turbotriton.converter.convert import ConvertOptions, convert_checkpoint

    logger.info("converting %s into %s", path, workspace)
    name = options.model_name if options.model_name and template_session_len(options.model_name) else "model"
    convert_checkpoint(
        ConvertOptions(
            model_name=name,
            model_path=path,
            dst_path=workspace,
            model_format=options.model_format,
            served_name="model",
            doors="text",
            overwrite=True,
        )
    )


def _key(path: Path, options: EngineOptions) -> str:
    digest = hashlib.sha256(
        repr((str(path.resolve()), options.model_name, options.model_format, turbotriton.__version__)).encode()
    )
    for file in sorted(path.iterdir()):
        if file.is_file():
            stat = file.stat()
            digest.update(repr((file.name, stat.st_size)).encode())
            digest.update(file.read_bytes() if stat.st_size <= SMALL_FILE_BYTES else repr(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:32]


def _remove_old(root: Path) -> None:
    """All but the KEPT_WORKSPACES used last, leaving alone what another process reads."""
    locks = sorted(root.glob("*.lock"), key=lambda lock: lock.stat().st_mtime, reverse=True)
    for path in locks[KEPT_WORKSPACES:]:
        with open(path, "a", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)


def _lock(path: Path, kind: int) -> int:
    """The descriptor of a locked file that others may remove meanwhile: then it is made and locked again."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, kind)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        os.close(descriptor)
