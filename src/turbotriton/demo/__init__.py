"""The bundled demo model: a tiny chat checkpoint in Hugging Face layout, and where to find it.

`training/` makes it; nothing at run time imports that package.
"""

from pathlib import Path

__all__ = ["checkpoint_path"]


def checkpoint_path() -> Path:
    """The folder with config.json, model.safetensors (bf16), tokenizer.json, tokenizer_config.json, generation_config.json."""
    return Path(__file__).resolve().parent / "checkpoint"
