"""Kinds about words and their letters: spelling, reversing, counting letters, copying."""

import random

from . import phrases
from .examples import Example, ask, draw_word, one_turn
from .splits import Split, split_of_text

__all__ = ["counted", "letter_count", "letters", "repeating", "reversing", "spelling"]


def spelling(split: Split, rng: random.Random) -> Example:
    word = draw_word(split, rng, longest=8)
    question = ask(
        rng, f"Spell {word}.", f"Spell the word {word}.", f"How do you spell {word}?", f"Can you spell {word}?",
        f'Spell "{word}".',
        f"Please spell {word} for me.",
    )  # fmt: skip
    return one_turn("spelling", question, "-".join(word) + ".", f"word {word}")


def reversing(split: Split, rng: random.Random) -> Example:
    word = draw_word(split, rng, longest=6)
    question = ask(
        rng, f"Reverse {word}.", f"Reverse the word {word}.", f"What is {word} backwards?", f"Write {word} backwards.",
        f'Reverse "{word}".',
        f"How do you write {word} in reverse?",
    )  # fmt: skip
    return one_turn("reversing", question, f'"{word}" backwards is "{word[::-1]}".', f"word {word}")


def letter_count(split: Split, rng: random.Random) -> Example:
    word = draw_word(split, rng, longest=8)
    question = ask(
        rng, f"How many letters are in {word}?", f"How many letters does {word} have?", f"Count the letters in {word}.",
    )  # fmt: skip
    return one_turn("letter count", question, counted(word), f"word {word}")


def counted(word: str) -> str:
    """Counts aloud: "c1 a2 t3: 3 letters."."""
    spelled = " ".join(f"{letter}{place}" for place, letter in enumerate(word, 1))
    return f"{spelled}: {len(word)} letter{'' if len(word) == 1 else 's'}."


def letters(split: Split, rng: random.Random) -> Example:
    word = draw_word(split, rng, longest=8)
    place, index = rng.choice((("first", 0), ("last", -1)))
    question = ask(rng, f"What is the {place} letter of {word}?", f"Which letter is {place} in {word}?")
    return one_turn("letters", question, f'The {place} letter of "{word}" is "{word[index]}".', f"word {word}")


def repeating(split: Split, rng: random.Random) -> Example:
    if rng.random() < 0.25:
        while True:
            text = "".join(rng.choices(phrases.SYMBOLS, k=rng.randint(1, 3)))
            if split_of_text(text) == split:
                break
        words = [text]
    else:
        words = [draw_word(split, rng, longest=8) for _ in range(rng.randint(1, 3))]
        text = " ".join(words)
    keys = [f"word {word}" for word in words]
    if len(words) == 1 and rng.random() < 0.4:
        return one_turn(
            "repeating", ask(rng, f"Say {text} three times.", f"Repeat {text} three times."), f"{text} {text} {text}", *keys
        )
    return one_turn(
        "repeating", rng.choice((f"Repeat: {text}", f"Repeat after me: {text}", f"Say: {text}", f"Echo: {text}")), text, *keys
    )
