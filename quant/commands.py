"""What each `turbotriton lite` command does. Raises our errors; a folder that a command writes is there whole or not at all."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from turbotriton.backend.ops.packing import pack_awq
from turbotriton.contract.errors import CheckpointError, ConfigError

from .awq import AwqOptions, Int4Matrix, quantize_layer
from .calibration import SITES, Calibration, ChannelStats, LayerRun
from .datasets import calibration_windows, load_text, load_tokenizer
from .export import CheckpointWriter, new_folder
from .kv_scales import write_kv_scales
from .model import SourceModel, open_model
from .smoothquant import quantize_rows, smooth_layer

__all__ = ["CalibrationOptions", "auto_awq", "calibrate", "smooth_quant", "write_kv_scales"]

logger = logging.getLogger(__name__)

DEFAULT_SEQLEN = 2048
STATS = ("max", "min", "mean", "absmax", "absmean")


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """seqlen 0: 2048, or the model's max_position_embeddings where that is smaller."""

    model: Path
    work_dir: Path
    dataset: str = "default"
    num_samples: int = 128
    seqlen: int = 0
    device: str = "cpu"
    show_progress: bool = True


def start_calibration(options: CalibrationOptions, *, with_grams: bool) -> tuple[SourceModel, Calibration]:
    model = open_model(options.model)
    limit = model.config.max_position_embeddings or DEFAULT_SEQLEN
    seqlen = options.seqlen or min(DEFAULT_SEQLEN, limit)
    if seqlen > limit:
        raise ConfigError(f"--calib-seqlen is {seqlen}, but the model's max_position_embeddings is {limit}; give at most that")
    device = _device(options.device)
    dtype = torch.float32 if device.type == "cpu" else _float_dtype(model)
    windows = calibration_windows(load_tokenizer(options.model), load_text(options.dataset), options.num_samples, seqlen)
    logger.info("%d windows of %d tokens of %s, on %s", len(windows), seqlen, options.dataset, device)
    return model, Calibration(model, windows, device, dtype, with_grams=with_grams, show_progress=options.show_progress)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {name}, but there is no CUDA device; give --device cpu")
    return device


def _float_dtype(model: SourceModel) -> torch.dtype:
    """Of what stays unquantised: bf16 where the checkpoint is, else fp16, as `convert` chooses."""
    return torch.bfloat16 if model.arch.bf16_always or model.config.dtype == "bfloat16" else torch.float16


class StatsFiles:
    """LMDeploy's four statistics files (its names and nesting; fp32, which fp16 cannot overflow)."""

    def __init__(self, model: SourceModel) -> None:
        self._model = model
        self._inputs: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in STATS}
        self._outputs: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in STATS}
        self._kv: dict[str, dict[str, dict[str, torch.Tensor]]] = {"key": defaultdict(dict), "value": defaultdict(dict)}

    def add(self, run: LayerRun) -> None:
        """Before the layer is changed."""
        model, config = self._model, self._model.config
        sizes = {part: len(weight) for part, weight in run.layer.weights.items()}
        norm_names = dict(zip(run.layer.norms, (name for name, _ in model.source_norms(run.index, run.layer)), strict=True))
        for kind in STATS:
            outputs: dict[str, torch.Tensor] = {}
            for site, parts in SITES.items():
                found = run.outputs[site].tensors()[kind]
                outputs |= dict(zip(parts, torch.split(found, [sizes[part] for part in parts]), strict=True))
            named = dict(model.source_linears(run.index, outputs))
            self._outputs[kind] |= named
            for prefix in named:
                self._inputs[kind][prefix] = run.inputs[self._site_of(prefix, run.index)].tensors()[kind]
            self._outputs[kind][norm_names["attention"]] = run.inputs["qkv"].tensors()[kind]
            self._outputs[kind][norm_names["ffn"]] = run.inputs["gate_up"].tensors()[kind]
        layer_name = model.arch.names.attention_norm.format(i=run.index).rpartition(".")[0]
        for which, stats in (("key", run.keys), ("value", run.values)):
            for kind in ("max", "min", "absmax"):
                self._kv[which][kind][layer_name] = stats.tensors()[kind].view(config.num_kv_heads, config.head_dim)

    def _site_of(self, prefix: str, layer: int) -> str:
        names = self._model.arch.names
        sites = {names.o: "o", names.w1: "gate_up", names.w3: "gate_up", names.w2: "down"}
        return next((site for name, site in sites.items() if name.format(i=layer) == prefix), "qkv")

    def write(self, folder: Path, final_norm: ChannelStats) -> None:
        for kind, tensor in final_norm.tensors().items():
            self._outputs[kind][self._model.arch.names.norm] = tensor
        torch.save(self._inputs, folder / "inputs_stats.pth")
        torch.save(self._outputs, folder / "outputs_stats.pth")
        for which, stats in self._kv.items():
            torch.save(dict(stats), folder / f"{which}_stats.pth")


@torch.inference_mode()
def calibrate(options: CalibrationOptions) -> None:
    with new_folder(options.work_dir) as folder:
        model, calibration = start_calibration(options, with_grams=False)
        stats = StatsFiles(model)
        for run in calibration.layers():
            stats.add(run)
        stats.write(folder, calibration.final_norm)


@torch.inference_mode()
def auto_awq(options: CalibrationOptions, awq: AwqOptions) -> list[str]:
    """Writes the AutoAWQ checkpoint and the four statistics files; returns the search's findings, a line a site."""
    findings: list[str] = []
    with new_folder(options.work_dir) as folder:
        model, calibration = start_calibration(options, with_grams=awq.needs_grams)
        _check_awq_sizes(model, awq.group_size)
        writer, stats = CheckpointWriter(folder, torch.float16), StatsFiles(model)
        smooth_values = model.config.num_heads == model.config.num_kv_heads
        for run in calibration.layers():
            stats.add(run)
            matrices, lines = quantize_layer(run, awq, smooth_values=smooth_values)
            findings += lines
            for name, tensor in _awq_tensors(model, run, matrices):
                writer.add(name, tensor)
            _add_rest_of_layer(writer, model, run)
        _add_shared(writer, model)
        stats.write(folder, calibration.final_norm)
        # symmetric weights carry zeros of 8, so that one kernel reads both
        writer.finish(
            model,
            {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": awq.group_size, "zero_point": True},
        )
    return findings


@torch.inference_mode()
def smooth_quant(options: CalibrationOptions, *, alpha: float, quant_dtype: str) -> None:
    """int8: LMDeploy's tensors (weight, scale); fp8: compressed-tensors' (weight, weight_scale). Statistics as with auto_awq."""
    if not 0 <= alpha <= 1:
        raise ConfigError(f"--alpha is {alpha:g}; it must be from 0 (all in the activations) to 1 (all in the weights)")
    with new_folder(options.work_dir) as folder:
        model, calibration = start_calibration(options, with_grams=False)
        writer, stats = CheckpointWriter(folder, _float_dtype(model)), StatsFiles(model)
        smooth_values = model.config.num_heads == model.config.num_kv_heads
        scale_name = "scale" if quant_dtype == "int8" else "weight_scale"
        for run in calibration.layers():
            stats.add(run)
            smooth_layer(run, alpha, smooth_values=smooth_values)
            matrices = {part: quantize_rows(weight, quant_dtype) for part, weight in run.layer.weights.items()}
            weights = {part: matrix.weight.view(torch.int8).t() for part, matrix in matrices.items()}
            for prefix, tensor in model.source_linears(run.index, weights):
                writer.add(f"{prefix}.weight", tensor.t().contiguous().view(matrices["q"].weight.dtype), keep_dtype=True)
            scales = {part: matrix.scale.t() for part, matrix in matrices.items()}
            for prefix, tensor in model.source_linears(run.index, scales):
                writer.add(f"{prefix}.{scale_name}", tensor.t(), keep_dtype=True)
            _add_rest_of_layer(writer, model, run)
        _add_shared(writer, model)
        stats.write(folder, calibration.final_norm)
        writer.finish(model, {"quant_method": "smooth_quant", "quant_dtype": "int8"} if quant_dtype == "int8" else _FP8_CONFIG)


#: What vLLM and transformers read: e4m3 weights with a scale an output, activations quantised a token on the fly.
_FP8_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
        }
    },
}


def _check_awq_sizes(model: SourceModel, group_size: int) -> None:
    if group_size < 1:
        raise ConfigError(f"--w-group-size is {group_size}; it must be positive: 128 for a workspace, others for other engines")
    config = model.config
    inputs = {
        "hidden_size": config.hidden_size,
        "num_attention_heads * head_dim": config.num_heads * config.head_dim,
        "intermediate_size": config.inter_size,
    }
    for what, size in inputs.items():
        if size % group_size:
            raise CheckpointError(
                f"{model.file.path}: {what} is {size}, no multiple of --w-group-size {group_size}; "
                "use smooth_quant for this model, or another group size"
            )
    outputs = {"num_key_value_heads * head_dim": config.num_kv_heads * config.head_dim, **inputs}
    for what, size in outputs.items():
        if size % 8:
            raise CheckpointError(f"{model.file.path}: {what} is {size}, no multiple of 8: it cannot be packed; use smooth_quant")


def _awq_tensors(model: SourceModel, run: LayerRun, matrices: dict[str, Int4Matrix]) -> Iterator[tuple[str, torch.Tensor]]:
    for field, packed in (("q", True), ("zeros", True), ("scales", False)):
        columns = {part: getattr(matrix, field).t() for part, matrix in matrices.items()}  # [in or groups, out]
        kind = {"q": "qweight", "zeros": "qzeros", "scales": "scales"}[field]
        for prefix, tensor in model.source_linears(run.index, columns):
            yield f"{prefix}.{kind}", pack_awq(tensor.contiguous()) if packed else tensor


def _add_rest_of_layer(writer: CheckpointWriter, model: SourceModel, run: LayerRun) -> None:
    """Biases and norms."""
    for prefix, tensor in model.source_linears(run.index, run.layer.biases):
        writer.add(f"{prefix}.bias", tensor)
    for prefix, tensor in model.source_norms(run.index, run.layer):
        writer.add(f"{prefix}.weight", tensor)


def _add_shared(writer: CheckpointWriter, model: SourceModel) -> None:
    for name in model.shared_tensors():
        writer.add(name, model.source.read(name))
