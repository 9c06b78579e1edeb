"""`turbotriton lite auto_awq` to a served workspace: the checkpoint read without our code, the workspace's values, the engine."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.backend.plans import generate, greedy

from turbotriton.backend.ops.operands import W4A16Weight
from turbotriton.backend.ops.reference.linear import dequantized
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.backend.runner.weights import find_weights_dir, load_weights
from turbotriton.cli.main import main
from turbotriton.contract.ini import read_workspace_config
from turbotriton.demo import checkpoint_path

torch.set_num_threads(1)

CALIBRATION = ("--device", "cpu", "--calib-samples", "4", "--calib-seqlen", "96")


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq") / "checkpoint"
    assert main(["lite", "auto_awq", str(checkpoint_path()), "--work-dir", str(folder), *CALIBRATION, "--search-scale"]) == 0
    return folder


@pytest.fixture(scope="module")
def workspace(awq: Path) -> Path:
    destination = awq.parent / "workspace"
    options = ["--model-format", "awq", "--group-size", "128", "--dst-path", str(destination)]
    assert main(["convert", "demo", str(awq), *options]) == 0
    return destination


def column_of(nibble: int) -> int:
    """AutoAWQ packs columns 0 2 4 6 1 3 5 7 of eight into nibbles 0 to 7."""
    return 2 * nibble if nibble < 4 else 2 * (nibble - 4) + 1


def dequantise(tensors: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """[in, out] in float64, word by word as AutoAWQ's GEMM kernel reads them."""
    scales = tensors[f"{prefix}.scales"]
    values = {}
    for kind in ("qweight", "qzeros"):
        words = tensors[f"{prefix}.{kind}"].long() & 0xFFFFFFFF
        unpacked = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.float64)
        for nibble in range(8):
            unpacked[:, column_of(nibble) :: 8] = ((words >> (4 * nibble)) & 15).double()
        values[kind] = unpacked
    group_size = values["qweight"].shape[0] // scales.shape[0]
    widened = [t.double().repeat_interleave(group_size, dim=0) for t in (values["qzeros"], scales)]
    return (values["qweight"] - widened[0]) * widened[1]


def test_the_checkpoint_is_autoawqs_layout_and_close_to_the_original(awq: Path) -> None:
    config = json.loads((awq / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
    }
    tensors, original = load_file(awq / "model.safetensors"), load_file(checkpoint_path() / "model.safetensors")
    hidden = config["hidden_size"]
    p = "model.layers.0"
    assert tensors[f"{p}.mlp.gate_proj.qweight"].shape == (hidden, config["intermediate_size"] // 8)
    assert tensors[f"{p}.mlp.gate_proj.qweight"].dtype == tensors[f"{p}.mlp.gate_proj.qzeros"].dtype == torch.int32
    assert tensors[f"{p}.mlp.gate_proj.scales"].dtype == torch.float16
    # norm and matrix together are what they were, up to the rounding of 4 bit values
    for norm, linears in (("input_layernorm", "qkv"), ("post_attention_layernorm", ())):
        names = [f"{p}.self_attn.{x}_proj" for x in linears] or [f"{p}.mlp.gate_proj", f"{p}.mlp.up_proj"]
        for name in names:
            if name.endswith(("v_proj", "up_proj")):
                continue  # their rows carry the next matrix's scales
            wanted = original[f"{name}.weight"].double().t() * original[f"{p}.{norm}.weight"].double()[:, None]
            found = dequantise(tensors, name) * tensors[f"{p}.{norm}.weight"].double()[:, None]
            assert ((found - wanted).norm() / wanted.norm()).item() < 0.12, name


def test_the_workspace_holds_the_same_values(awq: Path, workspace: Path) -> None:
    folder = find_weights_dir(workspace)
    model = read_workspace_config(folder / "config.ini").model_config()
    assert (model.weight_type, model.group_size) == ("int4", 128)
    weights = load_weights(model, folder, torch.device("cpu"), torch.float32)
    tensors = load_file(awq / "model.safetensors")
    for i, layer in enumerate(weights.layers):
        p = f"model.layers.{i}"
        for found, names in (
            (layer.qkv.qkv, [f"{p}.self_attn.{x}_proj" for x in "qkv"]),
            (layer.output, [f"{p}.self_attn.o_proj"]),
            (layer.gate_up, [f"{p}.mlp.gate_proj", f"{p}.mlp.up_proj"]),
            (layer.down, [f"{p}.mlp.down_proj"]),
        ):
            assert isinstance(found, W4A16Weight)
            wanted = torch.cat([dequantise(tensors, name) for name in names], dim=1)
            assert torch.equal(dequantized(found, torch.float32), wanted.float())


@pytest.mark.parametrize("quant_policy", ["0", "8", "4"])
def test_the_engine_runs_the_workspace(workspace: Path, quant_policy: str) -> None:
    folder = find_weights_dir(workspace)
    config = read_workspace_config(folder / "config.ini")
    options = {"device": "cpu", "session_len": "64", "cache_max_entry_count": "8", "quant_policy": quant_policy}
    runner = ModelRunner(config.model_config(), config.engine_config(options.get), folder)
    output = generate(runner, config.model_config(), [[5, 6, 7], [30, 31]], greedy(12), num_new=12, chunk=4)
    assert all(len(ids) == 12 for ids in output.token_ids)
