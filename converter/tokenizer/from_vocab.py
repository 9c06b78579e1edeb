"""tokenizer.model (SentencePiece) to a `tokenizers.Tokenizer` with the same ids."""

from pathlib import Path

from tokenizers import Tokenizer

__all__ = ["tokenizer_from_vocab"]


def tokenizer_from_vocab(folder: Path) -> Tokenizer:
    raise NotImplementedError
