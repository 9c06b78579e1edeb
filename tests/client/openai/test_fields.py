"""Every field of every request: it changes what is asked for or answered, or is listed as without effect, or is refused by name."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel
from tests.client.openai.scripted import ScriptedFleet, post, with_app

from turbotriton.client.openai import access
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
        ("completions", TEXT | {"n": 129}, 400, "n: "),
        ("completions", TEXT | {"n": 64, "prompt": ["a", "b", "c"]}, 400, "192 answers"),
        *(("chat/completions", CHAT | {"messages": [{"role": "user", "content": "x", name: {"id": "y"}}]}, 400, f"messages[0].{name}")
          for name in ("audio", "function_call", "refusal")),
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


NULLABLE = {
    name: value for name, value in USED[ChatRequest][2].items() if name != "messages" and not isinstance(value, tuple)
} | {"user": "x", "store": False, "functions": [], "audio": {}}


def test_null_is_as_good_as_leaving_a_field_out() -> None:
    assert effect("chat/completions", CHAT | dict.fromkeys(NULLABLE)) == effect("chat/completions", CHAT)
    nulls = {"echo": None, "logprobs": None, "n": None, "max_tokens": None, "suffix": None}
    assert effect("completions", TEXT | nulls) == effect("completions", TEXT)
    assert effect("chat/interactive", TALK | {"stop": None, "top_p": None}) == effect("chat/interactive", TALK)
    assert_error(post("completions", TEXT | {"prompt": None}), 400, "prompt: Field required")


HALF = '"\\ud800"'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", '{"model": "demo", "messages": [{"role": "user", "content": %s}]}'),
        ("chat/completions", '{"model": "demo", "messages": [{"role": "user", "content": "x"}], %s: 1}'),
        ("chat/completions", '{"model": %s, "messages": [{"role": "user", "content": "x"}]}'),
        ("completions", '{"model": "demo", "prompt": %s}'),
        ("completions", '{"model": "demo", "prompt": "x", "guided_regex": %s}'),
        ("chat/interactive", '{"prompt": %s}'),
        ("encode", '{"input": %s}'),
    ],
)
def test_half_a_character_is_refused(path: str, body: str) -> None:
    assert_error(post(path, (body % HALF).encode()), 400, r"lone surrogate \ud800")


def test_nesting_without_end_is_refused() -> None:
    for depth in (300, 3_000, 100_000):
        body = b'{"model": "demo", "messages": [], "metadata": {"a": ' + b"[" * depth + b"]" * depth + b"}}"
        assert_error(post("chat/completions", body), 400, "")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", CHAT | {"messages": ["x"]}, "messages.0"),
        ("chat/completions", CHAT | {"messages": 5}, "messages"),
        ("chat/completions", CHAT | {"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ("completions", TEXT | {"prompt": [1, "a"]}, "prompt.1"),
        ("completions", TEXT | {"prompt": [2**31]}, "prompt.0"),
        ("completions", TEXT | {"guided_json": 5}, "guided_json"),
        ("completions", {"model": "demo"}, "prompt"),
        ("completions", TEXT | {"best_of": 2}, None),
    ],
)
def test_param_is_the_place_in_the_body(path: str, body: Any, param: str | None) -> None:
    error = post(path, body).json()["error"]
    assert error["param"] == param
    assert "Value error" not in error["message"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_half_a_character_that_is_not_escaped_is_refused(encoding: str) -> None:
    body = json.dumps(TEXT | {"prompt": "\ud800"}, ensure_ascii=False).encode(encoding, "surrogatepass")
    assert_error(post("completions", body), 400, r"lone surrogate \ud800")


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "application/json ;charset=utf-8"])
@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions_qos", TEXT), ("chat/interactive", TALK)])
def test_body_that_is_right_is_read_once(path: str, body: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fastapis(request: Any) -> Any:
        raise AssertionError("FastAPI reads it")

    monkeypatch.setattr(APIRoute, "get_route_handler", lambda self: fastapis)
    reply = post(path, body, headers={"content-type": kind})
    assert reply.status_code == (404 if "qos" in path else 200), reply.text  # this server has no QoS file
    assert post(path, body | {"n": -1}, headers={"content-type": kind}).status_code == 500


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_body_in_another_encoding_is_read(encoding: str) -> None:
    fleet = ScriptedFleet()
    assert post("completions", json.dumps(TEXT | {"prompt": "é"}, ensure_ascii=False).encode(encoding), fleet).status_code == 200
    assert fleet.asked[0][1] == {"prompt": "é"}


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain"])
def test_body_that_is_not_called_json_is_told_how(kind: str) -> None:
    assert_error(post("completions", TEXT, headers={"content-type": kind}), 400, "Content-Type: application/json")


@pytest.mark.parametrize("announced", [True, False])
def test_body_that_is_too_large_is_413(announced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MAX_BODY_BYTES", 1 << 20)

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"model": "demo", "prompt": "'
        for _ in range(17):
            yield b"x" * (1 << 16)
        yield b'"}'

    async def use(client: Any) -> Any:
        content = b"".join([piece async for piece in pieces()]) if announced else pieces()
        return await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})

    assert_error(with_app(ScriptedFleet(), use), 413, "1 MiB")


def test_fault_of_our_own_is_500_with_an_error_object() -> None:
    class Broken(ScriptedFleet):
        async def models(self) -> list[str]:
            raise ZeroDivisionError

    assert_error(post("completions", TEXT, Broken()), 500, "its log tells why", "server_error")


def test_one_model_can_be_asked_for() -> None:
    async def use(client: Any) -> Any:
        return await client.get("/v1/models/demo"), await client.get("/v1/models/some/other")

    found, missing = with_app(ScriptedFleet(), use)
    assert (found.json()["id"], found.json()["object"]) == ("demo", "model")
    assert_error(missing, 404, "`some/other` does not exist", "not_found_error")


@pytest.mark.parametrize("body", [CHAT, CHAT | {"n": 2}, CHAT | {"tools": TOOLS}])
def test_whole_answer_is_asked_for_as_a_whole(body: dict[str, Any]) -> None:
    for stream in (False, True):
        fleet = ScriptedFleet()
        assert post("chat/completions", body | {"stream": stream}, fleet).status_code == 200
        assert fleet.streams == [stream] * body.get("n", 1)
