"""Which operands and words belong to training, to the development split and to the held-out split.

The split is a property of the operand pair, the word or the phrasing itself (a checksum of it), never of the sample that
carries it, so nothing held out can appear in training under another operation, order or template.
Knows no kinds of questions. Operands that every answer needs as building blocks are always in training: pairs of one-digit
numbers, or of one below twenty and one digit (the tables of addition and subtraction), and pairs with a multiple of ten.
"""

import zlib
from typing import Literal

__all__ = ["Split", "split_of_number", "split_of_numbers", "split_of_pair", "split_of_text"]

Split = Literal["train", "dev", "test"]


def _bucket(key: str) -> Split:
    """8% held out ("test"), 4% for the adaptive mixing ("dev"), the rest trains."""
    bucket = zlib.crc32(key.encode()) % 100
    return "test" if bucket < 8 else "dev" if bucket < 12 else "train"


def split_of_pair(a: int, b: int) -> Split:
    """Split of the unordered operand pair, the same for every operation."""
    low, high = sorted((abs(a), abs(b)))
    if high < 10 or (low < 10 and high < 20) or low % 10 == 0 or high % 10 == 0:
        return "train"
    return _bucket(f"pair {low} {high}")


def split_of_number(number: int) -> Split:
    """Split of a single operand; one-digit numbers train."""
    return _bucket(f"number {number}") if number >= 10 else "train"


def split_of_numbers(numbers: list[int]) -> Split:
    """Split of a list as a multiset: another order of the same numbers is the same operand."""
    return _bucket("list " + " ".join(map(str, sorted(numbers))))


def split_of_text(text: str) -> Split:
    """Split of a word or of a whole phrasing, in lower case."""
    return _bucket("text " + text.lower())
