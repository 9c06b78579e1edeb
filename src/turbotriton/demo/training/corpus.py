"""The generator: conversations of many kinds, made from a seed, with what counts as a right answer.

`draw(kind, split, rng)` makes one `Example`. Operands and words of an example all belong to the asked split (splits.py), in
every turn of it. An answer with one right form is compared exactly; small talk and stories have several.
Knows no tokens and no model.
"""

import random
from collections.abc import Callable, Iterator

from . import phrases
from .arithmetic import addition, comparison, counting, number_facts, sorting, subtraction
from .dialogue import commands, follow_up, memory, small_talk, story, system_prompt, unknown
from .examples import Example, Message
from .splits import Split
from .words import letter_count, letters, repeating, reversing, spelling

__all__ = ["KINDS", "Example", "Message", "draw", "sample"]

KINDS: dict[str, Callable[[Split, random.Random], Example]] = {
    "addition": addition,
    "subtraction": subtraction,
    "comparison": comparison,
    "counting": counting,
    "sorting": sorting,
    "number facts": number_facts,
    "spelling": spelling,
    "reversing": reversing,
    "letter count": letter_count,
    "letters": letters,
    "repeating": repeating,
    "small talk": small_talk,
    "commands": commands,
    "unknown": unknown,
    "stories": story,
    "follow-up": follow_up,
    "memory": memory,
    "system prompt": system_prompt,
}


def draw(kind: str, split: Split, rng: random.Random, *, with_prompt: bool = False) -> Example:
    """One example of a kind. `with_prompt` puts a general system prompt before a conversation that has none."""
    example = KINDS[kind](split, rng)
    if with_prompt and example.messages[0][0] != "system":
        messages = (("system", rng.choice(phrases.ASSISTANT_PROMPTS)), *example.messages)
        return Example(example.kind, messages, example.keys, example.accepted, example.pattern)
    return example


def sample(split: Split, per_kind: int, seed: int) -> Iterator[Example]:
    """`per_kind` examples of each kind; a tenth carries a general system prompt."""
    for kind in KINDS:
        rng = random.Random(f"{seed} {split} {kind}")
        for _ in range(per_kind):
            yield draw(kind, split, rng, with_prompt=rng.random() < 0.1)
