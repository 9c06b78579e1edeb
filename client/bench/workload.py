"""What a benchmark sends and when: random token ids, ShareGPT conversations, or a recorded trace replayed."""

import csv
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from turbotriton.contract.errors import InvalidInputError

__all__ = ["Item", "LengthRange", "poisson_arrivals", "random_items", "sharegpt_items", "trace_items"]


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Lengths in tokens, drawn uniformly from [low, high]."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "LengthRange":
        """ "128" or "64:1024". Raises ValueError, as argparse wants it."""
        low, _, high = text.partition(":")
        found = cls(int(low), int(high or low))
        if not 1 <= found.low <= found.high:
            raise ValueError(text)
        return found

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class Item:
    """One request: text or token ids, and how many tokens to ask for. arrival_s: seconds after the start; None: when there is room."""

    prompt: str | None
    input_ids: tuple[int, ...] | None
    max_tokens: int
    arrival_s: float | None = None


def random_items(num: int, input_len: LengthRange, output_len: LengthRange, id_range: tuple[int, int], seed: int) -> list[Item]:
    """Prompts of uniformly drawn ids from [id_range[0], id_range[1]): no two share a prefix worth caching."""
    rng = random.Random(seed)
    return [Item(None, _random_ids(rng, input_len.draw(rng), id_range), output_len.draw(rng)) for _ in range(num)]


def _random_ids(rng: random.Random, length: int, id_range: tuple[int, int]) -> tuple[int, ...]:
    return tuple(rng.choices(range(*id_range), k=length))


def sharegpt_items(
    path: Path, num: int, output_len: LengthRange, count_tokens: Callable[[str], int] | None, seed: int
) -> list[Item]:
    """First questions of the conversations in a ShareGPT file, in a drawn order, again from the front when there are too few.

    count_tokens: asks for as many tokens as the recorded reply has; None: for output_len. Raises InvalidInputError.
    """
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(turns[0]["value"], turns[1]["value"]) for turns in map(_turns, conversations) if len(turns) >= 2]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{path} is no ShareGPT file (a list of {{'conversations': [{{'value': ...}}]}}): {error}"
        ) from None
    if not pairs:
        raise InvalidInputError(f"{path} has no conversation of two turns")
    rng = random.Random(seed)
    rng.shuffle(pairs)
    chosen = itertools.islice(itertools.cycle(pairs), num)
    return [
        Item(question, None, max(1, count_tokens(reply)) if count_tokens else output_len.draw(rng)) for question, reply in chosen
    ]


def _turns(entry: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    return entry["conversations"] if "conversations" in entry else entry["conversation"]


def trace_items(path: Path, num: int | None, speed: float, id_range: tuple[int, int], seed: int) -> list[Item]:
    """A CSV with TIMESTAMP, ContextTokens and GeneratedTokens (the format of Azure's LLM inference traces), replayed with its
    arrival times divided by `speed`; the prompts are random ids of the recorded lengths. Raises InvalidInputError."""
    rng = random.Random(seed)
    items = []
    first: float | None = None
    for line, row in enumerate(itertools.islice(_rows(path), num), start=2):
        try:
            at = _seconds(row["TIMESTAMP"])
            num_input, num_output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidInputError(
                f"{path}, line {line}: expected TIMESTAMP,ContextTokens,GeneratedTokens, found {row}: {error}"
            ) from None
        first = at if first is None else first
        ids = _random_ids(rng, max(1, num_input), id_range)
        items.append(Item(None, ids, max(1, num_output), max(0.0, at - first) / speed))
    if not items:
        raise InvalidInputError(f"{path} has no row")
    return sorted(items, key=lambda item: item.arrival_s or 0.0)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{path} cannot be read: {error}") from None


def _seconds(stamp: str) -> float:
    """Seconds of a number or of a date such as "2023-11-16 18:17:03.9799600" (digits beyond microseconds are dropped)."""
    try:
        return float(stamp)
    except ValueError:
        whole, _, fraction = stamp.partition(".")
        digits = fraction[:6].ljust(6, "0") if fraction else "0"
        return datetime.fromisoformat(whole).timestamp() + int(digits) / 1e6


def poisson_arrivals(items: Sequence[Item], rate: float, seed: int) -> list[Item]:
    """The same items arriving `rate` a second with exponential gaps; infinity: all at once."""
    rng = random.Random(seed)
    gaps: Iterable[float] = (0.0 if math.isinf(rate) else rng.expovariate(rate) for _ in items)
    return [dataclasses.replace(item, arrival_s=at) for item, at in zip(items, itertools.accumulate(gaps), strict=True)]
