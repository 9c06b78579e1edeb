"""`convert_checkpoint`: a checkpoint in, a workspace out, whole or not at all.

    read config -> find the architecture's row -> check every name and shape -> write into a temporary sibling of the
    destination, layer by layer -> config.ini, tokenizer, doors, manifest -> rename

Until the rename the destination is untouched; the temporary folder is removed on every error.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from turbotriton.contract.chat_templates import template_session_len
from turbotriton.contract.errors import CheckpointError, ConfigError
from turbotriton.contract.ini import LlamaSection, ModelConfig, TurbotritonSection, WorkspaceConfig, write_workspace_config
from turbotriton.contract.layout import Storage, TensorSpec, tensor_specs

from .archs import META_LLAMA, Architecture, find_architecture
from .assemble import Assembler, SourceShape, check_source
from .int4 import TILE, pack_tiles
from .raw_config import CheckpointConfig, ConfigFile
from .repository import Layout, check_served_name, door_templates, is_workspace, write_doors
from .shard import split_ranks
from .sources import MetaSource, Source, open_source
from .tokenizer import TokenizerFolder, write_tokenizer
from .writer import WeightWriter

__all__ = ["ConvertOptions", "convert_checkpoint"]

logger = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = ("hf", "llama", "awq")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The command line's values; `""`, 0 and None mean: choose."""

    model_name: str
    model_path: Path
    dst_path: Path
    model_format: str | None = None
    tp: int = 1
    tokenizer_path: Path | None = None
    quant_path: Path | None = None
    group_size: int = 0
    dtype: str = "auto"
    served_name: str = ""
    doors: str = "all"
    trust_remote_code: bool = False
    overwrite: bool = False
    show_progress: bool = True

    def __post_init__(self) -> None:
        if not self.model_name.strip() or self.model_name != self.model_name.strip() or "\n" in self.model_name:
            raise ConfigError(f"MODEL_NAME is {self.model_name!r}; give a name without spaces around it")
        if self.tp < 1 or self.tp & (self.tp - 1):
            raise ConfigError(f"--tp is {self.tp}; it must be a power of two")
        if self.model_format not in (None, *FORMATS):
            raise ConfigError(f"--model-format is {self.model_format!r}; it must be one of {', '.join(FORMATS)}")
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(f"--dtype is {self.dtype!r}; it must be one of auto, {', '.join(DTYPES)}")
        if self.doors not in ("all", "text"):
            raise ConfigError(f"--doors is {self.doors!r}; it must be all or text")
        check_served_name(self.served_name or self.model_name)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """An opened and checked model."""

    arch: Architecture
    source: Source
    shape: SourceShape
    group_size: int  # 0: not int4
    weight_type: str

    @property
    def config(self) -> CheckpointConfig:
        return self.shape.config


def convert_checkpoint(options: ConvertOptions) -> Layout:
    """Raises CheckpointError for the model, ConfigError for an option or the destination; the destination is then as before."""
    if not options.model_path.is_dir():
        raise CheckpointError(f"{options.model_path}: is no folder; download the model first and give its folder")
    _check_destination(options)
    checkpoint = _open(options)
    _check_tp(checkpoint, options)
    with _new_folder(options.dst_path) as temporary:
        layout = Layout(temporary, options.served_name or options.model_name, options.doors)
        layout.weights.mkdir(parents=True)
        tokenizer = write_tokenizer(
            options.model_path, options.tokenizer_path, layout.tokenizer, copy_code=options.trust_remote_code
        )
        workspace = _workspace_config(checkpoint, tokenizer, options)
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
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".converting", dir=parent))
    except OSError as error:
        raise ConfigError(f"--dst-path {destination}: cannot be written ({error.strerror}); choose another path") from None
    try:
        yield temporary
    except OSError as error:
        raise ConfigError(f"{error.filename or destination}: {error.strerror}; nothing was converted") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    target.rename(old / "workspace")
    try:
        temporary.rename(target)
    except OSError:
        (old / "workspace").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _open(options: ConvertOptions) -> _Checkpoint:
    """Opens the weights and checks every tensor's name, shape and type."""
    folder, model_format = options.model_path, options.model_format
    if model_format is None and not (folder / "config.json").exists() and (folder / "params.json").exists():
        model_format = "llama"
    if model_format == "llama":
        arch, file = META_LLAMA, ConfigFile(folder / "params.json")
    else:
        file = ConfigFile(folder / "config.json")
        arch = find_architecture(file)
        model_format = _quantised_format(file, model_format)
    config = arch.read_config(file)
    if arch.refuse(config):
        raise CheckpointError(f"{file.path}: {arch.name}: {arch.refuse(config)}")
    group_size = _group_size(options, file) if model_format == "awq" else 0
    if model_format != "awq" and (options.group_size or options.quant_path):
        option = "--group-size" if options.group_size else "--quant-path"
        raise ConfigError(f"{option} is for int4 weights; give --model-format awq with it, or leave it out")
    if model_format == "llama":
        source: Source = MetaSource(folder, config.hidden_size)
    else:
        source = open_source(options.quant_path or folder)
    shape = check_source(source, arch, config, group_size)
    return _Checkpoint(arch, source, shape, group_size, _weight_type(arch, config, options, model_format))


def _quantised_format(file: ConfigFile, model_format: str | None) -> str:
    """hf or awq, from quantization_config where the user did not say."""
    quantization = file.values.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    method = quantization.get("quant_method")
    if method not in (None, "awq"):
        raise file.error("quantization_config.quant_method", "awq or no quantization", method)
    if method == "awq":
        for key, expected in (("bits", 4), ("zero_point", True)):
            if quantization.get(key, expected) != expected:
                raise file.error(f"quantization_config.{key}", repr(expected), quantization[key])
        if str(quantization.get("version", "gemm")).lower() != "gemm":
            raise file.error("quantization_config.version", "'gemm'", quantization["version"])
        if model_format == "hf":
            raise ConfigError(f"--model-format is hf, but {file.path} says quant_method awq; give --model-format awq")
    return model_format or ("awq" if method else "hf")


def _group_size(options: ConvertOptions, file: ConfigFile) -> int:
    quantization = file.values.get("quantization_config") or {}
    stated = quantization.get("group_size", quantization.get("q_group_size")) if isinstance(quantization, dict) else None
    group_size = options.group_size or stated
    if not group_size:
        raise ConfigError("--group-size is 0 and config.json does not say it; give --group-size 128 for int4 weights")
    if stated and group_size != stated:
        raise ConfigError(f"--group-size is {group_size}, but {file.path} says {stated}; leave it out")
    if group_size != 128:
        raise ConfigError(f"--group-size is {group_size}; TurboMind's int4 format has groups of 128 only")
    return int(group_size)


def _weight_type(arch: Architecture, config: CheckpointConfig, options: ConvertOptions, model_format: str) -> str:
    """LMDeploy's choice on a GPU with bf16, whatever this machine has: bf16 where the checkpoint says it, else fp16."""
    if model_format == "awq":
        if options.dtype not in ("auto", "fp16"):
            raise ConfigError(f"--dtype is {options.dtype}; int4 weights come with fp16 scales, leave it out")
        return "int4"
    if options.dtype != "auto":
        return options.dtype
    return "bf16" if arch.bf16_always or config.dtype == "bfloat16" else "fp16"


def _check_tp(checkpoint: _Checkpoint, options: ConvertOptions) -> None:
    config, tp = checkpoint.config, options.tp
    sizes = {"attention heads": config.num_heads, "key/value heads": config.num_kv_heads, "feed-forward size": config.inter_size}
    for what, size in sizes.items():
        if size % tp:
            raise ConfigError(f"--tp is {tp}; it must divide the {size} {what} of {options.model_path}")
    if checkpoint.group_size:
        qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        split_rows = {"attention output": config.num_heads * config.head_dim, "feed-forward": config.inter_size}
        for what, size in {**split_rows, "qkv": qkv, "hidden": config.hidden_size}.items():
            share = size if what == "hidden" else size // tp
            if share % TILE or (what in split_rows and share % checkpoint.group_size):
                raise ConfigError(
                    f"--tp is {tp}; int4 weights need an {what} size a rank in multiples of "
                    f"{checkpoint.group_size if what in split_rows else TILE}, found {share}"
                )


def _workspace_config(checkpoint: _Checkpoint, tokenizer: TokenizerFolder, options: ConvertOptions) -> WorkspaceConfig:
    config, rope = checkpoint.config, checkpoint.config.rope
    start_id, end_id, end_ids = _token_ids(checkpoint, tokenizer, options)
    template_len = template_session_len(options.model_name)
    llama = LlamaSection(
        model_name=options.model_name,
        tensor_para_size=options.tp,
        head_num=config.num_heads,
        kv_head_num=config.num_kv_heads,
        vocab_size=config.vocab_size,
        num_layer=config.num_layers,
        inter_size=config.inter_size,
        norm_eps=config.norm_eps,
        attn_bias=int(checkpoint.shape.attn_bias),
        start_id=start_id,
        end_id=end_id,
        session_len=template_len + 8 if template_len else config.max_position_embeddings or 2048,
        weight_type=checkpoint.weight_type,
        rotary_embedding=config.head_dim,
        rope_theta=config.rope_theta,
        size_per_head=config.head_dim,
        group_size=checkpoint.group_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_scaling_factor=rope.factor,
        use_dynamic_ntk=int(config.use_dynamic_ntk),
        use_logn_attn=int(config.use_logn_attn),
    )
    ours = TurbotritonSection(
        hidden_size=config.hidden_size,
        end_ids=",".join(map(str, end_ids)),
        tie_word_embeddings=int(checkpoint.shape.tied_head),
        qk_norm=int(checkpoint.arch.qk_norm),
        sliding_window=config.sliding_window,
        rope_scaling_type=_stated_rope_scaling(llama, rope.type),
        original_max_position_embeddings=rope.original_max_position_embeddings,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        attention_factor=rope.attention_factor,
        yarn_truncate=int(rope.truncate),
    )
    return WorkspaceConfig(llama, ours)


def _stated_rope_scaling(llama: LlamaSection, wanted: str) -> str:
    """Empty where `[llama]` says it already, so that LMDeploy's rope keys stay the ones to edit."""
    implied = WorkspaceConfig(llama).model_config().rope.scaling_type
    return "" if implied == wanted else wanted


def _token_ids(checkpoint: _Checkpoint, tokenizer: TokenizerFolder, options: ConvertOptions) -> tuple[int, int, list[int]]:
    """(start_id, end_id, every id that ends a turn). The tokenizer says the first two, as in LMDeploy; generation_config.json,
    else config.json, adds to the third."""
    generation = options.model_path / "generation_config.json"
    stated = ConfigFile(generation).token_ids("eos_token_id") if generation.is_file() else ()
    others = stated or checkpoint.config.eos_token_ids
    if checkpoint.arch.token_ids:
        start, end = checkpoint.arch.token_ids
    else:
        found_start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else checkpoint.config.bos_token_id
        found_end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(others), None)
        if found_end is None:
            raise CheckpointError(
                f"{options.model_path}: eos token: expected in tokenizer_config.json, generation_config.json or "
                "config.json, found none"
            )
        start, end = found_start if found_start is not None else 0, found_end
    return start, end, list(dict.fromkeys((end, *others)))


def _write_weights(checkpoint: _Checkpoint, model: ModelConfig, folder: Path, *, show_progress: bool) -> None:
    """Every tensor that `contract.layout` lists, one layer in memory at a time."""
    specs = {spec.name: spec for spec in tensor_specs(model)}
    assembler = Assembler(checkpoint.source, checkpoint.arch, checkpoint.shape, tp=model.tp, int4=bool(checkpoint.group_size))
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
        tensor = _cast(tensor, DTYPES.get(model.weight_type, torch.float16), spec.name)
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
