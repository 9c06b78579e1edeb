"""vocab.json and merges.txt (byte-level BPE) to a `tokenizers.Tokenizer`.

The two files do not say how text is cut before the merges; tokenizer_class in tokenizer_config.json does, and transformers knows
the cut of each class.
"""

from pathlib import Path

from tokenizers import Tokenizer

from turbotriton.contract.errors import CheckpointError

__all__ = ["tokenizer_from_vocab"]


def tokenizer_from_vocab(folder: Path) -> Tokenizer:
    """`folder` holds vocab.json, merges.txt, tokenizer_config.json. The checkpoint's code is not run. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(
            f"{folder}/vocab.json: cannot be converted to tokenizer.json ({str(error).splitlines()[0]}); "
            "give a tokenizer.json by --tokenizer-path"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise CheckpointError(f"{folder}/vocab.json: transformers has no fast tokenizer for it; give a tokenizer.json")
    return backend
