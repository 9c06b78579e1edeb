"""Writes a workspace of random weights that tritonserver serves: make_checkpoint.py's files, a tokenizer of made-up words, the doors.

    PYTHONPATH=src python3 tests/bench/make_workspace.py --shape 1.8b --out /dev/shm/1.8b-workspace [--dtype bf16]

Weights lie in OUT/model_repository/turbomind/1/weights, which bench_engine.py takes as --model. No id ends an answer: the end id lies
outside the vocabulary, because tokens of random weights must not end one early, and the `turbomind` door cannot be told to ignore it.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from make_checkpoint import DTYPES, SHAPES, make_checkpoint, workspace_config

from turbotriton.contract.ini import write_workspace_config
from turbotriton.converter.repository import Layout, door_templates, write_doors

__all__ = ["make_workspace"]

SPECIAL = ("<unk>", "<s>", "</s>")
NUM_BYTES = 256


def make_workspace(shape: str, root: Path, dtype: str = "bf16", session_len: int = 8192, *, with_weights: bool = True) -> None:
    """Without weights: for fake_engine.py, which reads config.ini alone."""
    layout = Layout(root=root, served_name=shape, doors="all")
    layout.weights.mkdir(parents=True, exist_ok=True)
    if with_weights:
        make_checkpoint(shape, layout.weights, dtype, session_len)
    config = workspace_config(shape, dtype, session_len)
    endless = dataclasses.replace(config.llama, end_id=config.llama.vocab_size)
    write_workspace_config(layout.weights / "config.ini", dataclasses.replace(config, llama=endless))
    write_tokenizer(layout.tokenizer, config.llama.vocab_size)
    write_doors(layout, door_templates(), model_name=shape, tp=1, chat_template=None)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level vocabulary without merges: special tokens, the bytes, then words of letters with a space before them."""
    folder.mkdir(parents=True, exist_ok=True)
    if vocab_size <= len(SPECIAL) + NUM_BYTES:
        raise SystemExit(f"the shape's vocabulary of {vocab_size} has no room for the bytes: choose another shape")
    words = [*SPECIAL, *_byte_letters()]
    words += [f"\u0120{_letters(index)}" for index in range(vocab_size - len(words))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": content, "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for index, content in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {word: index for index, word in enumerate(words)}, "merges": [], "unk_token": None},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}), encoding="utf-8")


def _byte_letters() -> list[str]:
    """The letter that byte-level vocabularies write for each byte: itself where it is printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x100 + NUM_BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(NUM_BYTES)]


def _letters(index: int) -> str:
    """The index as at least two letters; longer for larger ones, as rarer words are."""
    text = ""
    while index or len(text) < 2:
        index, letter = divmod(index, 26)
        text += chr(ord("a") + letter)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder, made if absent")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--session-len", type=int, default=8192, help="(default: %(default)s)")
    args = parser.parse_args()
    begun = time.monotonic()
    make_workspace(args.shape, args.out, args.dtype, args.session_len)
    print(f"{args.out}: made in {time.monotonic() - begun:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
