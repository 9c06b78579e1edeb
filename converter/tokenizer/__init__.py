"""The workspace's tokenizer folder: the checkpoint's files, and always a tokenizer.json, so that doors need `tokenizers` only."""

from .folder import TokenizerFolder, write_tokenizer

__all__ = ["TokenizerFolder", "write_tokenizer"]
