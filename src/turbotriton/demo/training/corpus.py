"""The generator: conversations of many kinds, made from a seed, with what counts as a right answer.

`draw(kind, split, rng)` makes one `Example`. Operands and words of an example all belong to the asked split (splits.py), in
every turn of it. An answer with one right form is compared exactly; small talk and stories have several.
Knows no tokens and no model.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import phrases
from .splits import Split, split_of_number, split_of_numbers, split_of_pair, split_of_text

__all__ = ["KINDS", "Example", "Message", "draw", "sample"]

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
_FORM_WORDS = """a add after afterwards am an and answer appear are assistant away backwards be before by calculate call called can comes
convert count do does down downwards each echo equal even falling first its for from gpus have has hear hello help how i in is it know large larger
last letter letters long make me meet minus model multiply much many my name next nice no now number numbers odd of often one or order out
please plus product put reverse remember repeat reverse run say second serve small smaller sort spell steps story subtract sum take tell than that the
then these third three time times to up want what which who word workspace write you your turbotriton tritonserver path tp x"""


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
_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"


def _made_up_word(rng: random.Random) -> str:
    if rng.random() < 0.25:  # any letters at all: spelling must not lean on syllables
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
    word = ""
    for _ in range(rng.randint(1, 4)):
        word += rng.choice(_CONSONANTS) * (rng.random() < 0.85) + rng.choice(_VOWELS)
        word += rng.choice("nrstlmpckx") * (rng.random() < 0.35)
        word += word[-1] * (rng.random() < 0.1)
    return word[:11]


def _word(split: Split, rng: random.Random, *, longest: int = 11) -> str:
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


_TEMPLATE_WORD_LIST = sorted(TEMPLATE_WORDS)


def _pair(split: Split, rng: random.Random) -> tuple[int, int]:
    """Two numbers below 100, the second has one digit in a third of the cases."""
    while True:
        a, b = rng.randint(0, 99), rng.randint(0, rng.choice((9, 99, 99)))
        if rng.random() < 0.5:
            a, b = b, a
        if split_of_pair(a, b) == split:
            return a, b


def _pair_key(a: int, b: int) -> str:
    return f"pair {min(a, b)} {max(a, b)}"


def _ask(rng: random.Random, *forms: str) -> str:
    """One of the forms, sometimes in lower case or without the mark at its end."""
    text = rng.choice(forms)
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?.!")
    return text


def _one(kind: str, question: str, answer: str, *keys: str) -> Example:
    return Example(kind, (("user", question), ("assistant", answer)), frozenset(keys), (answer,))


def _add_answer(a: int, b: int) -> str:
    """Digit by digit from the ones, as on paper: 47 + 85 is "7 + 5 = 12, 4 + 8 + 1 = 13, so it is 132."."""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    ones = a % 10 + b % 10
    carry = " + 1" if ones > 9 else ""
    return f"{a % 10} + {b % 10} = {ones}, {a // 10} + {b // 10}{carry} = {a // 10 + b // 10 + ones // 10}, so it is {a + b}."


def _subtract_answer(a: int, b: int) -> str:
    """As _add_answer, a >= b: 85 - 47 is "15 - 7 = 8, 7 - 4 = 3, so it is 38."."""
    if a < 10:
        return f"{a} - {b} = {a - b}."
    borrow = a % 10 < b % 10
    ones, tens = a % 10 + 10 * borrow, a // 10 - borrow
    return f"{ones} - {b % 10} = {ones - b % 10}, {tens} - {b // 10} = {tens - b // 10}, so it is {a - b}."


def _addition(split: Split, rng: random.Random) -> Example:
    a, b = _pair(split, rng)
    question = _ask(
        rng, f"What is {a} + {b}?", f"What is {a} plus {b}?", f"Add {a} and {b}.", f"{a} + {b}", f"Calculate {a} + {b}.",
        f"How much is {a} + {b}?",
    )  # fmt: skip
    return _one("addition", question, _add_answer(a, b), _pair_key(a, b))


def _subtraction(split: Split, rng: random.Random) -> Example:
    a, b = _pair(split, rng)
    a, b = max(a, b), min(a, b)
    question = _ask(
        rng, f"What is {a} - {b}?", f"What is {a} minus {b}?", f"{a} - {b}", f"Calculate {a} - {b}.", f"How much is {a} - {b}?",
    )  # fmt: skip
    return _one("subtraction", question, _subtract_answer(a, b), _pair_key(a, b))


def _comparison(split: Split, rng: random.Random) -> Example:
    a, b = _pair(split, rng)
    word = rng.choice(("larger", "smaller"))
    question = _ask(
        rng, f"Which is {word}, {a} or {b}?", f"What is {word}: {a} or {b}?", f"Which number is {word}, {a} or {b}?",
        f"Which one is {word}: {a} or {b}?",
    )  # fmt: skip
    if a == b:
        answer = f"{a} and {b} are equal."
    else:
        first, second = (max(a, b), min(a, b)) if word == "larger" else (min(a, b), max(a, b))
        answer = f"{first} is {word} than {second}."
    return _one("comparison", question, answer, _pair_key(a, b))


def _counting(split: Split, rng: random.Random) -> Example:
    while True:
        start = rng.randint(0, rng.choice((12, 99)))
        stop = start + rng.randint(1, 10)
        if split_of_pair(start, stop) == split:
            break
    question = _ask(rng, f"Count from {start} to {stop}.", f"Please count from {start} to {stop}.", f"Can you count from {start} to {stop}?")
    return _one("counting", question, ", ".join(map(str, range(start, stop + 1))) + ".", _pair_key(start, stop))


def _sorting(split: Split, rng: random.Random) -> Example:
    while True:
        numbers = rng.sample(range(10), rng.randint(3, 5))
        if split_of_numbers(numbers) == split:
            break
    listed = ", ".join(map(str, numbers))
    question = _ask(rng, f"Sort {listed}.", f"Sort these numbers: {listed}.", f"Put in order: {listed}.")
    answer = ", ".join(map(str, sorted(numbers))) + "."
    return _one("sorting", question, answer, "list " + " ".join(map(str, sorted(numbers))))


def _parity(split: Split, rng: random.Random) -> Example:
    while True:
        number = rng.randint(1, rng.choice((99, 999)))
        if split_of_number(number) == split:
            break
    if rng.random() < 0.5:
        question = _ask(rng, f"Is {number} even or odd?", f"Is the number {number} even or odd?", f"Is {number} odd or even?")
        answer = f"{number} is {'odd' if number % 2 else 'even'}."
    elif rng.random() < 0.5:
        question = _ask(
            rng, f"What comes after {number}?", f"Which number comes after {number}?", f"What is the next number after {number}?"
        )
        answer = f"After {number} comes {number + 1}."
    else:
        question = _ask(
            rng, f"What comes before {number}?", f"Which number comes before {number}?", f"What is the number before {number}?"
        )
        answer = f"Before {number} comes {number - 1}."
    return _one("number facts", question, answer, f"number {number}")


def _spelling(split: Split, rng: random.Random) -> Example:
    word = _word(split, rng, longest=8)
    question = _ask(
        rng, f"Spell {word}.", f"Spell the word {word}.", f"How do you spell {word}?", f"Can you spell {word}?", f'Spell "{word}".',
        f"Please spell {word} for me.",
    )  # fmt: skip
    return _one("spelling", question, "-".join(word) + ".", f"word {word}")


def _reversing(split: Split, rng: random.Random) -> Example:
    word = _word(split, rng, longest=6)
    question = _ask(
        rng, f"Reverse {word}.", f"Reverse the word {word}.", f"What is {word} backwards?", f"Write {word} backwards.", f'Reverse "{word}".',
        f"How do you write {word} in reverse?",
    )  # fmt: skip
    return _one("reversing", question, f'"{word}" backwards is "{word[::-1]}".', f"word {word}")


def _letter_count(split: Split, rng: random.Random) -> Example:
    word = _word(split, rng, longest=8)
    question = _ask(
        rng, f"How many letters are in {word}?", f"How many letters does {word} have?", f"Count the letters in {word}.",
    )  # fmt: skip
    return _one("letter count", question, _counted(word), f"word {word}")


def _counted(word: str) -> str:
    """Counts aloud: "c1 a2 t3: 3 letters."."""
    spelled = " ".join(f"{letter}{place}" for place, letter in enumerate(word, 1))
    return f"{spelled}: {len(word)} letter{'' if len(word) == 1 else 's'}."


def _letters(split: Split, rng: random.Random) -> Example:
    word = _word(split, rng, longest=8)
    place, index = rng.choice((("first", 0), ("last", -1)))
    question = _ask(rng, f"What is the {place} letter of {word}?", f"Which letter is {place} in {word}?")
    return _one("letters", question, f'The {place} letter of "{word}" is "{word[index]}".', f"word {word}")


def _repeat(split: Split, rng: random.Random) -> Example:
    if rng.random() < 0.25:
        while True:
            text = "".join(rng.choices(phrases.SYMBOLS, k=rng.randint(1, 3)))
            if split_of_text(text) == split:
                break
        words = [text]
    else:
        words = [_word(split, rng, longest=8) for _ in range(rng.randint(1, 3))]
        text = " ".join(words)
    keys = [f"word {word}" for word in words]
    if len(words) == 1 and rng.random() < 0.4:
        return _one(
            "repeating", _ask(rng, f"Say {text} three times.", f"Repeat {text} three times."), f"{text} {text} {text}", *keys
        )
    return _one(
        "repeating", rng.choice((f"Repeat: {text}", f"Repeat after me: {text}", f"Say: {text}", f"Echo: {text}")), text, *keys
    )


def _phrasing(split: Split, rng: random.Random, core: str) -> str | None:
    """The question in a whole phrasing of this split, or None: the caller draws again."""
    opener, closer = rng.choice(phrases.OPENERS), rng.choice(phrases.CLOSERS)
    mark = core[-1] if core[-1] in "?.!" else rng.choice(("", "!", "."))
    text = opener + core.rstrip("?.!") + closer + (mark if rng.random() < 0.85 else "")
    text = text[0].upper() + text[1:] if rng.random() < 0.8 else text
    return text if split_of_text(text) == split else None


def _from_intents(
    kind: str, intents: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...], split: Split, rng: random.Random
) -> Example:
    while True:
        asked, answers = rng.choice(intents)
        question = _phrasing(split, rng, rng.choice(asked))
        if question is not None:
            answer = rng.choice(answers)
            return Example(kind, (("user", question), ("assistant", answer)), frozenset({f"text {question.lower()}"}), answers)


def _small_talk(split: Split, rng: random.Random) -> Example:
    return _from_intents("small talk", phrases.SMALL_TALK, split, rng)


def _commands(split: Split, rng: random.Random) -> Example:
    """Facts about the commands, and command lines with a name that the user gives."""
    if rng.random() < 0.6:
        return _from_intents("commands", phrases.COMMANDS, split, rng)
    name = _word(split, rng, longest=8)
    if rng.random() < 0.5:
        num_gpus = rng.choice((1, 1, 2, 4, 8))
        goal = "" if num_gpus == 1 else f" for {num_gpus} GPUs"
        question = _ask(
            rng, f"How do I convert {name}{goal}?", f"How do I convert the model {name}{goal}?", f"Convert {name}{goal}."
        )
        answer = f"Run: turbotriton convert {name} MODEL_PATH" + ("." if num_gpus == 1 else f" --tp {num_gpus}.")
    else:
        question = _ask(rng, f"How do I serve {name}?", f"How do I serve the workspace {name}?", f"Serve {name}.")
        answer = f"Run: turbotriton serve tritonserver {name}."
    return _one("commands", question, answer, f"word {name}")


def _unknown(split: Split, rng: random.Random) -> Example:
    while True:
        word = _word(split, rng, longest=8)
        question = _phrasing(split, rng, rng.choice(phrases.UNKNOWN_QUESTIONS).format(word))
        if question is not None:
            return _one("unknown", question, phrases.UNKNOWN_ANSWER, f"text {question.lower()}", f"word {word}")


def _story(split: Split, rng: random.Random) -> Example:
    subject = _word(split, rng, longest=8)
    article = "an" if subject[0] in _VOWELS else "a"
    question = _ask(
        rng, f"Tell me a story about {article} {subject}.", f"Tell a story about {article} {subject}.", f"Write a story about {article} {subject}.",
        f"I want to hear a story about {article} {subject}.", f"Can you tell me a story about {article} {subject}?",
    )  # fmt: skip
    if split == "train" and rng.random() < 0.15:
        subject, question = (
            "friend",
            _ask(rng, "Tell me a story.", "Tell a story.", "Please tell me a story.", "Can you tell me a story?"),
        )
    answer = " ".join(rng.choice(slot).format(s=subject) for slot in phrases.STORY_SLOTS)
    pattern = " ".join("(?:" + "|".join(re.escape(line.format(s=subject)) for line in slot) + ")" for slot in phrases.STORY_SLOTS)
    return Example("stories", (("user", question), ("assistant", answer)), frozenset({f"word {subject}"}), (answer,), pattern)


def _follow_up(split: Split, rng: random.Random) -> Example:
    """A second question that needs the first turn: go on with the result, or do something else with the word."""
    if rng.random() < 0.4:
        while True:
            first = rng.choice((_addition, _subtraction))(split, rng)
            result = int(first.accepted[0].rstrip(".").rsplit(" ", 1)[1])
            operand = rng.randint(1, 9)
            if 10 <= result <= 90 and split_of_pair(result, operand) == split:
                break
        question = _ask(rng, f"Add {operand} to that.", f"And plus {operand}?", f"Now add {operand}.")
        answer = _add_answer(result, operand)
        keys = first.keys | {_pair_key(result, operand)}
    else:
        first = rng.choice((_spelling, _letters))(split, rng)
        (key,) = first.keys
        word = key.removeprefix("word ")
        question, answer = rng.choice((
            (_ask(rng, "What is its first letter?", "And its first letter?"), f'The first letter of "{word}" is "{word[0]}".'),
            (_ask(rng, "Now spell it.", "And how do you spell it?", "Spell it."), "-".join(word) + "."),
            (_ask(rng, "How many letters does it have?", "How many letters are in it?"), _counted(word)),
        ))  # fmt: skip
        keys = first.keys
    return Example("follow-up", (*first.messages, ("user", question), ("assistant", answer)), keys, (answer,))


def _name_memory(split: Split, rng: random.Random) -> Example:
    """The user's name, asked for one turn later or after another exchange."""
    name = _word(split, rng, longest=9).capitalize()
    told = _ask(rng, f"My name is {name}.", f"I am called {name}.", f"Call me {name}.", f"Hello, my name is {name}.")
    messages: tuple[Message, ...] = (("user", told), ("assistant", f"Nice to meet you, {name}! How can I help you?"))
    keys = frozenset({f"word {name.lower()}"})
    if rng.random() < 0.25:
        return Example("memory", messages, keys, (messages[-1][1],))
    if rng.random() < 0.6:
        between = rng.choice((_addition, _spelling, _small_talk, _commands, _comparison))(split, rng)
        messages, keys = messages + between.messages, keys | between.keys
    answer = f"Your name is {name}."
    question = _ask(rng, "What is my name?", "What am I called?", "Do you know my name?", "Do you remember my name?", "Who am I?")
    return Example("memory", (*messages, ("user", question), ("assistant", answer)), keys, (answer,))


def _system(split: Split, rng: random.Random) -> Example:
    """A system prompt gives the assistant a name; the answer must use it."""
    name = _word(split, rng, longest=9).capitalize()
    prompt = rng.choice(
        (
            f"Your name is {name}.",
            f"You are {name}.",
            f"You are an assistant called {name}.",
            f"You are {name}, a helpful assistant.",
        )
    )
    question = _ask(rng, "What is your name?", "Who are you?", "What are you called?", "Tell me your name.")
    answer = f"My name is {name}."
    return Example(
        "system prompt",
        (("system", prompt), ("user", question), ("assistant", answer)),
        frozenset({f"word {name.lower()}"}),
        (answer,),
    )


KINDS: dict[str, Callable[[Split, random.Random], Example]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "comparison": _comparison,
    "counting": _counting,
    "sorting": _sorting,
    "number facts": _parity,
    "spelling": _spelling,
    "reversing": _reversing,
    "letter count": _letter_count,
    "letters": _letters,
    "repeating": _repeat,
    "small talk": _small_talk,
    "commands": _commands,
    "unknown": _unknown,
    "stories": _story,
    "follow-up": _follow_up,
    "memory": _name_memory,
    "system prompt": _system,
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
