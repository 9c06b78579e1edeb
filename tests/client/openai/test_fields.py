"""Every field of every request: it changes what is asked for or answered, or is listed as without effect, or is refused by name."""

import json
from typing import Any

import pytest
from pydantic import BaseModel
from tests.client.openai.scripted import ScriptedFleet, post

from turbotriton.client.openai.schema import IGNORED, ChatRequest, CompletionRequest, EncodeRequest, InteractiveRequest
from turbotriton.contract.errors import (
    DeadlineExceededError,
    InvalidInputError,
    RequestCancelledError,
    ServerError,
    TurbotritonError,
    UnavailableError,
)

MESSAGES = [{"role": "user", "content": "x"}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CHAT, TEXT, TALK = {"model": "demo", "messages": MESSAGES}, {"model": "demo", "prompt": "x"}, {"prompt": "x"}
#: field -> a value other than its default, or (value, what must stand beside it)
SHARED: dict[str, Any] = {
    "stream": True,
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "temperature": 0.25,
    "top_p": 0.5,
    "n": 2,
    "max_tokens": 5,
    "stop": ["end"],
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"7": 1.5},
    "seed": 4,
    "top_k": 3,
    "min_p": 0.1,
    "min_tokens": 2,
    "repetition_penalty": 1.5,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "stop_token_ids": [3],
    "bad_words": ["no"],
    "priority": 5,
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_grammar": 'start: "a"',
    "guided_choice": ["a"],
}
USED: dict[type[BaseModel], tuple[str, dict[str, Any], dict[str, Any]]] = {
    ChatRequest: (
        "chat/completions",
        CHAT,
        SHARED
        | {
            "messages": [{"role": "user", "content": "y"}],
            "max_completion_tokens": 5,
            "logprobs": True,
            "top_logprobs": (1, {"logprobs": True}),
            "response_format": {"type": "json_object"},
            "tools": TOOLS,
            "tool_choice": ("required", {"tools": TOOLS}),
            "parallel_tool_calls": (False, {"tools": TOOLS}),
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ),
    CompletionRequest: ("completions", TEXT, SHARED | {"prompt": "y", "logprobs": 1, "echo": True}),
    InteractiveRequest: (
        "chat/interactive",
        TALK,
        {
            "prompt": "y",
            "stream": True,
            "stop": "end",
            "request_output_len": 5,
            "top_p": 0.5,
            "top_k": 3,
            "temperature": 0.25,
            "repetition_penalty": 1.5,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "cancel": (True, {"session_id": 5}),
        },
    ),
}
#: Fields with tests of their own, and where.
ELSEWHERE = {
    ChatRequest: {"model": "test_wrong_values", "user_id": "test_qos.py"},
    CompletionRequest: {"model": "test_wrong_values", "user_id": "test_qos.py"},
    InteractiveRequest: {
        "session_id": "tests/e2e/test_openai.py",
        "user_id": "test_qos.py",
        "interactive_mode": "tests/e2e/test_openai.py",
    },
}
REFUSED: dict[type[BaseModel], dict[str, Any]] = {
    ChatRequest: {},
    CompletionRequest: {"suffix": "y", "best_of": 3},
    InteractiveRequest: {"adapter_name": "x"},
}
CALLS = ['<tool_call>{"name": "add", "arguments": {}}</tool_call><tool_call>{"name": "add", "arguments": {}}</tool_call>']


def effect(path: str, body: dict[str, Any]) -> Any:
    """What the fleet was asked for, and the answer without its id, time and calls' ids."""
    fleet = ScriptedFleet(CALLS)
    reply = post(path, body, fleet)
    assert reply.status_code == 200, reply.text
    text = reply.text
    for noise in {value for line in text.splitlines() for value in noises(line.removeprefix("data: "))}:
        text = text.replace(noise, "")
    return fleet.asked, reply.headers["content-type"], text


def noises(line: str) -> list[str]:
    try:
        found = json.loads(line)
    except ValueError:
        return []
    calls = [
        call["id"]
        for choice in found.get("choices", ())
        for call in choice.get("message", {}).get("tool_calls", ())
        if "id" in call
    ]
    return [str(found[name]) for name in ("id", "created") if name in found] + calls


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, (_, _, used) in USED.items() for field in used])
def test_field_changes_something(kind: type[BaseModel], field: str) -> None:
    path, base, used = USED[kind]
    value, beside = used[field] if isinstance(used[field], tuple) else (used[field], {})
    assert effect(path, base | beside | {field: value}) != effect(path, base | beside)


@pytest.mark.parametrize("kind", USED)
def test_every_field_is_in_one_of_the_lists(kind: type[BaseModel]) -> None:
    known = {*USED[kind][2], *ELSEWHERE[kind], *REFUSED[kind]} | (set() if kind is InteractiveRequest else set(IGNORED))
    assert known == set(kind.model_fields)
    assert set(EncodeRequest.model_fields) == {"input", "do_preprocess", "add_bos"}  # tests/e2e/test_openai.py


@pytest.mark.parametrize("field", IGNORED)
@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_field_without_effect_is_taken_and_has_none(kind: type[BaseModel], field: str) -> None:
    path, base, _ = USED[kind]
    value = {"metadata": {"a": "b"}, "store": False, "session_id": 3}.get(field, "x")
    assert effect(path, base | {field: value}) == effect(path, base)


@pytest.mark.parametrize(
    ("kind", "field", "value"), [(kind, field, value) for kind, fields in REFUSED.items() for field, value in fields.items()]
)
def test_unsupported_field_is_refused_by_name(kind: type[BaseModel], field: str, value: Any) -> None:
    path, base, _ = USED[kind]
    assert_error(post(path, base | {field: value}), 400, field)


def assert_error(reply: Any, status: int, words: str, kind: str = "invalid_request_error") -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == kind
    assert words in error["message"], error


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        *(("chat/completions", CHAT | {name: -3}, 400, name) for name in ("temperature", "top_p", "n", "max_tokens", "top_k", "min_p")),
        *(("completions", TEXT | {name: -3}, 400, name) for name in ("min_tokens", "repetition_penalty", "logprobs", "best_of")),
        *(("chat/completions", CHAT | {name: -3}, 400, name) for name in ("presence_penalty", "frequency_penalty", "top_logprobs")),
        ("completions", TEXT | {"stop_token_ids": [-1]}, 400, "stop_token_ids"),
        ("chat/interactive", TALK | {"request_output_len": -1}, 400, "request_output_len"),
        *(("chat/completions", CHAT | {name: "x"}, 400, f"'{name}'") for name in ("audio", "modalities", "functions", "reasoning_effort")),
        ("completions", TEXT | {"prompt": []}, 400, "empty"),
        ("completions", TEXT | {"prompt": ["a", ""]}, 400, "empty"),
        ("completions", {"model": "demo"}, 400, "prompt"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
        ("chat/completions", CHAT | {"response_format": {"type": "json_schema"}}, 400, "json_schema"),
        ("chat/completions", CHAT | {"response_format": {"type": "xml"}}, 400, "response_format"),
        ("chat/completions", CHAT | {"guided_regex": "a", "response_format": {"type": "json_object"}}, 400, "exclude"),
        ("chat/completions", CHAT | {"model": "gpt-9"}, 404, "`gpt-9` does not exist"),
        ("completions", TEXT | {"model": "gpt-9"}, 404, "served: demo"),
        ("completions", b"{nope", 400, "no JSON"),
        ("completions", b"", 400, ""),
        ("completions", b"[1]", 400, ""),
        ("completions", b'"\xff"', 400, ""),
        ("embeddings", {"model": "demo", "input": "x"}, 400, "no embeddings"),
        ("nowhere", {}, 404, "/v1/nowhere"),
    ],
)  # fmt: skip
def test_wrong_values(path: str, body: Any, status: int, words: str) -> None:
    assert_error(post(path, body), status, words, "not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidInputError("the prompt has 900 tokens and session_len is 512: too long"), 400, "context_length_exceeded"),
        (InvalidInputError("guided: the regex cannot be compiled"), 400, None),
        (UnavailableError("the queue is full: 9 requests wait"), 429, "queue_full"),
        (UnavailableError("no tritonserver answers at x"), 503, "unavailable"),
        (DeadlineExceededError("too late"), 504, "deadline_exceeded"),
        (RequestCancelledError("gone"), 499, "cancelled"),
        (ServerError("broken"), 502, None),
    ],
)
def test_failure_of_the_engine_has_its_status(
    path: str, error: TurbotritonError, status: int, code: str | None, stream: bool
) -> None:
    reply = post(path, (CHAT if "chat" in path else TEXT) | {"stream": stream}, ScriptedFleet(error=error))
    assert reply.status_code == status
    assert reply.json()["error"]["code"] == code
    assert reply.json()["error"]["message"] == str(error)
    assert ("retry-after" in reply.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        (b"Bearer wrong", 401),
        (b"Basic second", 401),
        (b"Bearer", 401),
        (b"Bearer s\xe9cond", 401),
        (b"Bearer second", 200),
        (b"bearer first", 200),
    ],
)
def test_keys(authorization: bytes | None, status: int) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    reply = post("completions", TEXT, headers=headers, api_keys=["first", "second"])
    assert reply.status_code == status
    if status == 401:
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.json()["error"]["type"] == "authentication_error"
