"""What an example of the corpus is, and what its kinds share: drawing words and pairs of a split, phrasing a question."""

import random
import re
from dataclasses import dataclass

from . import phrases
from .splits import Split, split_of_pair, split_of_text

__all__ = ["TEMPLATE_WORDS", "VOWELS", "Example", "Message", "ask", "draw_pair", "draw_word", "one_turn", "pair_key"]

Message = tuple[str, str]  # role, content


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation that ends with the answer to check.

    `keys` names every operand pair, list and word that the question is about, for the test of disjointness.
    `accepted` are the right forms of the last answer; a story is held against `pattern` instead.
    """

    kind: str
    messages: tuple[Message, ...]
    keys: frozenset[str]
    accepted: tuple[str, ...]
    pattern: str | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    def is_right(self, answer: str) -> bool:
        if self.pattern is not None:
            return re.fullmatch(self.pattern, answer) is not None
        return answer in self.accepted


#: Words of the question forms below, which training sees.
_FORM_WORDS = """
a add after afterwards am an and answer appear are assistant away backwards be before by calculate call called can comes
convert count do does down downwards each echo equal even falling first its for from gpus have has hear hello help how i in is
it know large larger last letter letters long make me meet minus model multiply much many my name next nice no now number
numbers odd of often one or order out please plus product put reverse remember repeat reverse run say second serve small
smaller sort spell steps story subtract sum take tell than that the then these third three time times to up want what which
who word workspace write you your turbotriton tritonserver path tp x
"""


def _template_words() -> frozenset[str]:
    texts: list[str] = [
        _FORM_WORDS,
        *phrases.OPENERS,
        *phrases.CLOSERS,
        *phrases.ASSISTANT_PROMPTS,
        phrases.UNKNOWN_ANSWER,
        *phrases.UNKNOWN_QUESTIONS,
    ]
    for asked, answers in (*phrases.SMALL_TALK, *phrases.COMMANDS):
        texts += [*asked, *answers]
    for slot in phrases.STORY_SLOTS:
        texts += slot
    return frozenset(re.findall(r"[a-z]+", " ".join(texts).lower()))


#: Words of the fixed texts are seen in training, so they are never held out.
TEMPLATE_WORDS = _template_words()
_TEMPLATE_WORD_LIST = sorted(TEMPLATE_WORDS)
_CONSONANTS = "bcdfghjklmnprstvwz"
VOWELS = "aeiou"


def _made_up_word(rng: random.Random) -> str:
    if rng.random() < 0.25:  # any letters at all: spelling must not lean on syllables
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
    word = ""
    for _ in range(rng.randint(1, 4)):
        word += rng.choice(_CONSONANTS) * (rng.random() < 0.85) + rng.choice(VOWELS)
        word += rng.choice("nrstlmpckx") * (rng.random() < 0.35)
        word += word[-1] * (rng.random() < 0.1)
    return word[:11]


def draw_word(split: Split, rng: random.Random, *, longest: int = 11) -> str:
    while True:
        roll = rng.random()
        if split == "train" and roll < 0.15:
            word = rng.choice(_TEMPLATE_WORD_LIST)
        elif roll < 0.5:
            word = rng.choice(phrases.WORDS)
        else:
            word = _made_up_word(rng)
        if len(word) <= longest and (split_of_text(word) if word not in TEMPLATE_WORDS else "train") == split:
            return word


def draw_pair(split: Split, rng: random.Random) -> tuple[int, int]:
    """Two numbers below 100, the second has one digit in a third of the cases."""
    while True:
        a, b = rng.randint(0, 99), rng.randint(0, rng.choice((9, 99, 99)))
        if rng.random() < 0.5:
            a, b = b, a
        if split_of_pair(a, b) == split:
            return a, b


def pair_key(a: int, b: int) -> str:
    return f"pair {min(a, b)} {max(a, b)}"


def ask(rng: random.Random, *forms: str) -> str:
    """One of the forms, sometimes in lower case or without the mark at its end."""
    text = rng.choice(forms)
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?.!")
    return text


def one_turn(kind: str, question: str, answer: str, *keys: str) -> Example:
    return Example(kind, (("user", question), ("assistant", answer)), frozenset(keys), (answer,))
