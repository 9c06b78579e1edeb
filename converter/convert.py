"""`convert_checkpoint`: a checkpoint in, a workspace out, whole or not at all.

    read config -> find the architecture's row -> check every name and shape -> write into a temporary sibling of the
    destination, layer by layer -> config.ini, tokenizer, doors, manifest -> rename

Until the rename the destination is untouched; the temporary folder is removed on every error.
"""

import fcntl
import glob
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from turbotriton.backend.ops.packing import pack_tiles
from turbotriton.contract.chat_templates import guess_template_name
from turbotriton.contract.errors import CheckpointError, ConfigError
from turbotriton.contract.ini import ModelConfig, write_workspace_config
from turbotriton.contract.layout import Storage, TensorSpec, tensor_specs

from .assemble import Assembler
from .checkpoint import Checkpoint, check_tp, open_checkpoint
from .options import ConvertOptions
from .repository import Layout, door_templates, is_workspace, write_doors
from .shard import split_ranks
from .tokenizer import write_tokenizer
from .workspace_ini import workspace_config
from .writer import WeightWriter

__all__ = ["ConvertOptions", "convert_checkpoint"]

logger = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def convert_checkpoint(options: ConvertOptions) -> Layout:
    """Raises CheckpointError for the model, ConfigError for an option or the destination; the destination is then as before."""
    if not options.model_path.is_dir():
        raise CheckpointError(f"{options.model_path}: is no folder; download the model first and give its folder")
    _check_destination(options)
    checkpoint = open_checkpoint(options)
    check_tp(checkpoint, options)
    with _new_folder(options.dst_path) as temporary:
        layout = Layout(temporary, options.served_name or options.model_name, options.doors)
        layout.weights.mkdir(parents=True)
        tokenizer = write_tokenizer(
            options.model_path,
            options.tokenizer_path,
            layout.tokenizer,
            copy_code=options.trust_remote_code,
            template_name=guess_template_name(options.model_name, str(options.model_path)),
        )
        workspace = workspace_config(checkpoint, tokenizer, options)
        _write_weights(checkpoint, workspace.model_config(), layout.weights, show_progress=options.show_progress)
        write_workspace_config(layout.weights / "config.ini", workspace)
        write_doors(layout, door_templates(), model_name=options.model_name, tp=options.tp, chat_template=tokenizer.chat_template)
        _publish(temporary, options.dst_path)
    return replace(layout, root=options.dst_path)


def _check_destination(options: ConvertOptions) -> None:
    path = options.dst_path
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"--dst-path {path}: is no folder; choose another path")
    if not path.exists() or not any(path.iterdir()):
        return
    if not is_workspace(path):
        raise ConfigError(f"--dst-path {path}: exists and is no workspace; it is never deleted, choose another path")
    if not options.overwrite:
        raise ConfigError(f"--dst-path {path}: holds a workspace; give --overwrite to replace it, or choose another path")


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A temporary sibling of `destination` (so that a rename suffices), removed unless it was renamed away."""
    parent = destination.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, destination.name)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".converting", dir=parent))
        lock = os.open(temporary, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise ConfigError(f"--dst-path {destination}: cannot be written ({error.strerror}); choose another path") from None
    try:
        yield temporary
    except OSError as error:
        raise ConfigError(f"{error.filename or destination}: {error.strerror}; nothing was converted") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path, name: str) -> None:
    """What conversions to the same destination left that were killed: a running one holds a lock on its folder."""
    for folder in parent.glob(f".{glob.escape(name)}.*.converting"):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            logger.info("removed %s, left by a conversion that was killed", folder)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _publish(temporary: Path, destination: Path) -> None:
    """The rename. An old workspace steps aside first and is deleted last."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)  # mkdtemp makes it private
    target = destination.resolve()
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        target.rename(old / "workspace")
        temporary.rename(target)
    except BaseException:  # Ctrl-C too
        if not target.exists():
            (old / "workspace").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write_weights(checkpoint: Checkpoint, model: ModelConfig, folder: Path, *, show_progress: bool) -> None:
    """Every tensor that `contract.layout` lists, one layer in memory at a time."""
    specs = {spec.name: spec for spec in tensor_specs(model)}
    assembler = Assembler(checkpoint.source, checkpoint.arch, checkpoint.shape, tp=model.tp)
    writer = WeightWriter(folder)
    started = time.monotonic()
    with tqdm(total=model.num_layers, desc="converting", unit="layer", disable=None if show_progress else True) as progress:
        for name, tensor in assembler.shared():
            _write_tensor(writer, specs.pop(name), tensor, model)
        for i in range(model.num_layers):
            for name, tensor in assembler.layer(i):
                _write_tensor(writer, specs.pop(name), tensor, model)
            speed = writer.num_bytes / 1e9 / max(time.monotonic() - started, 1e-9)
            progress.set_postfix_str(f"{writer.num_bytes / 1e9:.2f} GB, {speed:.2f} GB/s", refresh=False)
            progress.update()
    assert not specs, f"never produced: {sorted(specs)[:3]}"
    writer.finish()
    seconds = time.monotonic() - started
    logger.info(
        "%d layers, %.2f GB of %s weights in %.1f s (%.2f GB/s)",
        model.num_layers,
        writer.num_bytes / 1e9,
        model.weight_type,
        seconds,
        writer.num_bytes / 1e9 / max(seconds, 1e-9),
    )


def _write_tensor(writer: WeightWriter, spec: TensorSpec, tensor: torch.Tensor, model: ModelConfig) -> None:
    assert tuple(tensor.shape) == spec.shape, f"{spec.name}: {tuple(tensor.shape)} is not {spec.shape}"
    q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    if spec.storage is Storage.FLOAT:
        tensor = _cast(tensor, DTYPES[model.float_type], spec.name)
    for name, part in zip(spec.file_names(model.tp), split_ranks(tensor, spec.split, model.tp, q_size, kv_size), strict=True):
        writer.write(name, pack_tiles(part) if spec.storage is Storage.NIBBLES else part)


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype is torch.float16 and bool((result.isinf() & tensor.isfinite()).any()):
        raise CheckpointError(
            f"tensor {name}: expected values that fp16 can hold, found {tensor.abs().max():g}; give --dtype bf16"
        )
    return result
