"""Grammars compiled and followed: which tokens the masks allow, what is refused, what is kept."""

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tests.backend.engine.guided_text import EOS, PATIENCE_S, TOKENIZER, TOKENIZER_JSON, read
from tests.backend.scheduling.fakes import VOCAB_SIZE

from turbotriton.backend.engine.guided import MAX_CACHED_GRAMMARS, Grammars, MaskFiller, Matcher, find_tokenizer
from turbotriton.contract.errors import InvalidInputError

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WORDS = ["yes", "yes, sir", 'say "no"', "\\d+ ä\n/x/"]
LARK = 'start: "(" (NUMBER | start) ")"\nNUMBER: /[0-9]{1,3}/'


def is_person(text: str) -> bool:
    value = json.loads(text)
    return list(value) == ["name", "age"] and len(value["name"]) <= 9 and 0 <= value["age"] <= 150


KINDS: dict[str, tuple[tuple[str, str], Callable[[str], Any]]] = {
    "json_schema": (("json_schema", json.dumps(PERSON)), is_person),
    "regex": (("regex", r"[A-F]{2}-[0-9]{3}( ok)?"), re.compile(r"[A-F]{2}-[0-9]{3}( ok)?").fullmatch),
    "choice": (("choice", json.dumps(WORDS)), WORDS.__contains__),
    "grammar": (("grammar", LARK), re.compile(r"\(+[0-9]{1,3}\)+").fullmatch),
}


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = Grammars(TOKENIZER_JSON, VOCAB_SIZE, (EOS,))
    yield made
    made.close()


@pytest.fixture(scope="module")
def filler() -> Iterator[MaskFiller]:
    made = MaskFiller(VOCAB_SIZE)
    yield made
    made.close()


def allowed(filler: MaskFiller, *matchers: Matcher) -> list[list[int]]:
    """Ids that each matcher's mask has."""
    words = filler.start(list(enumerate(matchers))).wait()
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return [np.flatnonzero(row).tolist() for row in bits]


@pytest.mark.parametrize("kind", KINDS)
def test_any_walk_through_the_masks_ends_in_a_text_of_the_grammar(grammars: Grammars, filler: MaskFiller, kind: str) -> None:
    guided, matches = KINDS[kind]
    texts = set()
    for seed in range(12):
        dice, matcher, token_ids = random.Random(seed), grammars.open(guided).result(PATIENCE_S), []
        while not matcher.is_complete:
            (ids,) = allowed(filler, matcher)
            assert ids
            assert max(ids) < TOKENIZER.get_vocab_size()  # never an id of padding
            token_ids.append(dice.choice(ids))
            assert matcher.accept(token_ids[-1]) is None
            assert len(token_ids) < 2000
        texts.add(read(token_ids))
        assert matches(read(token_ids)), read(token_ids)
    assert len(texts) > 1


def test_any_json_object_is_one(grammars: Grammars, filler: MaskFiller) -> None:
    matcher, text = grammars.open(("json_object", "")).result(PATIENCE_S), '{"a": [1, true, {"b": null}]}'
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        assert token in allowed(filler, matcher)[0]
        assert matcher.accept(token) is None
    assert matcher.is_complete or allowed(filler, matcher)[0] == [EOS]


def test_end_of_text_is_allowed_only_where_the_grammar_may_end(grammars: Grammars, filler: MaskFiller) -> None:
    matcher = grammars.open(("regex", "ab?")).result(PATIENCE_S)
    assert EOS not in allowed(filler, matcher)[0]
    assert matcher.accept(TOKENIZER.token_to_id("a")) is None
    assert set(allowed(filler, matcher)[0]) == {TOKENIZER.token_to_id("b"), EOS}
    assert matcher.accept(EOS) is None
    assert matcher.is_complete


def test_token_outside_the_grammar_is_told(grammars: Grammars) -> None:
    matcher = grammars.open(("choice", '["a"]')).result(PATIENCE_S)
    reason = matcher.accept(TOKENIZER.token_to_id("b"))
    assert reason is not None
    assert "cannot go on" in reason
    assert not matcher.is_complete


def test_rows_of_one_step_have_masks_of_their_own(grammars: Grammars, filler: MaskFiller) -> None:
    first, second = (grammars.open(("choice", choice)).result(PATIENCE_S) for choice in ('["a"]', '["b"]'))
    a, b = TOKENIZER.token_to_id("a"), TOKENIZER.token_to_id("b")
    assert allowed(filler, first, second, first) == [[a], [b], [a]]


@pytest.mark.parametrize(
    ("guided", "words"),
    [
        (("json_schema", '{"type": "objekt"}'), "json_schema cannot be compiled: Invalid type: objekt"),
        (("json_schema", '{"$ref": "#/nowhere"}'), "'/nowhere' does not exist"),
        (("json_schema", '{"not": {}}'), '"not"'),
        (("regex", "(["), "unclosed character class"),
        (("grammar", "start: foo"), "unknown name"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(grammars: Grammars, guided: tuple[str, str], words: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        grammars.open(guided).result(PATIENCE_S)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_one_grammar_is_compiled_once_and_the_least_recently_used_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(TOKENIZER_JSON, VOCAB_SIZE, (EOS,))
    compiled: list[tuple[str, str]] = []
    original = Grammars._compile

    def counted(self: Grammars, guided: tuple[str, str]) -> Any:
        compiled.append(guided)
        return original(self, guided)

    monkeypatch.setattr(Grammars, "_compile", counted)
    kept = ("regex", "kept")
    for number in range(MAX_CACHED_GRAMMARS + 5):
        grammars.open(("regex", f"x{number}")).result(PATIENCE_S)
        grammars.open(kept).result(PATIENCE_S)
    assert compiled.count(kept) == 1
    grammars.open(("regex", "x0")).result(PATIENCE_S)
    assert compiled.count(("regex", "x0")) == 2
    grammars.close()


def test_tokenizer_is_found_in_either_layout(tmp_path: Any) -> None:
    beside, other = tmp_path / "text" / "1", tmp_path / "preprocessing" / "1"
    (beside / "weights").mkdir(parents=True)
    assert find_tokenizer(beside / "weights") is None
    for folder in (other, beside):
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        assert find_tokenizer(beside / "weights") == folder / "tokenizer" / "tokenizer.json"
