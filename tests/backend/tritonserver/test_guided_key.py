"""`guided` of the sampling JSON: its five forms as the engine has them, and every other shape refused by name."""

from typing import Any

import pytest

from turbotriton.backend.tritonserver.guided_key import read_guided
from turbotriton.contract.errors import InvalidInputError
from turbotriton.contract.wire import MAX_GUIDED_BYTES, SamplingParams


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"json_schema": {"type": "object", "title": "é"}}, ("json_schema", '{"type":"object","title":"é"}')),
        ({"json_schema": ' {"b": 1, "a": 2} '}, ("json_schema", '{"b":1,"a":2}')),
        ({"json_schema": True}, ("json_schema", "true")),
        ({"json_object": True}, ("json_object", "")),
        ({"regex": "a+"}, ("regex", "a+")),
        ({"grammar": "start: x"}, ("grammar", "start: x")),
        ({"choice": ["a", "b"]}, ("choice", '["a", "b"]')),
    ],
)
def test_forms(given: Any, found: tuple[str, str]) -> None:
    assert read_guided(given) == found
    SamplingParams(guided=found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("regex", "one of json_schema"),
        ({}, "one of json_schema"),
        ({"regexp": "a"}, "'regexp'"),
        ({"regex": "a", "choice": ["b"]}, "'regex', 'choice'"),
        ({"json_object": False}, "must be true"),
        ({"json_schema": "{nope"}, "no JSON"),
        ({"json_schema": 5}, "json_schema"),
        ({"regex": ""}, "not empty"),
        ({"grammar": ["start: x"]}, "grammar must be a text"),
        ({"choice": []}, "choice must be a list"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": "a"}, "choice must be a list"),
    ],
)
def test_other_shapes_are_refused(given: Any, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        read_guided(given)


def test_size_is_bounded_and_ignore_eos_excluded() -> None:
    SamplingParams(guided=("regex", "a" * MAX_GUIDED_BYTES))
    with pytest.raises(InvalidInputError, match="at most 65536"):
        SamplingParams(guided=("regex", "a" * (MAX_GUIDED_BYTES + 1)))
    with pytest.raises(InvalidInputError, match="ignore_eos"):
        SamplingParams(guided=("regex", "a"), ignore_eos=True)
