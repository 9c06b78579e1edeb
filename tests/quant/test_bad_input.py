"""What a user can get wrong with `turbotriton lite` and with quantised checkpoints: one line that names it, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import make_checkpoint
from tests.converter.conftest import LLAMA
from tests.quant.formats import COMMANDS, convert, edit_quantization, quantise, write_gptq

from turbotriton.cli.main import main
from turbotriton.demo import checkpoint_path

torch.set_num_threads(1)

FAST = ("--device", "cpu", "--calib-samples", "2", "--calib-seqlen", "32")
GATE = "model.layers.1.mlp.gate_proj"


def refused(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str], *, code: int = 2) -> str:
    """The one line of the error; `folder` is as it was before."""
    before = {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
    capsys.readouterr()
    assert main(command) == code
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("turbotriton: error: ")]
    assert len(lines) == 1, output.err
    assert "Traceback" not in output.err
    assert {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")} == before
    return lines[0]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[5:6].fill_(value)


MODELS: dict[str, tuple[dict[str, int], Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    "hidden size and group size": (
        {},
        lambda d: None,
        ("auto_awq",),
        ("hidden_size is 64", "--w-group-size 128", "smooth_quant"),
    ),
    "inter size and group size": (
        {"intermediate_size": 100},
        lambda d: None,
        ("auto_awq", "--w-group-size", "32"),
        ("intermediate_size is 100", "--w-group-size 32"),
    ),
    "group size of nothing": ({}, lambda d: None, ("auto_awq", "--w-group-size", "0"), ("--w-group-size is 0",)),
    "negative group size": ({}, lambda d: None, ("auto_awq", "--w-group-size", "-16"), ("--w-group-size is -16",)),
    "odd outputs": (
        {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 48},
        lambda d: None,
        ("auto_awq", "--w-group-size", "16"),
        ("num_key_value_heads * head_dim is 12", "multiple of 8"),
    ),
    "NaN in a weight": (
        {},
        lambda d: edit(d, set_value(f"{GATE}.weight", float("nan"))),
        ("smooth_quant",),
        ("layer 1", "NaN", "gate_up"),
    ),
    "NaN while calibrating": (
        {},
        lambda d: edit(d, set_value("model.norm.weight", float("nan"))),
        ("calibrate",),
        ("model.norm.weight", "NaN"),
    ),
    "weights that fp16 cannot hold": (
        {},
        lambda d: edit(d, lambda t: t["lm_head.weight"].mul_(1e7)),
        ("auto_awq", "--w-group-size", "16"),
        ("lm_head.weight", "float16"),
    ),
    "quantised already": (
        {},
        lambda d: (d / "config.json").write_text(
            json.dumps({**json.loads((d / "config.json").read_text()), "quantization_config": {"quant_method": "awq"}})
        ),
        ("auto_awq",),
        ("quantization_config", "unquantised"),
    ),
    "too long windows": ({}, lambda d: None, ("smooth_quant", "--calib-seqlen", "300"), ("--calib-seqlen is 300", "256")),
    "no windows": ({}, lambda d: None, ("smooth_quant", "--calib-samples", "0"), ("--calib-samples is 0",)),
    "alpha past one": ({}, lambda d: None, ("smooth_quant", "--alpha", "1.5"), ("--alpha is 1.5",)),
    "no tokenizer": ({}, lambda d: (d / "tokenizer.json").unlink(), ("calibrate",), ("tokenizer",)),
    "unknown text": (
        {},
        lambda d: None,
        ("calibrate", "--calib-dataset", "nowhere.txt"),
        ("'nowhere.txt'", "default", "wikitext2"),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_and_options(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, damage, command, named = MODELS[case]
    folder = make_checkpoint({**LLAMA, **changes}, tmp_path / "m", seed=1, dtype=torch.float32)
    damage(folder)
    line = refused(["lite", command[0], str(folder), "--work-dir", str(tmp_path / "out"), *FAST, *command[1:]], tmp_path, capsys)
    assert [text for text in named if text not in line] == [], line


TEXTS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "too short": ("short.txt", b"a b c", ("tokens, fewer than --calib-seqlen 32",)),
    "empty": ("empty.txt", b"", ("holds no text",)),
    "no UTF-8": ("latin.txt", b"caf\xe9 " * 99, ("no UTF-8", "byte 3")),
    "no JSON": ("broken.jsonl", b'"fine"\n{broken\n', ("line 2", "JSON")),
    "JSON without text": ("other.jsonl", b'{"title": "x"}\n', ("line 1", "text, content")),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, named = TEXTS[case]
    (tmp_path / name).write_bytes(content)
    command = ["lite", "calibrate", str(checkpoint_path()), "--work-dir", str(tmp_path / "out"), *FAST]
    line = refused([*command, "--calib-dataset", str(tmp_path / name)], tmp_path, capsys)
    assert [text for text in (name, *named) if text not in line] == ([name] if case == "too short" else []), line


def test_a_dataset_of_the_hub_without_a_network_or_the_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    command = ["lite", "calibrate", str(checkpoint_path()), "--work-dir", str(tmp_path / "out"), *FAST]
    line = refused([*command, "--calib-dataset", "c4"], tmp_path, capsys, code=1)
    assert "pip install datasets" in line
    assert "--calib-dataset PATH" in line


def test_a_folder_that_is_not_empty_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    line = refused(["lite", "calibrate", str(checkpoint_path()), "--work-dir", str(tmp_path / "out"), *FAST], tmp_path, capsys)
    assert "not empty" in line


def test_a_cuda_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    line = refused(["lite", "calibrate", str(checkpoint_path()), "--work-dir", str(tmp_path / "out")], tmp_path, capsys)
    assert "--device is cuda" in line
    assert "--device cpu" in line


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bad")
    found = {kind: quantise(kind, root / kind, samples=2, seqlen=32) for kind in COMMANDS}
    return {**found, "gptq": write_gptq(found["awq"], root / "gptq")}


CHECKPOINTS: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    "missing zeros": ("awq", lambda d: edit(d, lambda t: t.pop(f"{GATE}.qzeros")), (), (f"{GATE}.qzeros", "found in no file")),
    "missing scales": ("int8", lambda d: edit(d, lambda t: t.pop(f"{GATE}.scale")), (), (f"{GATE}.scale", "found in no file")),
    "zeros of another group size": (
        "awq",
        lambda d: edit(d, lambda t: t.update({f"{GATE}.qzeros": torch.zeros(4, 32, dtype=torch.int32)})),
        (),
        (f"{GATE}.qzeros", "expected shape [2, 32]", "found [4, 32]"),
    ),
    "stated group size": ("awq", lambda d: edit_quantization(d, group_size=64), (), ("--group-size is 64", "128")),
    "asked and stated group size differ": ("awq", lambda d: None, ("--group-size", "64"), ("--group-size is 64", "says 128")),
    "asked format differs": ("awq", lambda d: None, ("--model-format", "fp8"), ("--model-format is fp8", "awq")),
    "symmetric weights without zeros": ("awq", lambda d: edit_quantization(d, zero_point=False), (), ("zero_point", "False")),
    "other kernel's packing": ("awq", lambda d: edit_quantization(d, version="gemv"), (), ("version", "'gemv'")),
    "three bits": ("gptq", lambda d: edit_quantization(d, bits=3), (), ("bits", "3")),
    "ordered by activation": ("gptq", lambda d: edit_quantization(d, desc_act=True), (), ("desc_act", "True")),
    "permuted all the same": (
        "gptq",
        lambda d: edit(d, lambda t: t.update({f"{GATE}.g_idx": t[f"{GATE}.g_idx"].flip(0)})),
        (),
        (f"{GATE}.g_idx", "desc_act false"),
    ),
    "unknown method": ("awq", lambda d: edit_quantization(d, quant_method="aqlm"), (), ("quant_method", "'aqlm'", "gptq")),
    "static activations": (
        "fp8",
        lambda d: edit_quantization(d, {"quant_method": "fp8", "activation_scheme": "static"}),
        (),
        ("activation_scheme", "'static'"),
    ),
    "AWQ scale that is NaN": (
        "awq",
        lambda d: edit(d, set_value(f"{GATE}.scales", float("nan"))),
        (),
        (f"{GATE}.scales", "NaN"),
    ),
    "negative scale": (
        "fp8",
        lambda d: edit(d, set_value(f"{GATE}.weight_scale", -1.0)),
        (),
        (f"{GATE}.weight_scale", "positive", "-1"),
    ),
    "scale that is NaN": (
        "int8",
        lambda d: edit(d, set_value(f"{GATE}.scale", float("nan"))),
        (),
        (f"{GATE}.scale", "positive"),
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(case: str, quantised: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, damage, options, named = CHECKPOINTS[case]
    folder = tmp_path / "m"
    shutil.copytree(quantised[kind], folder)
    damage(folder)
    line = refused(["convert", "demo", str(folder), "--dst-path", str(tmp_path / "w"), *options], tmp_path, capsys)
    assert [text for text in named if text not in line] == [], line


def test_static_scales(quantised: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = convert(checkpoint_path(), tmp_path / "w")
    other = make_checkpoint(LLAMA, tmp_path / "m", seed=1, dtype=torch.float32)
    assert main(["lite", "calibrate", str(other), "--work-dir", str(tmp_path / "s"), *FAST]) == 0
    stats = str(quantised["int8"])
    (tmp_path / "broken").mkdir()
    for name in ("key", "value"):
        (tmp_path / "broken" / f"{name}_stats.pth").write_bytes(b"no statistics")
    for command, named in (
        ([str(tmp_path / "nowhere"), str(workspace)], ("key_stats.pth", "lite calibrate")),
        ([str(tmp_path / "broken"), str(workspace)], ("key_stats.pth", "no statistics file")),
        ([str(tmp_path / "s"), str(workspace)], ("2 layers", "calibrate the model")),
        ([stats, str(workspace), "--num-tp", "2"], ("--num-tp is 2", "--tp 1")),
        ([stats, str(tmp_path / "nowhere")], ("config.ini", "convert")),
    ):
        line = refused(["lite", "kv_qparams", *command], tmp_path, capsys)
        assert [text for text in named if text not in line] == [], line


def test_scale_files_that_are_damaged_are_refused_at_load(
    quantised: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = convert(checkpoint_path(), tmp_path / "w")
    assert main(["lite", "kv_qparams", str(quantised["int8"]), str(workspace)]) == 0
    path = workspace / "triton_models/weights/layers.1.past_kv_scale.0.weight"
    report = ["lite", "report", str(workspace), str(workspace), "--text", "default", "--quant-policy", "4", "--device", "cpu"]
    good = path.read_bytes()
    for content, named in ((good[:12], "12 bytes"), (b"\0" * 16, "positive"), (None, "missing")):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        line = refused(report, tmp_path, capsys)
        assert "layers.1.past_kv_scale.0.weight" in line
        assert named in line
        path.write_bytes(good)
