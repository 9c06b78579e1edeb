"""tiktoken's ranks (Qwen v1's qwen.tiktoken, the tokenizer.model of Meta's Llama 3) to a `tokenizers.Tokenizer` with the same ids.

A line of the file is a token's bytes in base64 and its rank. tiktoken merges, at each step, the adjacent pair whose joined bytes
have the lowest rank; a token's own merge is therefore the pair that is left when its bytes are merged with all lower ranks.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel

from turbotriton.contract.errors import CheckpointError

from .sample import check_same_ids

__all__ = ["LLAMA3", "QWEN", "Dialect", "is_tiktoken", "tokenizer_from_tiktoken"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the ranks do not say: how text is cut into words, and the special tokens that follow the ranks."""

    pattern: str
    special_tokens: tuple[str, ...]
    bos_token: str = ""  # put in front of every text
    composes: bool = False  # texts are brought into Unicode's composed form (NFC) first


def _words(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


QWEN = Dialect(
    pattern=_words(r"\p{N}"),
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    composes=True,
)
LLAMA3 = Dialect(
    pattern=_words(r"\p{N}{1,3}"),
    special_tokens=(
        *("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))),
        *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
        *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
    ),
    bos_token="<|begin_of_text|>",
)


def is_tiktoken(path: Path) -> bool:
    """Whether the file begins like a list of ranks: Meta calls its own tokenizer.model, too."""
    with open(path, "rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", file.read(256).split(b"\n")[0].strip()) is not None


def tokenizer_from_tiktoken(path: Path, dialect: Dialect) -> Tokenizer:
    """Raises CheckpointError when the file is corrupt or the ids differ from tiktoken's on a text."""
    ranks = _read_ranks(path)
    symbols = _byte_symbols()
    vocab = {"".join(symbols[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merge(ranks, token, rank)
            if len(parts) == 2:
                merges.append(("".join(symbols[b] for b in parts[0]), "".join(symbols[b] for b in parts[1])))
    # tiktoken takes a word that is a token as it is; some of Llama 3's cannot be reached by merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    if dialect.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(dialect.pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in dialect.special_tokens])
    special = {token: len(ranks) + i for i, token in enumerate(dialect.special_tokens)}
    encoding = tiktoken.Encoding(path.stem, pat_str=dialect.pattern, mergeable_ranks=ranks, special_tokens=special)
    prepare = _nfc if dialect.composes else str
    check_same_ids(tokenizer, lambda text: encoding.encode(prepare(text), disallowed_special=()), path)
    if dialect.bos_token:
        bos = (dialect.bos_token, special[dialect.bos_token])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B:1", special_tokens=[bos]
        )
    return tokenizer


def _nfc(text: str) -> str:
    return normalizers.NFC().normalize_str(text)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error):
        raise CheckpointError(f"{path}: is no tiktoken file (base64 and rank a line); download it again") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise CheckpointError(f"{path}: expected ranks 0..{len(ranks) - 1} with all 256 bytes; download it again")
    return ranks


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in of each byte, as byte-level BPE vocabularies write them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def _merge(ranks: dict[bytes, int], token: bytes, below: int) -> list[bytes]:
    """The parts of `token` after all merges of a rank lower than `below`."""
    parts = [bytes([b]) for b in token]
    while True:
        best, where = below, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], below)
            if rank < best:
                best, where = rank, i
        if where < 0:
            return parts
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
