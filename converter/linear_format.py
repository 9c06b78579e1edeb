"""How a checkpoint stores its linear layers: which tensors stand for one, from config.json's quantization_config.

kind    tensors of a linear layer with k inputs and m outputs                                       weight_type
dense   weight [m, k]                                                                               fp16 bf16 fp32
awq     qweight [k, m/8], qzeros [k/g, m/8], scales [k/g, m]         (AutoAWQ, GEMM)                int4
gptq    qweight [k/8, m], qzeros [k/g, m/8], scales [k/g, m], g_idx [k]   (desc_act false)          int4
int8    weight [m, k] int8, scale [m, 1]                             (LMDeploy, compressed-tensors) int8
fp8     weight [m, k] float8 e4m3, scale [m, 1] or one number        (vLLM's, compressed-tensors)   fp8
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from turbotriton.contract.errors import CheckpointError, ConfigError

from .options import ConvertOptions
from .raw_config import ConfigFile

__all__ = ["DENSE", "LinearFormat", "find_linear_format"]

Shape = tuple[int, ...]
METHOD_OF_FORMAT = {"awq": "awq", "gptq": "gptq", "smooth_quant": "int8", "fp8": "fp8"}
SCALE_NAMES = ("scale", "weight_scale")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class LinearFormat:
    kind: str = "dense"
    group_size: int = 0  # awq, gptq
    scale_name: str = ""  # int8, fp8: the tensor's last name
    zeros_less_one: bool = False  # gptq's first format stores zero - 1

    @property
    def is_int4(self) -> bool:
        return self.kind in ("awq", "gptq")

    @property
    def main_tensor(self) -> str:
        return "qweight" if self.is_int4 else "weight"

    def tensors(
        self, rows: int, columns: int, found: Mapping[str, Shape]
    ) -> Iterator[tuple[str, Shape, tuple[torch.dtype, ...]]]:
        """(last name, shape, dtypes) that a layer of `rows` inputs and `columns` outputs must have; `found`: what it has."""
        group = self.group_size
        if self.is_int4:
            packed = (rows, columns // 8) if self.kind == "awq" else (rows // 8, columns)
            yield "qweight", packed, (torch.int32,)
            yield "qzeros", (rows // group, columns // 8), (torch.int32,)
            yield "scales", (rows // group, columns), FLOATS
            if "g_idx" in found:
                yield "g_idx", (rows,), (torch.int32,)
            return
        dtypes = {"int8": (torch.int8,), "fp8": (torch.float8_e4m3fn,)}.get(self.kind, FLOATS)
        yield "weight", (columns, rows), dtypes
        if self.scale_name:
            shape = found.get(self.scale_name, (columns, 1))
            yield self.scale_name, shape if shape in ((), (1,), (columns,)) else (columns, 1), FLOATS


DENSE = LinearFormat()


def find_linear_format(file: ConfigFile, options: ConvertOptions) -> LinearFormat:
    """From quantization_config, and --model-format where the user says it. Raises CheckpointError, ConfigError."""
    quantization = file.values.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise file.error("quantization_config", "a JSON object", quantization)
    kind = _kind(file, quantization)
    asked = METHOD_OF_FORMAT.get(options.model_format or "", "dense" if options.model_format else None)
    if asked is not None and kind is not None and asked != kind:
        raise ConfigError(
            f"--model-format is {options.model_format}, but {file.path} says quant_method {quantization['quant_method']}; "
            "leave --model-format out"
        )
    kind = kind or asked or "dense"
    if kind in ("awq", "gptq"):
        zeros_less_one = kind == "gptq" and str(quantization.get("checkpoint_format", "gptq")).lower() != "gptq_v2"
        return LinearFormat(kind, _group_size(options, file, quantization), zeros_less_one=zeros_less_one)
    if kind == "dense":
        return DENSE
    return LinearFormat(
        kind, scale_name="weight_scale" if quantization.get("quant_method") in ("fp8", "compressed-tensors") else "scale"
    )


def _kind(file: ConfigFile, quantization: Mapping[str, Any]) -> str | None:
    """None where config.json says nothing."""
    method = quantization.get("quant_method")
    if method is None:
        return None

    def require(key: str, *allowed: object) -> None:
        value = quantization.get(key, allowed[0])
        if value not in allowed:
            raise file.error(f"quantization_config.{key}", " or ".join(map(repr, allowed)), value)

    if method == "awq":
        require("bits", 4)
        require("zero_point", True)
        if str(quantization.get("version", "gemm")).lower() != "gemm":
            raise file.error("quantization_config.version", "'gemm'", quantization["version"])
        return "awq"
    if method == "gptq":
        require("bits", 4)
        require("desc_act", False)
        require("checkpoint_format", "gptq", "gptq_v2")
        return "gptq"
    if method == "smooth_quant":
        require("quant_dtype", "int8")
        return "int8"
    if method == "fp8":
        require("activation_scheme", "dynamic")
        require("weight_block_size", None)
        return "fp8"
    if method == "compressed-tensors":
        return _compressed_tensors_kind(file, quantization)
    raise file.error("quantization_config.quant_method", "awq, gptq, smooth_quant, fp8, compressed-tensors or none", method)


def _compressed_tensors_kind(file: ConfigFile, quantization: Mapping[str, Any]) -> str:
    """8 bit weights a channel (or tensor), symmetric, with activations quantised a token on the fly; all layers alike."""
    groups = quantization.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    try:
        weights, inputs = group["weights"], group["input_activations"]  # type: ignore[index]
        right = (
            (weights["num_bits"], inputs["num_bits"], weights["type"]) == (8, 8, inputs["type"])
            and weights["strategy"] in ("channel", "tensor")
            and weights.get("symmetric", True)
            and inputs["dynamic"] is True
            and inputs["strategy"] == "token"
        )
    except (KeyError, TypeError):
        right = False
    if not right:
        raise file.error("quantization_config.config_groups", "one group: 8 bit channels, dynamic tokens, symmetric", groups)
    return "fp8" if weights["type"] == "float" else "int8"


def _group_size(options: ConvertOptions, file: ConfigFile, quantization: Mapping[str, Any]) -> int:
    stated = quantization.get("group_size", quantization.get("q_group_size"))
    group_size = options.group_size or stated
    if not group_size:
        raise ConfigError("--group-size is 0 and config.json does not say it; give --group-size 128 for int4 weights")
    if stated and group_size != stated:
        raise ConfigError(f"--group-size is {group_size}, but {file.path} says {stated}; leave it out")
    if group_size != 128:
        raise ConfigError(f"--group-size is {group_size}; TurboMind's int4 format has groups of 128 only")
    return int(group_size)


def check_g_idx(name: str, g_idx: torch.Tensor, group_size: int) -> None:
    if not torch.equal(g_idx.long(), torch.arange(len(g_idx)) // group_size):
        raise CheckpointError(
            f"tensor {name}: expected inputs in order (desc_act false), found them permuted; use another quantisation"
        )
