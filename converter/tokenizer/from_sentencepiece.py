"""tokenizer.model (SentencePiece) to a `tokenizers.Tokenizer` with the same ids."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

__all__ = ["tokenizer_from_sentencepiece"]


def tokenizer_from_sentencepiece(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    raise NotImplementedError
