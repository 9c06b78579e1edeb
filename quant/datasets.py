"""Texts to calibrate on, as windows of token ids.

    name                          where from
    default                       the text that calibration_text.py makes
    a path                        .txt, .md, .jsonl or a folder of them. A line of .jsonl: a string, or an object with text, content,
                                  messages or turns (contents joined by line ends), or prompt and completion
    ptb, c4, wikitext2, pileval   the `datasets` library, from its hub: needs it installed and a network

Windows are drawn at random places with a fixed seed, as LMDeploy draws them.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from turbotriton.contract.errors import ConfigError, UnavailableError
from turbotriton.converter.tokenizer import write_tokenizer

from .calibration_text import bundled_text

__all__ = [
    "HUB_DATASETS",
    "Document",
    "Window",
    "calibration_windows",
    "consecutive_windows",
    "load_documents",
    "load_text",
    "load_tokenizer",
]

#: name -> (dataset, configuration or data files, column, separator)
HUB_DATASETS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "wikitext2": ("wikitext", {"name": "wikitext-2-raw-v1", "split": "train"}, "text", "\n\n"),
    "ptb": ("ptb_text_only", {"name": "penn_treebank", "split": "train"}, "sentence", "\n\n"),
    "c4": ("allenai/c4", {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}, "text", "\n\n"),
    "pileval": ("mit-han-lab/pile-val-backup", {"split": "validation"}, "text", "\n\n"),
}
TEXT_KEYS = ("text", "content", "messages", "turns")
HUB_CHARACTERS = 20_000_000  # of a hub's dataset at most: calibration draws far less


class Document(NamedTuple):
    """`prompt` comes first and is not scored."""

    text: str
    prompt: str = ""


def load_documents(name: str) -> list[Document]:
    """A line of a .jsonl file, another file, or the whole of a named dataset is a document.

    Raises ConfigError for a path or name that is none, UnavailableError when a named dataset cannot be had.
    """
    if name == "default":
        return [Document(bundled_text())]
    path = Path(name)
    if path.exists():
        files = sorted(p for p in path.rglob("*") if p.suffix in READERS) if path.is_dir() else [path]
        found = [document for file in files for document in READERS.get(file.suffix, _read_plain)(file)]
        documents = [document for document in found if document.text.strip()]
        if not documents:
            raise ConfigError(f"{path}: holds no text; give a .txt or .jsonl file, or a folder of them")
        return documents
    if name in HUB_DATASETS:
        return [Document(_from_hub(name))]
    raise ConfigError(
        f"{name!r} is neither a file or folder nor one of default, {', '.join(HUB_DATASETS)}; give one of these as the text"
    )


def load_text(name: str) -> str:
    """The documents as one text."""
    return "\n\n".join(document.prompt + document.text for document in load_documents(name))


def _read_plain(path: Path) -> list[Document]:
    return [Document(_read_text(path))]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text (byte {error.start}); convert it first") from None


def _read_jsonl(path: Path) -> list[Document]:
    lines = enumerate(_read_text(path).splitlines(), 1)
    return [_read_line(path, number, line) for number, line in lines if line.strip()]


def _read_line(path: Path, number: int, line: str) -> Document:
    try:
        entry = json.loads(line)
        if isinstance(entry, str):
            return Document(entry)
        if "completion" in entry:
            return Document(str(entry["completion"]), str(entry["prompt"]))
        found = next(entry[key] for key in TEXT_KEYS if key in entry)
        if isinstance(found, list):
            return Document("\n".join(part if isinstance(part, str) else str(part["content"]) for part in found))
        return Document(str(found))
    except (ValueError, KeyError, TypeError, StopIteration):
        keys = f"{', '.join(TEXT_KEYS)}, or prompt and completion"
        raise ConfigError(f"{path}: line {number}: expected a JSON string or an object with {keys}") from None


READERS: dict[str, Callable[[Path], list[Document]]] = {".txt": _read_plain, ".md": _read_plain, ".jsonl": _read_jsonl}


def _from_hub(name: str) -> str:
    remedy = "give a local text with --calib-dataset PATH, or --calib-dataset default"
    try:
        from datasets import load_dataset
    except ImportError:
        raise UnavailableError(f"--calib-dataset {name} needs the datasets library (pip install datasets); or {remedy}") from None
    dataset, options, column, separator = HUB_DATASETS[name]
    try:
        rows = load_dataset(dataset, **options)
        return separator.join(_limited(str(row[column]) for row in rows))
    except Exception as error:  # noqa: BLE001 - whatever the library, the hub or the network raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnavailableError(f"--calib-dataset {name}: cannot be downloaded ({reason}); {remedy}") from None


def _limited(texts: Iterator[str]) -> Iterator[str]:
    total = 0
    for text in texts:
        total += len(text)
        if total > HUB_CHARACTERS:
            return
        yield text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The checkpoint's tokenizer.json, or one converted from what it has. Raises CheckpointError."""
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "tokenizer"
        write_tokenizer(folder, None, target, copy_code=False)
        return Tokenizer.from_file(str(target / "tokenizer.json"))


def calibration_windows(tokenizer: Tokenizer, text: str, num_windows: int, seqlen: int) -> torch.Tensor:
    """[num_windows, seqlen], int64. Raises ConfigError when the text has fewer than seqlen + 1 tokens."""
    if num_windows < 1 or seqlen < 2:
        raise ConfigError(f"--calib-samples is {num_windows} and --calib-seqlen {seqlen}; they must be at least 1 and 2")
    ids = torch.tensor(tokenizer.encode(text).ids)
    if len(ids) <= seqlen:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens, fewer than --calib-seqlen {seqlen} + 1; give more text or a smaller length"
        )
    draw = random.Random(0)
    starts = [draw.randint(0, len(ids) - seqlen - 1) for _ in range(num_windows)]
    return torch.stack([ids[start : start + seqlen] for start in starts])


class Window(NamedTuple):
    """token_ids: [num_tokens], int64; of these the first `num_unscored` are only read."""

    token_ids: torch.Tensor
    num_unscored: int


def consecutive_windows(tokenizer: Tokenizer, documents: list[Document], seqlen: int, num_tokens: int) -> list[Window]:
    """Each document's tokens in windows of `seqlen`, its last one shorter, about `num_tokens` in all. Raises ConfigError for none."""
    if seqlen < 2:
        raise ConfigError(f"--seqlen is {seqlen}; it must be at least 2")
    windows: list[Window] = []
    for document in documents:
        if num_tokens < 2:
            break
        prompt = tokenizer.encode(document.prompt).ids if document.prompt else []
        text = tokenizer.encode(document.text, add_special_tokens=not prompt).ids[:num_tokens]
        num_tokens -= len(text)
        unscored = len(prompt)
        for ids in torch.split(torch.tensor(prompt + text), seqlen):
            if len(ids) > max(1, unscored):
                windows.append(Window(ids, unscored))
            unscored = max(0, unscored - seqlen)
    if not windows:
        raise ConfigError("the text has fewer than 2 tokens to score; give more")
    return windows
