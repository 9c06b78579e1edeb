"""Callers that leave before anything came, over real sockets; and conversations that are cancelled while they answer."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.client.openai.test_chat_stream import SlowFleet, served, wait_until

TALK = {"prompt": "x", "session_id": 4, "interactive_mode": True}


@pytest.fixture
def fleet() -> SlowFleet:
    made = SlowFleet(["a", "b", "c", "d"])
    made.delay_s = 0.3
    return made


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
    fleet.delay_s = 60.0
    with httpx.Client(timeout=httpx.Timeout(5, read=0.3)) as http, pytest.raises(httpx.ReadTimeout):
        http.post(f"{url}/v1/{path}", json=body | {"stream": stream})
    assert len(fleet.asked) == body.get("n", 1)
    wait_until(lambda: fleet.num_open == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_cancelled_conversation_ends_with_a_reply_and_keeps_what_came(url: str, fleet: SlowFleet, stream: bool) -> None:
    replies: list[dict[str, Any]] = []

    def ask() -> None:
        with httpx.stream("POST", f"{url}/v1/chat/interactive", json=TALK | {"stream": stream}) as reply:
            replies.extend(json.loads(line) for line in reply.iter_lines())

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: fleet.num_given >= 2)
    assert httpx.post(f"{url}/v1/chat/interactive", json=TALK | {"prompt": "", "cancel": True}).status_code == 200
    asking.join(5)
    assert fleet.num_open == 0
    text = "".join(reply["text"] for reply in replies)
    assert text in ("ab", "abc")
    assert replies[-1]["finish_reason"] == "stop"
    assert replies[-1]["tokens"] == len(text)
    fleet.pieces, fleet.delay_s = ["e"], 0
    assert httpx.post(f"{url}/v1/chat/interactive", json=TALK | {"prompt": "y"}).json()["history_tokens"] == 7 + len(text)
    assert [message["content"] for message in fleet.asked[-1][1]["messages"]] == ["x", text, "y"]


def test_conversation_that_is_cancelled_before_its_first_token_is_as_before(url: str, fleet: SlowFleet) -> None:
    fleet.delay_s = 5.0

    async def run() -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=5) as http:
            asking = asyncio.create_task(http.post(f"{url}/v1/chat/interactive", json=TALK))
            while not fleet.num_open:
                await asyncio.sleep(0.01)
            await http.post(f"{url}/v1/chat/interactive", json=TALK | {"prompt": "", "cancel": True})
            reply: dict[str, Any] = (await asking).json()
            return reply

    assert asyncio.run(run()) == {"text": "", "tokens": 0, "input_tokens": 0, "history_tokens": 0, "finish_reason": "stop"}
    fleet.delay_s = 0
    assert httpx.post(f"{url}/v1/chat/interactive", json=TALK | {"prompt": "y"}).json()["history_tokens"] == 0


def test_second_question_while_the_first_is_answered_is_409(url: str, fleet: SlowFleet) -> None:
    with httpx.stream("POST", f"{url}/v1/chat/interactive", json=TALK | {"stream": True}):
        assert httpx.post(f"{url}/v1/chat/interactive", json=TALK).status_code == 409
