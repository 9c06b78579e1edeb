"""Opens a checkpoint: which format, which architecture's row, which weight_type; every tensor's name and shape checked."""

from dataclasses import dataclass

from turbotriton.backend.ops.packing import TILE
from turbotriton.contract.errors import CheckpointError, ConfigError

from .archs import META_LLAMA, Architecture, find_architecture
from .assemble import SourceShape, check_source
from .options import ConvertOptions
from .raw_config import CheckpointConfig, ConfigFile
from .sources import MetaSource, Source, open_source

__all__ = ["Checkpoint", "check_tp", "open_checkpoint"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened and checked model."""

    arch: Architecture
    source: Source
    shape: SourceShape
    group_size: int  # 0: not int4
    weight_type: str

    @property
    def config(self) -> CheckpointConfig:
        return self.shape.config


def open_checkpoint(options: ConvertOptions) -> Checkpoint:
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
    if config.head_dim % 2:
        raise CheckpointError(f"{file.path}: head_dim: expected an even number (rotary pairs), found {config.head_dim}")
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
    return Checkpoint(arch, source, shape, group_size, _weight_type(arch, config, options, model_format))


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


def check_tp(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    config, tp = checkpoint.config, options.tp
    sizes = {"attention heads": config.num_heads, "key/value heads": config.num_kv_heads, "feed-forward size": config.inter_size}
    for what, size in sizes.items():
        if size % tp:
            raise ConfigError(f"--tp is {tp}; it must divide the {size} {what} of {options.model_path}")
    if not checkpoint.group_size:
        return
    # inputs of a linear come in groups, outputs in tiles; w13's outputs are covered by w2's inputs
    shares = {
        "hidden size": (config.hidden_size, checkpoint.group_size),
        "attention output a rank": (config.num_heads * config.head_dim // tp, checkpoint.group_size),
        "feed-forward size a rank": (config.inter_size // tp, checkpoint.group_size),
        "qkv size a rank": ((config.num_heads + 2 * config.num_kv_heads) * config.head_dim // tp, TILE),
    }
    for what, (size, unit) in shares.items():
        if size % unit:
            raise ConfigError(
                f"--tp is {tp}; int4 weights need a multiple of {unit} as {what}, found {size} in {options.model_path}"
            )
