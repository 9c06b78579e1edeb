"""`turbotriton lite` to a workspace to the engine: each checkpoint read without our code, the loaded values, what the engine says."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.backend.plans import generate, greedy
from tests.converter.conftest import Workspace
from tests.converter.weight_formulas import Shape, check_int4, qkv_source
from tests.quant.formats import COMMANDS, LINEARS, awq_parts, convert, dense_values, quantise, write_gptq

from turbotriton.backend.ops.operands import Fp8Weight, LinearWeight, W4A16Weight, W8A8Weight
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.backend.runner.weights import find_weights_dir, load_weights
from turbotriton.cli.main import main
from turbotriton.contract.ini import read_workspace_config
from turbotriton.demo import checkpoint_path

torch.set_num_threads(1)

Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root, made = tmp_path_factory.mktemp("quant"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = quantise(kind, root / kind)
        return made[kind]

    return get


def loaded_values(weight: LinearWeight) -> torch.Tensor:
    """[in, out], float64, from what the ops take."""
    if isinstance(weight, W4A16Weight):
        q = torch.stack((weight.qweight & 15, weight.qweight >> 4), 1).flatten(0, 1).double()
        zeros, scales = (t.double().repeat_interleave(weight.group_size, 0) for t in (weight.zeros, weight.scales))
        return (q - zeros) * scales
    assert isinstance(weight, W8A8Weight | Fp8Weight)
    return weight.weight.double() * weight.scale.double()


@pytest.mark.parametrize("tp", ["1", "2"])
@pytest.mark.parametrize("kind", COMMANDS)
def test_the_workspace_holds_the_checkpoints_values(checkpoints: Checkpoints, kind: str, tp: str, tmp_path: Path) -> None:
    workspace = convert(checkpoints(kind), tmp_path / "w", *COMMANDS[kind][1], "--tp", tp)
    folder = find_weights_dir(workspace)
    model = read_workspace_config(folder / "config.ini").model_config()
    assert model.weight_type == {"awq": "int4"}.get(kind, kind)
    weights = load_weights(model, folder, torch.device("cpu"), torch.float32)
    tensors = load_file(checkpoints(kind) / "model.safetensors")
    for i, layer in enumerate(weights.layers):
        q, k, v, o, gate, up, down = (f"model.layers.{i}.{name}" for name in LINEARS)
        for found, names in (
            (layer.qkv.qkv, (q, k, v)),
            (layer.output, (o,)),
            (layer.gate_up, (gate, up)),
            (layer.down, (down,)),
        ):
            assert torch.equal(loaded_values(found), torch.cat([dense_values(tensors, name) for name in names], dim=1)), names
        assert torch.equal(layer.ffn_norm.weight, tensors[f"model.layers.{i}.post_attention_layernorm.weight"].float())


def test_an_awq_checkpoint_is_autoawqs_layout(checkpoints: Checkpoints) -> None:
    config = json.loads((checkpoints("awq") / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
    }
    tensors = load_file(checkpoints("awq") / "model.safetensors")
    original = load_file(checkpoint_path() / "model.safetensors")
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"qweight": (hidden, inter // 8), "qzeros": (hidden // 128, inter // 8), "scales": (hidden // 128, inter)}
    for kind, shape in shapes.items():
        tensor = tensors[f"model.layers.0.mlp.gate_proj.{kind}"]
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == (torch.float16 if kind == "scales" else torch.int32)
    assert tensors["model.embed_tokens.weight"].shape == (vocab, hidden)
    assert not any(name.endswith("proj.weight") for name in tensors)
    # norm and matrix together are what they were, up to the rounding of 4 bit values; v's and up's rows carry scales
    for norm, names in (("input_layernorm", LINEARS[:2]), ("post_attention_layernorm", LINEARS[4:5])):
        for name in (f"model.layers.0.{name}" for name in names):
            gains = (original[f"model.layers.0.{norm}.weight"], tensors[f"model.layers.0.{norm}.weight"])
            wanted = original[f"{name}.weight"].double().t() * gains[0].double()[:, None]
            found = dense_values(tensors, name) * gains[1].double()[:, None]
            assert ((found - wanted).norm() / wanted.norm()).item() < 0.12, name


def test_int8_and_fp8_checkpoints_have_their_tensors(checkpoints: Checkpoints) -> None:
    for kind, scale, dtype in (("int8", "scale", torch.int8), ("fp8", "weight_scale", torch.float8_e4m3fn)):
        tensors = load_file(checkpoints(kind) / "model.safetensors")
        for name in (f"model.layers.2.{name}" for name in LINEARS):
            weight = tensors[f"{name}.weight"]
            assert weight.dtype == dtype
            assert tensors[f"{name}.{scale}"].dtype == torch.float32
            assert tensors[f"{name}.{scale}"].shape == (weight.shape[0], 1)
    assert (
        json.loads((checkpoints("fp8") / "config.json").read_text())["quantization_config"]["quant_method"]
        == "compressed-tensors"
    )


def test_the_tiles_are_lmdeploys_bit_for_bit(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Index formulas over the values that the independent reader finds in the checkpoint."""
    ws = Workspace(convert(checkpoints("awq"), tmp_path / "w", *COMMANDS["awq"][1]))
    tensors = load_file(checkpoints("awq") / "model.safetensors")
    config = json.loads((checkpoints("awq") / "config.json").read_text())
    heads, kv_heads, hidden = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    shape = Shape(hidden, heads, kv_heads, 128, config["intermediate_size"], config["vocab_size"], 1)
    for i in range(config["num_hidden_layers"]):
        q, k, v, o, gate, up, down = (
            [part.numpy() for part in awq_parts(tensors, f"model.layers.{i}.{name}")] for name in LINEARS
        )
        places = [qkv_source(column, 0, shape) for column in range((heads + 2 * kv_heads) * 128)]
        qkv = [np.stack([{"q": q, "k": k, "v": v}[part][kind][:, row] for part, row in places], axis=1) for kind in range(3)]
        w13 = [np.stack([part[kind][:, c] for c in range(gate[0].shape[1]) for part in (gate, up)], axis=1) for kind in range(3)]
        for name, parts in (("attention.w_qkv", qkv), ("attention.wo", o), ("feed_forward.w13", w13), ("feed_forward.w2", down)):
            check_int4(ws, f"layers.{i}.{name}", 0, parts[0], parts[1], torch.from_numpy(parts[2]))


@pytest.mark.parametrize(("g_idx", "version"), [(True, None), (False, "gptq"), (True, "gptq_v2")])
def test_gptq_with_the_same_values_gives_the_same_files(
    checkpoints: Checkpoints, tmp_path: Path, g_idx: bool, version: str | None
) -> None:
    gptq = write_gptq(checkpoints("awq"), tmp_path / "gptq", g_idx=g_idx, version=version)
    folders = [
        find_weights_dir(convert(checkpoints("awq"), tmp_path / "a", *COMMANDS["awq"][1])),
        find_weights_dir(convert(gptq, tmp_path / "g", "--model-format", "gptq")),
    ]
    names = {path.name for path in folders[0].iterdir()}
    assert names == {path.name for path in folders[1].iterdir()}
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("quant_policy", ["0", "8", "4", "16"])
def test_the_engine_answers_a_batch_as_it_answers_each_prompt_alone(
    checkpoints: Checkpoints, kind: str, quant_policy: str, tmp_path: Path
) -> None:
    """Chunked prefill and decode together against each prompt in one piece: 8 and 4 bit keys must not depend on either."""
    folder = find_weights_dir(convert(checkpoints(kind), tmp_path / "w", *COMMANDS[kind][1]))
    config = read_workspace_config(folder / "config.ini")
    options = {"device": "cpu", "session_len": "64", "cache_max_entry_count": "8", "quant_policy": quant_policy}
    runner = ModelRunner(config.model_config(), config.engine_config(options.get), folder)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [30, 31], [400, 3, 77, 9]]
    together = generate(runner, config.model_config(), prompts, greedy(12), num_new=12, chunk=4)
    for ids, prompt in zip(together.token_ids, prompts, strict=True):
        alone = generate(runner, config.model_config(), [prompt], greedy(12), num_new=12, chunk=64)
        assert ids == alone.token_ids[0]
        assert len(ids) == 12


def test_static_scales_reach_the_pages(checkpoints: Checkpoints, tmp_path: Path) -> None:
    from turbotriton.backend.ops.operands import StaticInt8Pages

    for symmetric, size in ((False, 16), (True, 8)):
        folder = find_weights_dir(convert(checkpoint_path(), tmp_path / f"w{size}"))
        command = ["lite", "kv_qparams", str(checkpoints("int8")), str(tmp_path / f"w{size}"), *(["--kv-sym"] * symmetric)]
        assert main(command) == 0
        files = sorted(folder.glob("layers.*.past_kv_scale.0.weight"))
        assert [file.stat().st_size for file in files] == [size] * 3
        config = read_workspace_config(folder / "config.ini")
        options = {"device": "cpu", "session_len": "64", "cache_max_entry_count": "4", "quant_policy": "4"}
        runner = ModelRunner(config.model_config(), config.engine_config(options.get), folder)
        pages = runner._kv.k[2]
        assert isinstance(pages, StaticInt8Pages)
        numbers = np.fromfile(files[2], dtype="<f4")
        assert float(pages.scale[0]) == float(numbers[0])
        assert float(pages.zero[1]) == (0.0 if symmetric else float(numbers[1]))
