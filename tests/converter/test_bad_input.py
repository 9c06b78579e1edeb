"""Bad input: exit code 2, one line that names file, tensor, expected and found; the destination is left as it was."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import make_checkpoint, make_tensors
from tests.converter.conftest import LLAMA

from turbotriton.cli.main import main

Q = "model.layers.1.self_attn.q_proj.weight"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def config(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))


def truncate(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Rewrites the JSON header of a safetensors file; the data stays."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    content = json.loads(raw[8 : 8 + size])
    change(content)
    text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def as_bin(folder: Path, content: object, **options: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin", **options)  # type: ignore[arg-type]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code of the checkpoint ran",))


SINGLE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing tensor": (lambda d: edit(d, lambda t: t.pop(Q)), (Q, "expected shape [64, 64]", "found in no file")),
    "missing embedding": (
        lambda d: edit(d, lambda t: t.pop("model.embed_tokens.weight")),
        ("model.embed_tokens.weight", "missing"),
    ),
    "missing head": (lambda d: edit(d, lambda t: t.pop("lm_head.weight")), ("lm_head.weight", "[301, 64]", "no file")),
    "extra tensor": (
        lambda d: edit(d, lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.zeros(3, 4)})),
        ("model.safetensors", "model.layers.0.mlp.extra.weight", "expected no such tensor", "found shape [3, 4]"),
    ),
    "a layer too many": (lambda d: config(d, num_hidden_layers=1), ("model.layers.1.", "expected no such tensor", "1 layers")),
    "one bias only": (
        lambda d: edit(d, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})),
        ("model.layers.0.self_attn.k_proj.bias", "expected shape [32]", "found in no file"),
    ),
    "wrong shape": (
        lambda d: edit(d, lambda t: t.update({Q: torch.zeros(64, 60)})),
        ("model.safetensors", Q, "expected shape [64, 64]", "found [64, 60]"),
    ),
    "wrong vocabulary": (lambda d: config(d, vocab_size=300), ("embed_tokens", "expected shape [300, 64]", "found [301, 64]")),
    "integer weights": (
        lambda d: edit(d, lambda t: t.update({Q: torch.zeros(64, 64, dtype=torch.int8)})),
        (Q, "expected float16, bfloat16 or float32", "found int8"),
    ),
    "fp8 weights": (
        lambda d: edit(d, lambda t: t.update({Q: torch.zeros(64, 64, dtype=torch.float8_e4m3fn)})),
        (Q, "found float8_e4m3fn"),
    ),
    "too large for fp16": (
        lambda d: edit(d, lambda t: t.update({Q: torch.full((64, 64), 1e6)})),
        ("w_qkv", "fp16", "1e+06", "--dtype bf16"),
    ),
    "truncated": (lambda d: truncate(d / "model.safetensors", 20_000), ("model.safetensors", "truncated", "found 20000 bytes")),
    "truncated header": (lambda d: truncate(d / "model.safetensors", 60), ("model.safetensors", "truncated", "60")),
    "empty": (lambda d: truncate(d / "model.safetensors", 0), ("model.safetensors", "truncated", "0")),
    "no safetensors": (
        lambda d: (d / "model.safetensors").write_bytes(b"<html>not found</html>" * 9),
        ("model.safetensors", "truncated"),
    ),
    "header is no JSON": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 9) + b"{broken!}" + bytes(99)),
        ("model.safetensors", "corrupt"),
    ),
    "offsets beyond the file": (
        lambda d: header(d / "model.safetensors", lambda h: h[Q].update(data_offsets=[10**9, 10**9 + 8192])),
        (Q, "truncated", "to end at byte 1000010518"),
    ),
    "negative offset": (
        lambda d: header(d / "model.safetensors", lambda h: h[Q].update(data_offsets=[-8192, 0])),
        (Q, "expected 8192 bytes"),
    ),
    "size and shape differ": (
        lambda d: header(d / "model.safetensors", lambda h: h[Q].update(shape=[64, 63])),
        (Q, "shape [64, 63]", "expected 8064 bytes", "found 8192"),
    ),
    "unknown type": (lambda d: header(d / "model.safetensors", lambda h: h[Q].update(dtype="F4")), (Q, "F4")),
    "unknown architecture": (
        lambda d: config(d, architectures=["MambaForCausalLM"]),
        ("config.json", "architectures", "LlamaForCausalLM", "'MambaForCausalLM'"),
    ),
    "no architecture": (lambda d: config(d, architectures=[]), ("config.json", "architectures", "None")),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), ("config.json", "no JSON")),
    "no config": (lambda d: (d / "config.json").unlink(), ("config.json", "cannot be read")),
    "generation config is no JSON": (
        lambda d: (d / "generation_config.json").write_text("["),
        ("generation_config.json", "no JSON"),
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ("no *.safetensors", "pytorch_model*.bin")),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ("no tokenizer.json", "--tokenizer-path")),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), ("tokenizer.json", "cannot be read")),
    "broken tokenizer.model": (
        lambda d: ((d / "tokenizer.json").unlink(), (d / "tokenizer.model").write_bytes(b"\xff" * 50)),
        ("tokenizer.model", "no SentencePiece model"),
    ),
    "added tokens of no known form": (
        lambda d: (
            (d / "tokenizer.json").unlink(),
            (d / "tokenizer.model").write_bytes(b"\x0a\x08\x0a\x01a\x15\x00\x00\x00\x00\x12\x02\x18\x02"),
            (d / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": "y"}}'),
        ),
        ("tokenizer_config.json", "added_tokens_decoder"),
    ),
    "odd head size": (lambda d: config(d, head_dim=15), ("config.json", "head_dim", "15")),
    "broken tiktoken": (
        lambda d: ((d / "tokenizer.json").unlink(), (d / "qwen.tiktoken").write_text("!!! 0\n")),
        ("qwen.tiktoken", "no tiktoken file"),
    ),
    "pickled code": (lambda d: as_bin(d, {"x": Evil()}), ("pytorch_model.bin", "unpickling", "safetensors")),
    "no dict": (lambda d: as_bin(d, [torch.zeros(1)]), ("pytorch_model.bin", "list", "dict of tensors")),
    "entry is no tensor": (lambda d: as_bin(d, {"x": 3}), ("pytorch_model.bin", "entry x", "int")),
    "old torch format": (
        lambda d: as_bin(d, {"x": torch.zeros(1)}, _use_new_zipfile_serialization=False),
        ("pytorch_model.bin", "safetensors"),
    ),
    "truncated bin": (
        lambda d: (as_bin(d, {"x": torch.zeros(9999)}), truncate(d / "pytorch_model.bin", 9000)),
        ("pytorch_model.bin", "truncated or corrupt"),
    ),
    "plain pickle": (
        lambda d: (as_bin(d, {}), (d / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))),
        ("pytorch_model.bin",),
    ),
}

SHARDED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "index points outside": (
        lambda d: index(d, lambda m: m.update({Q: "../other/model.safetensors"})),
        (Q, "../other/model.safetensors", "inside the folder"),
    ),
    "index points to an absolute path": (lambda d: index(d, lambda m: m.update({Q: "/etc/passwd"})), (Q, "'/etc/passwd'")),
    "index names no file": (lambda d: index(d, lambda m: m.update({Q: ""})), (Q, "inside the folder")),
    "shard missing": (
        lambda d: (d / "model-00002-of-00003.safetensors").unlink(),
        ("model-00002-of-00003.safetensors", "missing"),
    ),
    "shard truncated": (
        lambda d: truncate(d / "model-00003-of-00003.safetensors", 30_000),
        ("model-00003-of-00003.safetensors", "truncated", "30000"),
    ),
    "tensor not in its shard": (
        lambda d: index(d, lambda m: m.update({"made.up": "model-00001-of-00003.safetensors"})),
        ("model-00001-of-00003.safetensors", "made.up", "missing"),
    ),
    "index is no JSON": (lambda d: (d / "model.safetensors.index.json").write_text("["), ("index.json", "no weight index")),
    "index without a map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), ("index.json", "weight_map")),
    "tensor in two shards": (
        lambda d: save_file(load_file(d / "model-00001-of-00003.safetensors"), d / "model-00002-of-00003.safetensors"),
        ("model-00002-of-00003.safetensors", "expected it once"),
    ),
}


def refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Converts over an existing workspace, which must stay; returns the one line of the error."""
    destination = tmp_path / "ws"
    (destination / "triton_models" / "weights").mkdir(parents=True)
    (destination / "triton_models" / "weights" / "config.ini").write_text("[llama]\n")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    code = main(["convert", "toy", str(folder), "--dst-path", str(destination), "--overwrite", *options])
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("turbotriton: error: ")]
    assert code == 2, output.err
    assert len(lines) == 1, output.err
    assert "Traceback" not in output.err
    assert ".converting" not in lines[0], "names the user's file, not our copy of it"
    assert "code of the checkpoint ran" not in output.out
    assert sorted(tmp_path.rglob("*")) == before, "the destination is untouched and nothing is left behind"
    assert (destination / "triton_models" / "weights" / "config.ini").read_text() == "[llama]\n"
    return lines[0]


@pytest.mark.parametrize("case", SINGLE)
def test_single_file(case: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, named = SINGLE[case]
    damage(llama)
    line = refused(llama, tmp_path, capsys)
    assert [text for text in named if text not in line] == [], line


@pytest.mark.parametrize("case", SHARDED)
def test_sharded(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(LLAMA, tmp_path / "m", dtype=torch.float16, num_shards=3)
    damage, named = SHARDED[case]
    damage(folder)
    line = refused(folder, tmp_path, capsys)
    assert [text for text in named if text not in line] == [], line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--tp", "8"), ("--tp is 8", "4 attention heads")),
        (("--tp", "4"), ("--tp is 4", "2 key/value heads")),
        (("--tp", "3"), ("--tp is 3", "power of two")),
        (("--tp", "0"), ("--tp is 0", "power of two")),
        (("--group-size", "128"), ("--group-size", "int4")),
        (("--quant-path", "/nowhere"), ("--quant-path", "int4")),
        (("--model-format", "awq"), ("--group-size is 0",)),
        (("--model-format", "awq", "--group-size", "64"), ("--group-size is 64", "128")),
        (("--model-format", "awq", "--group-size", "128"), ("qweight", "missing")),
        (("--model-format", "llama"), ("params.json", "cannot be read")),
        (("--served-name", "turbomind"), ("'turbomind'", "choose another")),
        (("--served-name", "../x"), ("'../x'", "letters")),
        (("--tokenizer-path", "/nowhere"), ("/nowhere", "does not exist")),
    ],
)
def test_options(
    options: tuple[str, ...], named: tuple[str, ...], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(llama, tmp_path, capsys, *options)
    assert [text for text in named if text not in line] == [], line


def test_feed_forward_size_that_tp_does_not_divide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(LLAMA | {"intermediate_size": 97}, tmp_path / "m")
    assert "97 feed-forward size" in refused(folder, tmp_path, capsys, "--tp", "2")


@pytest.mark.parametrize(
    ("sizes", "tp", "named"),
    [
        ({"hidden_size": 480, "intermediate_size": 256}, 1, ("hidden size", "480", "128")),
        ({"hidden_size": 512, "intermediate_size": 256}, 4, ("feed-forward size a rank", "64")),
        ({"hidden_size": 512, "intermediate_size": 512, "head_dim": 16}, 1, ("attention output", "64")),
    ],
)
def test_int4_sizes_that_tiles_and_groups_do_not_divide(
    sizes: dict[str, int], tp: int, named: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = LLAMA | {"num_hidden_layers": 1, "num_key_value_heads": 4} | sizes
    folder = make_checkpoint(arch, tmp_path / "m", dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        m, k = tensors.pop(name).shape
        prefix = name.removesuffix("weight")
        tensors[prefix + "qweight"] = torch.zeros(k, m // 8, dtype=torch.int32)
        tensors[prefix + "qzeros"] = torch.zeros(k // 128, m // 8, dtype=torch.int32)
        tensors[prefix + "scales"] = torch.ones(k // 128, m)
    save_file(tensors, folder / "model.safetensors")
    options = ("--model-format", "awq", "--group-size", "128", "--tp", str(tp))
    line = refused(folder, tmp_path, capsys, *options)
    assert [text for text in (f"--tp is {tp}", *named) if text not in line] == [], line


def test_model_path_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no folder" in refused(tmp_path / "nowhere", tmp_path, capsys)


@pytest.mark.parametrize("order", ["path alone", "path first"])
def test_a_path_in_the_place_of_the_name(order: str, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(llama), *(["toy"] if order == "path first" else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"turbotriton: error: MODEL_NAME is {str(llama)!r}, which is a folder: the name comes first, then the checkpoint's folder, "
        f"such as: turbotriton convert {llama.name} {llama}"
    )


def test_baichuan_13b_is_refused_for_its_alibi(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = {"num_attention_heads": 40, "num_key_value_heads": 40, "hidden_size": 80, "intermediate_size": 32}
    arch = LLAMA | heads | {"architectures": ["BaichuanForCausalLM"], "num_hidden_layers": 1}
    assert "ALiBi" in refused(make_checkpoint(arch, tmp_path / "m"), tmp_path, capsys)


def test_meta_ranks_that_disagree(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-5}))
    torch.save({"norm.weight": torch.ones(64)}, folder / "consolidated.00.pth")
    torch.save({"norm.weight": torch.ones(64), "x": torch.ones(1)}, folder / "consolidated.01.pth")
    line = refused(folder, tmp_path, capsys, "--tokenizer-path", str(llama / "tokenizer.json"))
    assert "consolidated.01.pth" in line
    assert "tensor x" in line


def test_the_undamaged_checkpoint_converts(llama: Path, tmp_path: Path) -> None:
    """The same checkpoint, undamaged, converts: every refusal above has its own cause."""
    assert make_tensors(LLAMA)[Q].shape == (64, 64)
    assert main(["convert", "toy", str(llama), "--dst-path", str(tmp_path / "good")]) == 0


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"])
def test_random_damage_is_refused_or_harmless(name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of a header or JSON file flipped at random: converted or refused in one line, never a traceback."""
    random = Random(7)
    original = (llama / name).read_bytes()
    codes = set()
    for _ in range(40):
        raw = bytearray(original)
        for _ in range(random.randint(1, 3)):
            raw[random.randrange(min(len(raw), 1500))] = random.choice(b'0123456789[]{}:,"abcxyz-. \x00\xff')
        (llama / name).write_bytes(raw)
        codes.add(main(["convert", "toy", str(llama), "--dst-path", str(tmp_path / "ws"), "--overwrite"]))
        assert "Traceback" not in capsys.readouterr().err
    assert codes <= {0, 2}
    assert 2 in codes
