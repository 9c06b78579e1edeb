"""Stop words end a text wherever the pieces are cut, and no part of one is ever shown."""

from hypothesis import given
from hypothesis import strategies as st

from turbotriton.text.stop_words import StopWords

LETTERS = st.text(alphabet="ab ", max_size=20)
WORDS = st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), min_size=1, max_size=3)


def first_match(text: str, words: list[str]) -> tuple[int, str] | None:
    found = [(text.find(word), word) for word in words if word in text]
    return min(found, key=lambda pair: (pair[0], -len(pair[1]))) if found else None


@given(text=LETTERS, words=WORDS, include=st.booleans())
def test_text_ends_at_the_first_match_in_time(text: str, words: list[str], include: bool) -> None:
    """Letter by letter, the word that completes first ends the text; up to it everything is shown."""
    end = next((i for i in range(len(text) + 1) if first_match(text[:i], words)), None)
    stream = StopWords(words, include=include)
    shown = ""
    for letter in text:
        piece, matched = stream.push(letter)
        shown += piece
        if matched is not None:
            assert end is not None
            at, word = first_match(text[:end], words) or (0, "")
            assert (matched, shown) == (word, text[: at + (len(word) if include else 0)])
            return
    assert end is None
    assert shown + stream.flush() == text


@given(pieces=st.lists(LETTERS, max_size=6), words=WORDS)
def test_what_is_shown_is_never_taken_back(pieces: list[str], words: list[str]) -> None:
    """No shown text ends in a part of a word that the next piece completes."""
    stream = StopWords(words)
    shown, text = "", ""
    for piece in pieces:
        text += piece
        certain, matched = stream.push(piece)
        shown += certain
        assert text.startswith(shown)
        if matched is not None:
            assert not any(word in shown for word in words)
            return
        held = text[len(shown) :]
        assert not held or any(word.startswith(held) for word in words)


def test_a_word_across_three_pieces_matches() -> None:
    stream = StopWords(["</answer>"])
    assert [stream.push(piece) for piece in ("42</", "ans", "wer> more")] == [("42", None), ("", None), ("", "</answer>")]


def test_an_almost_match_is_given_back() -> None:
    stream = StopWords(["User:"])
    assert stream.push("a Use") == ("a ", None)
    assert stream.push("ful") == ("Useful", None)


def test_without_words_text_passes() -> None:
    assert StopWords([]).push("anything") == ("anything", None)
