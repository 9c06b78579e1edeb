"""Kinds about numbers: sums, differences, comparing, counting, sorting, neighbours and parity."""

import random

from .examples import Example, ask, draw_pair, one_turn, pair_key
from .splits import Split, split_of_number, split_of_numbers, split_of_pair

__all__ = ["add_answer", "addition", "comparison", "counting", "number_facts", "sorting", "subtraction"]


def add_answer(a: int, b: int) -> str:
    """Digit by digit from the ones, as on paper: 47 + 85 is "7 + 5 = 12, 4 + 8 + 1 = 13, so it is 132."."""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    ones = a % 10 + b % 10
    carry = " + 1" if ones > 9 else ""
    return f"{a % 10} + {b % 10} = {ones}, {a // 10} + {b // 10}{carry} = {a // 10 + b // 10 + ones // 10}, so it is {a + b}."


def _subtract_answer(a: int, b: int) -> str:
    """As add_answer, a >= b: 85 - 47 is "15 - 7 = 8, 7 - 4 = 3, so it is 38."."""
    if a < 10:
        return f"{a} - {b} = {a - b}."
    borrow = a % 10 < b % 10
    ones, tens = a % 10 + 10 * borrow, a // 10 - borrow
    return f"{ones} - {b % 10} = {ones - b % 10}, {tens} - {b // 10} = {tens - b // 10}, so it is {a - b}."


def addition(split: Split, rng: random.Random) -> Example:
    a, b = draw_pair(split, rng)
    question = ask(
        rng, f"What is {a} + {b}?", f"What is {a} plus {b}?", f"Add {a} and {b}.", f"{a} + {b}", f"Calculate {a} + {b}.",
        f"How much is {a} + {b}?",
    )  # fmt: skip
    return one_turn("addition", question, add_answer(a, b), pair_key(a, b))


def subtraction(split: Split, rng: random.Random) -> Example:
    a, b = draw_pair(split, rng)
    a, b = max(a, b), min(a, b)
    question = ask(
        rng, f"What is {a} - {b}?", f"What is {a} minus {b}?", f"{a} - {b}", f"Calculate {a} - {b}.", f"How much is {a} - {b}?",
    )  # fmt: skip
    return one_turn("subtraction", question, _subtract_answer(a, b), pair_key(a, b))


def comparison(split: Split, rng: random.Random) -> Example:
    a, b = draw_pair(split, rng)
    word = rng.choice(("larger", "smaller"))
    question = ask(
        rng, f"Which is {word}, {a} or {b}?", f"What is {word}: {a} or {b}?", f"Which number is {word}, {a} or {b}?",
        f"Which one is {word}: {a} or {b}?",
    )  # fmt: skip
    if a == b:
        answer = f"{a} and {b} are equal."
    else:
        first, second = (max(a, b), min(a, b)) if word == "larger" else (min(a, b), max(a, b))
        answer = f"{first} is {word} than {second}."
    return one_turn("comparison", question, answer, pair_key(a, b))


def counting(split: Split, rng: random.Random) -> Example:
    while True:
        start = rng.randint(0, rng.choice((12, 99)))
        stop = start + rng.randint(1, 10)
        if split_of_pair(start, stop) == split:
            break
    question = ask(
        rng, f"Count from {start} to {stop}.", f"Please count from {start} to {stop}.", f"Can you count from {start} to {stop}?"
    )
    return one_turn("counting", question, ", ".join(map(str, range(start, stop + 1))) + ".", pair_key(start, stop))


def sorting(split: Split, rng: random.Random) -> Example:
    while True:
        numbers = rng.sample(range(10), rng.randint(3, 5))
        if split_of_numbers(numbers) == split:
            break
    listed = ", ".join(map(str, numbers))
    question = ask(rng, f"Sort {listed}.", f"Sort these numbers: {listed}.", f"Put in order: {listed}.")
    answer = ", ".join(map(str, sorted(numbers))) + "."
    return one_turn("sorting", question, answer, "list " + " ".join(map(str, sorted(numbers))))


def number_facts(split: Split, rng: random.Random) -> Example:
    while True:
        number = rng.randint(1, rng.choice((99, 999)))
        if split_of_number(number) == split:
            break
    if rng.random() < 0.5:
        question = ask(rng, f"Is {number} even or odd?", f"Is the number {number} even or odd?", f"Is {number} odd or even?")
        answer = f"{number} is {'odd' if number % 2 else 'even'}."
    elif rng.random() < 0.5:
        question = ask(
            rng, f"What comes after {number}?", f"Which number comes after {number}?", f"What is the next number after {number}?"
        )
        answer = f"After {number} comes {number + 1}."
    else:
        question = ask(
            rng, f"What comes before {number}?", f"Which number comes before {number}?", f"What is the number before {number}?"
        )
        answer = f"Before {number} comes {number - 1}."
    return one_turn("number facts", question, answer, f"number {number}")
