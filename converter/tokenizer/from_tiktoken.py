"""qwen.tiktoken (Qwen v1) to a `tokenizers.Tokenizer` with the same ids.

A line of the file is a token's bytes in base64 and its rank. tiktoken merges, at each step, the adjacent pair whose joined bytes
have the lowest rank; a token's own merge is therefore the pair that is left when its bytes are merged with all lower ranks.
"""

import base64
import binascii
from pathlib import Path

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from turbotriton.contract.errors import CheckpointError

from .sample import check_same_ids

__all__ = ["tokenizer_from_tiktoken"]

#: How Qwen cuts text into words before merging, and what follows the ranks.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def tokenizer_from_tiktoken(path: Path) -> Tokenizer:
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
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    check_same_ids(tokenizer, lambda text: encoding.encode(_nfc(text), disallowed_special=()), path)
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
