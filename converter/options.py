"""What the command line asks for, checked once."""

from dataclasses import dataclass
from pathlib import Path

from turbotriton.contract.errors import ConfigError

from .repository import check_served_name

__all__ = ["ConvertOptions"]

DTYPES = ("auto", "fp16", "bf16", "fp32")
FORMATS = ("hf", "llama", "awq", "gptq", "smooth_quant", "fp8")


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
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.doors not in ("all", "text"):
            raise ConfigError(f"--doors is {self.doors!r}; it must be all or text")
        check_served_name(self.served_name or self.model_name)
