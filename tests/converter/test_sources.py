"""The same tensors from every file format give the same workspace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.checkpoints import make_checkpoint, make_tensors
from tests.converter.conftest import LLAMA, Workspace
from tests.converter.weight_formulas import quantise

from turbotriton.converter.sources import open_source


def contents(ws: Workspace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in ws.weights.iterdir()}


def without_weights(folder: Path) -> Path:
    make_checkpoint(LLAMA, folder, dtype=torch.float16)
    (folder / "model.safetensors").unlink()
    return folder


def test_sharded_with_an_index(convert: Any, llama: Path, tmp_path: Path) -> None:
    sharded = make_checkpoint(LLAMA, tmp_path / "m", dtype=torch.float16, num_shards=3)
    assert contents(convert(sharded, dst="a")) == contents(convert(llama, dst="b"))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("with_index", [False, True])
def test_files_of_either_format_with_and_without_an_index(
    convert: Any, llama: Path, tmp_path: Path, suffix: str, with_index: bool
) -> None:
    folder, tensors = without_weights(tmp_path / "m"), make_tensors(LLAMA, 0, torch.float16)
    stem, weight_map = {".safetensors": "model", ".bin": "pytorch_model"}[suffix], {}
    for shard in range(2):
        part = {name: tensors[name] for name in sorted(tensors)[shard::2]}
        path = folder / f"{stem}-{shard + 1:05}-of-00002{suffix}"
        weight_map |= dict.fromkeys(part, path.name)
        save_file(part, path) if suffix == ".safetensors" else torch.save(part, path)
    if with_index:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert contents(convert(folder, dst="a")) == contents(convert(llama, dst="b"))


def test_safetensors_win_over_bin_and_a_single_file_over_its_neighbours(convert: Any, llama: Path) -> None:
    torch.save({"garbage": torch.zeros(3)}, llama / "pytorch_model.bin")
    save_file({"garbage": torch.zeros(3)}, llama / "consolidated.safetensors")
    convert(llama)


def test_tensors_that_carry_no_weights_are_passed_over(convert: Any, llama: Path) -> None:
    tensors = make_tensors(LLAMA, 0, torch.float16)
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    save_file(tensors, llama / "model.safetensors")
    assert not any("inv_freq" in name for name in convert(llama).names())


def test_quant_path_names_a_folder_or_a_file(convert: Any, tmp_path: Path) -> None:
    config = LLAMA | {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 1}
    folder = make_checkpoint(config, tmp_path / "m", dtype=torch.float16)
    tensors = make_tensors(config, 0, torch.float16)
    for name in [n for n in tensors if "_proj" in n]:
        columns, rows = tensors.pop(name).shape
        parts, *_ = quantise((rows, columns), 0)
        tensors |= {name.removesuffix("weight") + kind: part for kind, part in parts.items()}
    quantised = tmp_path / "q"
    quantised.mkdir()
    torch.save(tensors, quantised / "pytorch_model.bin")
    options = {"model_format": "awq", "group_size": 128}
    by_folder = contents(convert(folder, dst="a", quant_path=quantised, **options))
    assert by_folder == contents(convert(folder, dst="b", quant_path=quantised / "pytorch_model.bin", **options))
    assert "layers.0.feed_forward.w13.0.qweight" in by_folder


def test_a_tensor_read_is_the_callers_own(llama: Path, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(4)}, tmp_path / "a.bin")
    for source, name in ((open_source(llama), "model.norm.weight"), (open_source(tmp_path / "a.bin"), "x")):
        before = source.read(name).clone()
        source.read(name).zero_()
        assert torch.equal(source.read(name), before)
