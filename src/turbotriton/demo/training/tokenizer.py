"""The demo model's tokenizer: bytes, a list of whole words, three special tokens; no merges.

A piece of text (split as GPT-2 does, but with every digit alone) that is in the word list becomes one token, anything else its
bytes, one token each (`ignore_merges` with an empty merge list). So template words are short, and the letters and digits of
what the user gives, which the model has to spell, reverse or add, are always visible. All 256 bytes exist: nothing is unknown.
The word list comes from the corpus itself and leaves out every word that may be held out.
"""

import json
import random
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from . import phrases
from .corpus import KINDS, draw

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "VOCAB_SIZE", "build_tokenizer", "render", "save_tokenizer"]

VOCAB_SIZE = 512  # 256 a device at tp 2
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _frequent_words(pre_tokenizer: pre_tokenizers.PreTokenizer, num_words: int, alphabet: set[str]) -> list[str]:
    """The most frequent pieces of several bytes in a fixed sample of the corpus."""
    counts: Counter[str] = Counter({"user": 10**9, "assistant": 10**9, "system": 10**9})
    spelled = set(phrases.WORDS)
    rng = random.Random(0)
    for kind in KINDS:
        for _ in range(400):
            for _role, content in draw(kind, "train", rng).messages:
                counts.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(content))
    words = [
        (count, piece)
        for piece, count in counts.items()
        if len(piece) > 1 and piece not in alphabet and piece.lstrip("Ġ").lower() not in spelled and piece.lstrip("Ġ").isascii()
    ]
    return [piece for _, piece in sorted(words, key=lambda entry: (-entry[0], entry[1]))[:num_words]]


def build_tokenizer() -> Tokenizer:
    """Deterministic: the same corpus gives the same ids. Special tokens are 0 to 2, bytes 3 to 258, words follow."""
    pre_tokenizer = _pre_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = _frequent_words(pre_tokenizer, VOCAB_SIZE - len(SPECIAL_TOKENS) - len(alphabet), set(alphabet))
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def render(messages: tuple[tuple[str, str], ...], *, add_generation_prompt: bool = False) -> str:
    """What CHAT_TEMPLATE renders, without Jinja: the generator calls it millions of times."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return text + "<|im_start|>assistant\n" if add_generation_prompt else text


def save_tokenizer(folder: Path) -> Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer = build_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return tokenizer
