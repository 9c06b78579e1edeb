"""Opens a checkpoint: which format, which architecture's row, which weight_type; every tensor's name and shape checked."""

from dataclasses import dataclass

from turbotriton.backend.ops.packing import TILE
from turbotriton.contract.errors import CheckpointError, ConfigError

from .archs import META_LLAMA, Architecture, find_architecture
from .assemble import SourceShape, check_source
from .linear_format import DENSE, LinearFormat, find_linear_format
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
    float_type: str  # of what is not quantised

    @property
    def config(self) -> CheckpointConfig:
        return self.shape.config

    @property
    def group_size(self) -> int:
        """0: not int4."""
        return self.shape.linears.group_size

    @property
    def weight_type(self) -> str:
        linears = self.shape.linears
        return self.float_type if linears.kind == "dense" else "int4" if linears.is_int4 else linears.kind


def open_checkpoint(options: ConvertOptions) -> Checkpoint:
    """Opens the weights and checks every tensor's name, shape and type."""
    folder, model_format = options.model_path, options.model_format
    if model_format is None and not (folder / "config.json").exists() and (folder / "params.json").exists():
        model_format = "llama"
    if model_format == "llama":
        arch, file, linears = META_LLAMA, ConfigFile(folder / "params.json"), DENSE
    else:
        file = ConfigFile(folder / "config.json")
        arch = find_architecture(file)
        linears = find_linear_format(file, options)
    config = arch.read_config(file)
    if config.head_dim % 2:
        raise CheckpointError(f"{file.path}: head_dim: expected an even number (rotary pairs), found {config.head_dim}")
    if arch.refuse(config):
        raise CheckpointError(f"{file.path}: {arch.name}: {arch.refuse(config)}")
    if (options.group_size and not linears.is_int4) or (options.quant_path and linears.kind == "dense"):
        option = "--group-size" if options.group_size else "--quant-path"
        raise ConfigError(f"{option} is for int4 weights; give --model-format awq with it, or leave it out")
    if model_format == "llama":
        source: Source = MetaSource(folder, config.hidden_size)
    else:
        source = open_source(options.quant_path or folder)
    shape = check_source(source, arch, config, linears)
    return Checkpoint(arch, source, shape, _float_type(arch, config, options, linears))


def _float_type(arch: Architecture, config: CheckpointConfig, options: ConvertOptions, linears: LinearFormat) -> str:
    """LMDeploy's choice on a GPU with bf16, whatever this machine has: bf16 where the checkpoint says it, else fp16."""
    if linears.is_int4:
        if options.dtype not in ("auto", "fp16"):
            raise ConfigError(f"--dtype is {options.dtype}; int4 weights come with fp16 scales, leave it out")
        return "fp16"
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
