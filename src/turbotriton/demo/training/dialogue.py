"""Kinds that are talk: small talk, the project's commands, what the model does not know, stories, and several turns."""

import random
import re

from . import phrases
from .arithmetic import add_answer, addition, comparison, subtraction
from .examples import VOWELS, Example, Message, ask, draw_word, one_turn, pair_key
from .splits import Split, split_of_pair, split_of_text
from .words import counted, letters, spelling

__all__ = ["commands", "follow_up", "memory", "small_talk", "story", "system_prompt", "unknown"]


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


def small_talk(split: Split, rng: random.Random) -> Example:
    return _from_intents("small talk", phrases.SMALL_TALK, split, rng)


def commands(split: Split, rng: random.Random) -> Example:
    """Facts about the commands, and command lines with a name that the user gives."""
    if rng.random() < 0.6:
        return _from_intents("commands", phrases.COMMANDS, split, rng)
    name = draw_word(split, rng, longest=8)
    if rng.random() < 0.5:
        num_gpus = rng.choice((1, 1, 2, 4, 8))
        goal = "" if num_gpus == 1 else f" for {num_gpus} GPUs"
        question = ask(
            rng, f"How do I convert {name}{goal}?", f"How do I convert the model {name}{goal}?", f"Convert {name}{goal}."
        )
        answer = f"Run: turbotriton convert {name} MODEL_PATH" + ("." if num_gpus == 1 else f" --tp {num_gpus}.")
    else:
        question = ask(rng, f"How do I serve {name}?", f"How do I serve the workspace {name}?", f"Serve {name}.")
        answer = f"Run: turbotriton serve tritonserver {name}."
    return one_turn("commands", question, answer, f"word {name}")


def unknown(split: Split, rng: random.Random) -> Example:
    while True:
        word = draw_word(split, rng, longest=8)
        question = _phrasing(split, rng, rng.choice(phrases.UNKNOWN_QUESTIONS).format(word))
        if question is not None:
            return one_turn("unknown", question, phrases.UNKNOWN_ANSWER, f"text {question.lower()}", f"word {word}")


def story(split: Split, rng: random.Random) -> Example:
    subject = draw_word(split, rng, longest=8)
    article = "an" if subject[0] in VOWELS else "a"
    question = ask(
        rng, f"Tell me a story about {article} {subject}.", f"Tell a story about {article} {subject}.",
        f"Write a story about {article} {subject}.",
        f"I want to hear a story about {article} {subject}.", f"Can you tell me a story about {article} {subject}?",
    )  # fmt: skip
    if split == "train" and rng.random() < 0.15:
        subject, question = (
            "friend",
            ask(rng, "Tell me a story.", "Tell a story.", "Please tell me a story.", "Can you tell me a story?"),
        )
    answer = " ".join(rng.choice(slot).format(s=subject) for slot in phrases.STORY_SLOTS)
    pattern = " ".join("(?:" + "|".join(re.escape(line.format(s=subject)) for line in slot) + ")" for slot in phrases.STORY_SLOTS)
    return Example("stories", (("user", question), ("assistant", answer)), frozenset({f"word {subject}"}), (answer,), pattern)


def follow_up(split: Split, rng: random.Random) -> Example:
    """A second question that needs the first turn: go on with the result, or do something else with the word."""
    if rng.random() < 0.4:
        while True:
            first = rng.choice((addition, subtraction))(split, rng)
            result = int(first.accepted[0].rstrip(".").rsplit(" ", 1)[1])
            operand = rng.randint(1, 9)
            if 10 <= result <= 90 and split_of_pair(result, operand) == split:
                break
        question = ask(rng, f"Add {operand} to that.", f"And plus {operand}?", f"Now add {operand}.")
        answer = add_answer(result, operand)
        keys = first.keys | {pair_key(result, operand)}
    else:
        first = rng.choice((spelling, letters))(split, rng)
        (key,) = first.keys
        word = key.removeprefix("word ")
        question, answer = rng.choice((
            (ask(rng, "What is its first letter?", "And its first letter?"), f'The first letter of "{word}" is "{word[0]}".'),
            (ask(rng, "Now spell it.", "And how do you spell it?", "Spell it."), "-".join(word) + "."),
            (ask(rng, "How many letters does it have?", "How many letters are in it?"), counted(word)),
        ))  # fmt: skip
        keys = first.keys
    return Example("follow-up", (*first.messages, ("user", question), ("assistant", answer)), keys, (answer,))


def memory(split: Split, rng: random.Random) -> Example:
    """The user's name, asked for one turn later or after another exchange."""
    name = draw_word(split, rng, longest=9).capitalize()
    told = ask(rng, f"My name is {name}.", f"I am called {name}.", f"Call me {name}.", f"Hello, my name is {name}.")
    messages: tuple[Message, ...] = (("user", told), ("assistant", f"Nice to meet you, {name}! How can I help you?"))
    keys = frozenset({f"word {name.lower()}"})
    if rng.random() < 0.25:
        return Example("memory", messages, keys, (messages[-1][1],))
    if rng.random() < 0.6:
        between = rng.choice((addition, spelling, small_talk, commands, comparison))(split, rng)
        messages, keys = messages + between.messages, keys | between.keys
    answer = f"Your name is {name}."
    question = ask(rng, "What is my name?", "What am I called?", "Do you know my name?", "Do you remember my name?", "Who am I?")
    return Example("memory", (*messages, ("user", question), ("assistant", answer)), keys, (answer,))


def system_prompt(split: Split, rng: random.Random) -> Example:
    """A system prompt gives the assistant a name; the answer must use it."""
    name = draw_word(split, rng, longest=9).capitalize()
    prompt = rng.choice(
        (
            f"Your name is {name}.",
            f"You are {name}.",
            f"You are an assistant called {name}.",
            f"You are {name}, a helpful assistant.",
        )
    )
    question = ask(rng, "What is your name?", "Who are you?", "What are you called?", "Tell me your name.")
    answer = f"My name is {name}."
    return Example(
        "system prompt",
        (("system", prompt), ("user", question), ("assistant", answer)),
        frozenset({f"word {name.lower()}"}),
        (answer,),
    )
