"""Chunks that have text alone are written from parts; every other one from its fields."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from tests.client.openai.scripted import ScriptedFleet, post

from turbotriton.client.openai.answers import CompletionAnswer
from turbotriton.client.openai.chat_answers import ChatAnswer
from turbotriton.client.openai.schema import CompletionRequest


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": "x"}),
        ("chat/completions", {"messages": "x", "n": 3, "stream_options": {"include_usage": True}}),
        ("chat/completions", {"messages": "x", "logprobs": True}),
        ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}),
        ("completions", {"prompt": "x", "echo": True, "n": 2}),
        ("completions", {"prompt": "x", "logprobs": 1}),
        ("completions", {"prompt": "x", "echo": True, "logprobs": 1}),
    ],
)
def test_a_chunk_of_text_alone_is_the_one_that_is_made_of_all_its_fields(
    monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr("time.time", lambda: 1.0)
    monkeypatch.setattr("uuid.uuid4", lambda: SimpleNamespace(hex="0"))
    fleet = ScriptedFleet(['a"b', "grüß\n", "", "\u2028", "end"])
    by_text = post(path, {"model": "demo", "stream": True, **body}, fleet).text
    for kind in (ChatAnswer, CompletionAnswer):
        monkeypatch.setattr(kind, "_is_plain", lambda *_: False)
    assert post(path, {"model": "demo", "stream": True, **body}, fleet).text == by_text
    assert by_text.endswith("data: [DONE]\n\n")


def test_the_last_chunk_the_usage_and_the_end_are_sent_at_once() -> None:
    request = CompletionRequest(model="demo", prompt="x", stream=True, stream_options={"include_usage": True})
    answer = CompletionAnswer(ScriptedFleet(["a", "b"]), request)

    async def run() -> list[list[str]]:
        return [together async for together in answer.chunks()]

    first, last = asyncio.run(run())
    assert len(first) == 1
    assert json.loads(last[0])["choices"][0]["finish_reason"] == "stop"
    assert json.loads(last[1])["usage"]["completion_tokens"] == 2
    assert last[2:] == ["[DONE]"]
