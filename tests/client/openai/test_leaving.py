"""Callers that leave before anything came, over real sockets; and conversations that are cancelled while they answer."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.client.openai.test_chat_stream import PATIENCE_S, SlowFleet, served, wait_until

TALK = {"prompt": "x", "session_id": 4, "interactive_mode": True}


NEVER_S = 3600.0


@pytest.fixture
def fleet() -> SlowFleet:
    return SlowFleet(["a", "b", "c", "d"])


@pytest.fixture
def url(fleet: SlowFleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with served(fleet, monkeypatch) as url:
        yield url


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"model": "demo", "messages": "x"}),
        ("chat/completions", {"model": "demo", "messages": "x", "n": 3}),
        ("completions", {"model": "demo", "prompt": "x"}),
        ("chat/interactive", {"prompt": "x"}),
    ],
)
def test_caller_that_leaves_before_the_first_token_frees_the_server(
    url: str, fleet: SlowFleet, path: str, body: dict[str, Any], stream: bool
) -> None:
    fleet.delays_s = (NEVER_S,)

    async def ask_and_leave() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
            asking = asyncio.create_task(http.post(f"{url}/v1/{path}", json=body | {"stream": stream}))
            while fleet.num_open < body.get("n", 1):
                assert not asking.done(), asking.result().text
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.wait([asking])

    asyncio.run(ask_and_leave())
    assert len(fleet.asked) == body.get("n", 1)
    wait_until(lambda: fleet.num_open == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_cancelled_conversation_ends_with_a_reply_and_keeps_what_came(url: str, fleet: SlowFleet, stream: bool) -> None:
    replies: list[dict[str, Any]] = []

    def ask() -> None:
        with httpx.stream("POST", f"{url}/v1/chat/interactive", json=TALK | {"stream": stream}, timeout=PATIENCE_S) as reply:
            replies.extend(json.loads(line) for line in reply.iter_lines())

    fleet.delays_s = (0.0, 0.0, NEVER_S)
    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: fleet.num_given == 2)
    assert (
        httpx.post(f"{url}/v1/chat/interactive", json=TALK | {"prompt": "", "cancel": True}, timeout=PATIENCE_S).status_code
        == 200
    )
    asking.join(PATIENCE_S)
    wait_until(lambda: fleet.num_open == 0)
    text = "".join(reply["text"] for reply in replies)
    assert text == "ab"
    assert replies[-1]["finish_reason"] == "stop"
    assert replies[-1]["tokens"] == len(text)
    fleet.pieces, fleet.delays_s = ["e"], (0.0,)
    assert httpx.post(f"{url}/v1/chat/interactive", json=TALK | {"prompt": "y"}, timeout=PATIENCE_S).json()[
        "history_tokens"
    ] == 7 + len(text)
    assert [message["content"] for message in fleet.asked[-1][1]["messages"]] == ["x", text, "y"]


def test_conversation_that_is_cancelled_before_its_first_token_is_as_before(url: str, fleet: SlowFleet) -> None:
    fleet.delays_s = (NEVER_S,)

    async def run() -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
            asking = asyncio.create_task(http.post(f"{url}/v1/chat/interactive", json=TALK))
            while not fleet.num_open:
                await asyncio.sleep(0.01)
            await http.post(f"{url}/v1/chat/interactive", json=TALK | {"prompt": "", "cancel": True})
            reply: dict[str, Any] = (await asking).json()
            return reply

    assert asyncio.run(run()) == {"text": "", "tokens": 0, "input_tokens": 0, "history_tokens": 0, "finish_reason": "stop"}
    fleet.delays_s = (0.0,)
    assert httpx.post(f"{url}/v1/chat/interactive", json=TALK | {"prompt": "y"}, timeout=PATIENCE_S).json()["history_tokens"] == 0


def test_second_question_while_the_first_is_answered_is_409(url: str, fleet: SlowFleet) -> None:
    fleet.delays_s = (0.0, NEVER_S)
    with httpx.stream("POST", f"{url}/v1/chat/interactive", json=TALK | {"stream": True}, timeout=PATIENCE_S):
        assert httpx.post(f"{url}/v1/chat/interactive", json=TALK, timeout=PATIENCE_S).status_code == 409
