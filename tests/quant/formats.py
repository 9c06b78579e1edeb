"""Quantised checkpoints of the demo model, and a reader of each layout that shares no code with turbotriton."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from turbotriton.cli.main import main
from turbotriton.demo import checkpoint_path

#: name -> (lite command and its options, what convert is told)
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "awq": (("auto_awq", "--search-scale"), ("--model-format", "awq", "--group-size", "128")),
    "int8": (("smooth_quant",), ("--model-format", "smooth_quant")),
    "fp8": (("smooth_quant", "--quant-dtype", "fp8"), ("--model-format", "fp8")),
}
LINEARS = tuple(f"self_attn.{part}_proj" for part in "qkvo") + tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))


def quantise(kind: str, folder: Path, *, samples: int = 4, seqlen: int = 96, dataset: str = "default") -> Path:
    """Writes and returns `folder`."""
    command, _ = COMMANDS[kind]
    calibration = ["--device", "cpu", "--calib-samples", str(samples), "--calib-seqlen", str(seqlen), "--calib-dataset", dataset]
    assert main(["lite", command[0], str(checkpoint_path()), "--work-dir", str(folder), *command[1:], *calibration]) == 0
    return folder


def convert(checkpoint: Path, destination: Path, *options: str) -> Path:
    assert main(["convert", "demo", str(checkpoint), "--dst-path", str(destination), *options]) == 0
    return destination


def column_of(nibble: int) -> int:
    """AutoAWQ packs columns 0 2 4 6 1 3 5 7 of eight into nibbles 0 to 7."""
    return 2 * nibble if nibble < 4 else 2 * (nibble - 4) + 1


def awq_parts(tensors: dict[str, torch.Tensor], prefix: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nibbles [in, out], zeros and scales [in / group, out], word by word as AutoAWQ's GEMM kernel reads them."""
    values = []
    for kind in ("qweight", "qzeros"):
        words = tensors[f"{prefix}.{kind}"].long() & 0xFFFFFFFF
        unpacked = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.int64)
        for nibble in range(8):
            unpacked[:, column_of(nibble) :: 8] = (words >> (4 * nibble)) & 15
        values.append(unpacked)
    return values[0], values[1], tensors[f"{prefix}.scales"]


def dense_values(tensors: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """[in, out], float64, whatever the format."""
    if f"{prefix}.qweight" in tensors:
        q, zeros, scales = awq_parts(tensors, prefix)
        group_size = q.shape[0] // scales.shape[0]
        return (q - zeros.repeat_interleave(group_size, 0)).double() * scales.double().repeat_interleave(group_size, 0)
    scale = tensors[f"{prefix}.scale" if f"{prefix}.scale" in tensors else f"{prefix}.weight_scale"]
    return (tensors[f"{prefix}.weight"].double() * scale.double()).t()


def write_gptq(awq: Path, folder: Path, *, g_idx: bool = True, version: str | None = None) -> Path:
    """The values of an AWQ checkpoint as AutoGPTQ stores them: eight rows a word, zeros less one (unless gptq_v2) in order."""
    shutil.copytree(awq, folder)
    tensors = load_file(folder / "model.safetensors")
    prefixes = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert prefixes
    for prefix in prefixes:
        q, zeros, scales = awq_parts(tensors, prefix)
        rows, columns = q.shape
        words = np.zeros((rows // 8, columns), np.uint32)
        for row in range(rows):
            words[row // 8] |= (q[row].numpy() << 4 * (row % 8)).astype(np.uint32)
        stored = (zeros.numpy() - (version != "gptq_v2")) % 16
        zero_words = np.zeros((len(zeros), columns // 8), np.uint32)
        for column in range(columns):
            zero_words[:, column // 8] |= (stored[:, column] << 4 * (column % 8)).astype(np.uint32)
        tensors[f"{prefix}.qweight"] = torch.from_numpy(words.view(np.int32))
        tensors[f"{prefix}.qzeros"] = torch.from_numpy(zero_words.view(np.int32))
        if g_idx:
            tensors[f"{prefix}.g_idx"] = (torch.arange(rows) // (rows // len(scales))).int()
        tensors[f"{prefix}.bias"] = torch.zeros(columns, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_quantization(folder, {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False})
    if version:
        edit_quantization(folder, checkpoint_format=version)
    return folder


def edit_quantization(folder: Path, whole: dict[str, object] | None = None, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {**(config["quantization_config"] if whole is None else whole), **changes}
    path.write_text(json.dumps(config))
