"""Checkpoints of every family, and a way to convert one and read its files."""

import configparser
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoints import make_checkpoint, scaled_config

from turbotriton.converter.convert import ConvertOptions, convert_checkpoint

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Workspace:
    """A converted workspace: its raw files as integers, so that comparisons are of bits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.weights = root / "triton_models" / "weights"
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(self.weights / "config.ini")
        self.llama, self.ours = dict(parser["llama"]), dict(parser["turbotriton"])

    def bits(self, name: str, shape: tuple[int, ...], dtype: Any = None) -> np.ndarray:
        width = {"fp32": np.uint32}.get(self.llama["weight_type"], np.uint16)
        return np.fromfile(self.weights / name, dtype=dtype or width).reshape(shape)

    def names(self) -> set[str]:
        return {path.name for path in self.weights.iterdir()}


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The values' bits as unsigned integers of their size."""
    kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(kind).numpy().view({2: np.uint16, 4: np.uint32}[tensor.element_size()])


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Workspace]:
    def run(model_path: Path, model_name: str = "toy", *, dst: str = "ws", **options: Any) -> Workspace:
        destination = tmp_path / dst
        convert_checkpoint(
            ConvertOptions(model_name=model_name, model_path=model_path, dst_path=destination, show_progress=False, **options)
        )
        return Workspace(destination)

    return run


@pytest.fixture
def released(assets: Path) -> Callable[..., dict[str, Any]]:
    """A released model's config.json with small sizes."""

    def read(name: str, **sizes: Any) -> dict[str, Any]:
        return scaled_config(json.loads((assets / "configs" / name / "config.json").read_text()), **sizes)

    return read


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05,
    "vocab_size": 301,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small Llama with grouped-query attention and an odd vocabulary."""
    return make_checkpoint(LLAMA, tmp_path / "llama", dtype=torch.float16)
