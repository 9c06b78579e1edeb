"""Stop words in a growing text: found wherever token borders fall, never shown in part."""

from collections.abc import Sequence

__all__ = ["StopWords"]


class StopWords:
    """Text goes in by `push`; what can no longer be the beginning of a stop word comes out.

    pushed so far   ......................|<- held: the longest end that begins a stop word
    """

    def __init__(self, words: Sequence[str], *, include: bool = False) -> None:
        """`include`: the matched word is part of the text that comes out."""
        self._words = tuple(word for word in words if word)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain now, the stop word that ended it or None). After a match nothing more may be pushed."""
        if not self._words:
            return text, None
        self._held += text
        found = [(at, word) for word in self._words if (at := self._held.find(word)) >= 0]
        if found:
            at, word = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            certain, self._held = self._held[: at + (len(word) if self._include else 0)], ""
            return certain, word
        keep = max(_overlap(self._held, word) for word in self._words)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain, None

    def flush(self) -> str:
        """What was held back when the text ends without a match."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `word`."""
    for size in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:size]):
            return size
    return 0
