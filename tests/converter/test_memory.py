"""Memory stays near one layer, however large the checkpoint: measured in a process of its own."""

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.checkpoints import make_tokenizer
from tests.converter.conftest import LLAMA

LARGE = LLAMA | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 33,
    "vocab_size": 2048,
}
LAYER_BYTES = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096 + 2 * 1024)

SCRIPT = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from turbotriton.converter.convert import ConvertOptions, convert_checkpoint
import sentencepiece, tiktoken, tokenizers
options = ConvertOptions("toy", Path(sys.argv[1]), Path(sys.argv[2]), show_progress=False)
torch.zeros(1024, 1024, dtype=torch.float16).t().contiguous()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint(options)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def shapes() -> dict[str, list[int]]:
    h, inter = 1024, 4096
    found = {"model.embed_tokens.weight": [2048, h], "model.norm.weight": [h], "lm_head.weight": [2048, h]}
    for i in range(33):
        p = f"model.layers.{i}"
        found |= {f"{p}.input_layernorm.weight": [h], f"{p}.post_attention_layernorm.weight": [h]}
        found |= {f"{p}.self_attn.{n}_proj.weight": [h, h] for n in "qkvo"}
        found |= {f"{p}.mlp.{n}_proj.weight": [inter, h] for n in ("gate", "up")}
        found[f"{p}.mlp.down_proj.weight"] = [h, inter]
    return found


def write_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LARGE))
    make_tokenizer(2048).save(str(folder / "tokenizer.json"))


def peak_growth(folder: Path, destination: Path) -> int:
    """Bytes by which the converting process's peak resident size grew."""
    command = [sys.executable, "-c", SCRIPT, str(folder), str(destination)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    before, after = map(int, result.stdout.split()[-2:])
    return (after - before) * 1024


@pytest.mark.slow
def test_peak_memory_is_near_one_layer_on_a_gigabyte_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is sparse: its zeros cost no disk, but every page read is as resident as any other."""
    monkeypatch.setenv("PYTHONPATH", "src")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "m"
    write_folder(folder)
    header, offset = {}, 0
    for name, shape in shapes().items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    assert offset >= 1e9
    try:
        growth = peak_growth(folder, tmp_path / "ws")
    finally:
        shutil.rmtree(tmp_path / "ws", ignore_errors=True)
    # One layer is 34 MB; the rest is the tokenizer, allocator slack and the manifest.
    assert growth < 2 * LAYER_BYTES, f"{growth / 1e6:.0f} MB for layers of {LAYER_BYTES / 1e6:.0f} MB"


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_a_torch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "src")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "m"
    write_folder(folder)
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    del tensors
    try:
        growth = peak_growth(folder, tmp_path / "ws")
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    # Up to 64 MiB of the file's mapped pages stay resident between two openings.
    assert growth < 2 * LAYER_BYTES + 2 * 64 * 2**20, f"{growth / 1e6:.0f} MB"
