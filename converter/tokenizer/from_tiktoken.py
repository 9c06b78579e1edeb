"""tiktoken ranks to a `tokenizers.Tokenizer` with the same ids."""

from pathlib import Path

from tokenizers import Tokenizer

__all__ = ["tokenizer_from_tiktoken"]


def tokenizer_from_tiktoken(path: Path) -> Tokenizer:
    raise NotImplementedError
