"""A converted tokenizer must give the original's ids: compared on a text, each time a tokenizer is converted."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from turbotriton.contract.errors import CheckpointError

__all__ = ["SAMPLES", "check_same_ids"]

SAMPLES = (
    "Hello, world!",
    " leading and trailing spaces  ",
    "two  spaces,   three, and\ttabs\t\tand\nnew\n\nlines\r\n",
    "It's 12345.678e-9 degrees; they'll say: \"we've DONE it\" (isn't it?)",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2, 3]}  # comment\n",
    "The quick brown fox jumps over the lazy dog. Antidisestablishmentarianism, supercalifragilistic, zzzzzzzz.",
    "Grüße aus München, où l'été naît à Noël; señor, ¿qué tal? Æøå ß",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया. สวัสดีชาวโลก",
    "你好，世界！今天天气很好。こんにちは世界、カタカナ。안녕하세요 세계",
    "emoji 👩‍🔬🏳️‍🌈👍🏽 and math ∑∫√∞≠ → ½ ﬁ ﷺ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "https://example.org/a_b-c?d=e&f=%20#g user@example.org C:\\path\\file.txt <|not_special|> [INST",
    "",
    " ",
    "a",
)


def check_same_ids(
    tokenizer: Tokenizer, reference: Callable[[str], list[int]], path: Path, *, leading_space: bool = True
) -> None:
    """Raises CheckpointError naming the text on which tokenizer.json and the original at `path` would differ.

    `leading_space` False leaves out the texts that begin with one.
    """
    for text in SAMPLES if leading_space else (text for text in SAMPLES if not text.startswith(" ")):
        expected, found = list(reference(text)), tokenizer.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise CheckpointError(
                f"{path}: cannot be converted to tokenizer.json: for {text[:40]!r} expected ids {expected[:12]}, "
                f"found {found[:12]}; give a tokenizer.json by --tokenizer-path"
            )
