"""Completions that begin with their prompt, as text or token ids, and its log-probabilities."""

from typing import Any

import pytest

from turbotriton.client.openai.answers import Choice, _offsets

from .scripted import ScriptedFleet, events, post

GREEDY = {"model": "demo", "temperature": 0}


@pytest.mark.parametrize(("prompt", "text"), [("one two", "one two"), ([4, 5], "t4 t5"), ([[4], [5, 6]], "t4")])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_begins_with_its_prompt(prompt: Any, text: str, stream: bool) -> None:
    fleet = ScriptedFleet()
    reply = post("completions", GREEDY | {"prompt": prompt, "echo": True, "stream": stream}, fleet)
    assert reply.status_code == 200, reply.text
    chunks = events(reply) if stream else [reply.json()]
    first = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == 0]
    assert "".join(choice["text"] for choice in first) == text + "Hello"
    assert all(options["exclude_input_in_output"] is False for _, _, options in fleet.asked)


@pytest.mark.parametrize("stream", [True, False])
def test_probabilities_of_the_prompt_come_first_and_its_first_token_has_none(stream: bool) -> None:
    fleet = ScriptedFleet()
    body = GREEDY | {"prompt": "one two three", "echo": True, "logprobs": 1, "stream": stream, "max_tokens": 2}
    reply = post("completions", body, fleet)
    assert reply.status_code == 200, reply.text
    chunks = events(reply) if stream else [reply.json()]
    found: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in chunk["choices"][0]["logprobs"].items():
            found.setdefault(name, []).extend(values)
    assert found["tokens"] == ["one", "two", "three", "Hel", "lo"]
    assert found["token_logprobs"] == [None, -0.25, -0.5, -0.5, -0.5]
    assert found["top_logprobs"] == [None, {}, {}, {"Hel": -0.5}, {"lo": -0.5}]
    assert found["text_offset"] == [0, 4, 8, 13, 16]
    assert fleet.asked[0][2]["sampling_parameters"] == {"prompt_logprobs": 1}


def test_without_echo_nobody_asks_for_the_prompts() -> None:
    fleet = ScriptedFleet()
    assert post("completions", GREEDY | {"prompt": "one two", "logprobs": 1}, fleet).json()["choices"][0]["text"] == "Hello"
    ((_, _, options),) = fleet.asked
    assert "sampling_parameters" not in options
    assert "exclude_input_in_output" not in options


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        ("one two", ["<s>", "one", " two"], [0, 0, 3]),  # BOS is not shown
        ("one two", ["one", "two"], [0, 4]),  # a decoder drops a space
        ("a\u00e9b", ["a", "\ufffd", "\ufffd", "b"], [0, 1, 1, 2]),  # a character in two tokens
        ("aa", ["a", "a"], [0, 1]),
    ],
)
def test_tokens_of_a_prompt_are_found_in_its_text(text: str, tokens: list[str], offsets: list[int]) -> None:
    choice = Choice(0, {"prompt": text}, {})
    assert list(_offsets(choice, text + "!", [{"token": token, "logprob": None} for token in tokens], [])) == offsets
