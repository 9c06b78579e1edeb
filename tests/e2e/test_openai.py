"""The OpenAI server in front of a real tritonserver, driven by OpenAI's own client."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.throttle import throttled

from turbotriton.client import Client

from .engine import PATIENCE_S, cancelling, wait_until, watched
from .metrics import wait_idle
from .openai_server import api_server
from .processes import engine_pid
from .server import TritonServer

pytestmark = pytest.mark.e2e

SUM: list[Any] = [{"role": "user", "content": "What is 12 + 30?"}]
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0}
ENDLESS: dict[str, Any] = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def base_url(demo_server: TritonServer) -> Iterator[str]:
    with api_server(demo_server.grpc_url) as url:
        yield url


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected(demo_server: TritonServer) -> Any:
    """The same question over gRPC."""
    with Client(demo_server.grpc_url) as grpc_client:
        return grpc_client.generate(messages=SUM, temperature=0.0)


def test_whole_chat_answer_is_the_text_doors(client: openai.OpenAI, expected: Any) -> None:
    answer = client.chat.completions.create(messages=SUM, **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.model == "demo"
    assert abs(answer.created - time.time()) < 60
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "stop")
    assert choice.logprobs is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.num_input_tokens, expected.num_output_tokens)


def test_streamed_chat_answer_is_the_same_with_role_first_and_usage_last(client: openai.OpenAI, expected: Any) -> None:
    chunks = list(client.chat.completions.create(messages=SUM, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == expected.num_output_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_200_streams_at_once_end_right(base_url: str, expected: Any, demo_server: TritonServer) -> None:
    async def run() -> list[tuple[str, str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=120) as many:

            async def one() -> tuple[str, str | None]:
                stream = await many.chat.completions.create(messages=SUM, stream=True, **GREEDY)
                text, reason = "", None
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                    reason = chunk.choices[0].finish_reason or reason
                return text, reason

            return await asyncio.gather(*(one() for _ in range(200)))

    assert asyncio.run(run()) == [(expected.text, "stop")] * 200
    wait_idle(demo_server)


def test_n_choices_of_a_seed_are_the_same_streamed_and_whole(client: openai.OpenAI) -> None:
    story = [{"role": "user", "content": "Tell me a story."}]
    request: dict[str, Any] = {"model": "demo", "messages": story, "n": 3, "seed": 7, "temperature": 2, "max_tokens": 24}
    request["extra_body"] = {"top_k": 0}
    whole = client.chat.completions.create(**request)
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **request):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    texts = [choice.message.content for choice in whole.choices]
    assert texts == streamed
    assert len(set(texts)) == 3
    assert whole.usage is not None
    assert whole.usage.prompt_tokens < 40


def test_chat_logprobs_have_a_token_of_the_answer_each(client: openai.OpenAI, expected: Any) -> None:
    answer = client.chat.completions.create(messages=SUM, logprobs=True, top_logprobs=3, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content).startswith(expected.text)
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)  # greedy: the drawn one is the likeliest
        assert token.bytes == list(token.token.encode())


@pytest.mark.parametrize("option", ["max_tokens", "max_completion_tokens"])
def test_answer_that_reaches_its_limit_says_length(client: openai.OpenAI, option: str) -> None:
    answer = client.chat.completions.create(messages=SUM, **GREEDY, **{option: 3})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("stop", ["+", ["never", "+"]])
def test_stop_words_end_the_answer_before_them(client: openai.OpenAI, stop: Any) -> None:
    answer = client.chat.completions.create(messages=SUM, stop=stop, **GREEDY)
    assert answer.choices[0].finish_reason == "stop"
    assert "+" not in (answer.choices[0].message.content or "+")


def test_logit_bias_bans_and_forces(client: openai.OpenAI, base_url: str) -> None:
    def ids(text: str) -> list[int]:
        found: list[int] = httpx.post(f"{base_url}/v1/encode", json={"input": text}, timeout=PATIENCE_S).json()["input_ids"]
        return found

    (forced,) = ids("Hello")
    answer = client.completions.create(prompt="Hello", logit_bias={str(forced): 100}, max_tokens=4, **GREEDY)
    assert answer.choices[0].text == "HelloHelloHelloHello"
    plain = client.completions.create(prompt="Hello", max_tokens=1, **GREEDY).choices[0].text
    (banned,) = ids(plain)
    other = client.completions.create(prompt="Hello", max_tokens=1, logit_bias={str(banned): -100}, **GREEDY).choices[0].text
    assert other != plain


def test_completions_take_text_ids_and_batches(client: openai.OpenAI, base_url: str) -> None:
    ids = httpx.post(f"{base_url}/v1/encode", json={"input": "Hello there"}, timeout=PATIENCE_S).json()["input_ids"]
    text = client.completions.create(prompt="Hello there", **GREEDY).choices[0]
    assert client.completions.create(prompt=ids, **GREEDY).choices[0].text == text.text
    both = client.completions.create(prompt=["Hello there", "What"], n=2, **GREEDY)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices[:2]] == [text.text] * 2
    echoed = client.completions.create(prompt="Hello there", echo=True, **GREEDY).choices[0]
    assert echoed.text == "Hello there" + text.text
    assert (
        "".join(c.choices[0].text for c in client.completions.create(prompt="Hello there", echo=True, stream=True, **GREEDY))
        == echoed.text
    )


def test_the_prompt_is_echoed_with_the_probabilities_that_it_had_when_it_was_made(client: openai.OpenAI, base_url: str) -> None:
    """What an evaluation by likelihood asks for: token ids, echo, no new token."""
    ids = httpx.post(f"{base_url}/v1/encode", json={"input": "Hello there"}, timeout=PATIENCE_S).json()["input_ids"]
    made = client.completions.create(prompt=ids, logprobs=1, max_tokens=5, **GREEDY).choices[0]
    assert made.logprobs is not None
    whole = httpx.post(f"{base_url}/v1/encode", json={"input": "Hello there" + made.text}, timeout=PATIENCE_S).json()["input_ids"]
    assert whole[: len(ids)] == ids
    scored = client.completions.create(prompt=whole, echo=True, logprobs=1, max_tokens=0, **GREEDY).choices[0]
    assert scored.text == "Hello there" + made.text
    assert scored.finish_reason == "length"
    assert scored.logprobs is not None
    tokens, values = scored.logprobs.tokens or [], scored.logprobs.token_logprobs or []
    assert len(tokens) == len(values) == len(whole)
    assert values[0] is None
    assert all(value < 0 for value in values[1:])
    assert tokens[len(ids) :] == made.logprobs.tokens
    assert values[len(ids) :] == pytest.approx(made.logprobs.token_logprobs, abs=1e-3)
    assert (scored.logprobs.top_logprobs or [])[len(ids) :] == [
        {token: pytest.approx(value, abs=1e-3) for token, value in top.items()} for top in made.logprobs.top_logprobs or []
    ]


def test_completion_logprobs_carry_offsets_into_the_text(client: openai.OpenAI) -> None:
    choice = client.completions.create(prompt="Hello", logprobs=2, max_tokens=6, **GREEDY).choices[0]
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert len(tokens) == len(choice.logprobs.token_logprobs or []) == len(choice.logprobs.top_logprobs or []) == 6
    assert [choice.text[offset : offset + len(token)] for offset, token in zip(offsets, tokens, strict=True)] == tokens


@pytest.mark.parametrize("stream", [True, False])
def test_caller_that_leaves_frees_the_engine(base_url: str, demo_server: TritonServer, stream: bool) -> None:
    body = {"model": "demo", "messages": SUM, "stream": stream, "max_tokens": 1500, "ignore_eos": True}
    with cancelling(demo_server) as engine, throttled(engine_pid(demo_server)):
        asyncio.run(_leave(f"{base_url}/v1/chat/completions", body, lambda: engine.newest.num_running == 1))
    wait_idle(demo_server)


async def _leave(url: str, body: Any, may_leave: Callable[[], bool]) -> None:
    """Asks, and hangs up without a look at the answer."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        asking = asyncio.create_task(http.post(url, json=body))
        while not may_leave():
            assert not asking.done(), asking.result().text
            await asyncio.sleep(0.02)
        asking.cancel()
        await asyncio.wait([asking])


def test_refused_choices_leave_nothing_behind(base_url: str, demo_server: TritonServer) -> None:
    """Each of the 128 streams is read to its end after its error: the server that this module stops could not end otherwise."""

    async def run() -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            body = {"model": "demo", "prompt": [99999999], "n": 128}
            for _ in range(3):
                replies = await asyncio.gather(*(http.post(f"{base_url}/v1/completions", json=body) for _ in range(4)))
                assert {reply.status_code for reply in replies} == {400}

    asyncio.run(run())
    wait_idle(demo_server)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat/completions", {"messages": SUM}, 400, "model"),
        ("chat/completions", {"model": "gpt-9", "messages": SUM}, 404, "`gpt-9` does not exist"),
        ("chat/completions", {"model": "demo", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "demo", "messages": [{"role": "king", "content": "x"}]}, 400, "'king'"),
        ("chat/completions", {"model": "demo", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
        ("chat/completions", {"model": "demo", "messages": SUM, "temperature": -1}, 400, "temperature"),
        ("chat/completions", {"model": "demo", "messages": SUM, "top_p": 1.5}, 400, "top_p"),
        ("chat/completions", {"model": "demo", "messages": SUM, "n": 0}, 400, "n"),
        ("chat/completions", {"model": "demo", "messages": SUM, "max_tokens": -5}, 400, "max_tokens"),
        ("chat/completions", {"model": "demo", "messages": SUM, "max_tokens": 3, "max_completion_tokens": 4}, 400, "differ"),
        ("chat/completions", {"model": "demo", "messages": SUM, "top_logprobs": 3}, 400, "logprobs"),
        ("chat/completions", {"model": "demo", "messages": SUM, "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ("chat/completions", {"model": "demo", "messages": SUM, "audio": {"voice": "x"}}, 400, "'audio'"),
        ("chat/completions", {"model": "demo", "messages": SUM, "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("chat/completions", {"model": "demo", "messages": SUM, "logit_bias": {"5": 101}}, 400, "logit_bias"),
        ("chat/completions", {"model": "demo", "messages": SUM, "stop": ""}, 400, "stop"),
        ("chat/completions", {"model": "demo", "messages": SUM, "tools": [{"type": "function"}]}, 400, "tools"),
        ("chat/completions", {"model": "demo", "messages": SUM, "tool_choice": "required"}, 400, "tools"),
        ("chat/completions_qos", {"model": "demo", "messages": SUM}, 404, "--qos-config-path"),
        ("completions", {"model": "demo", "prompt": "a " * 3000}, 400, "too long"),
        ("completions", {"model": "demo", "prompt": ""}, 400, "prompt is empty"),
        ("completions", {"model": "demo", "prompt": [99999999]}, 400, "vocabulary"),
        ("completions", {"model": "demo", "prompt": [-1]}, 400, "prompt"),
        ("completions", {"model": "demo", "prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("completions", {"model": "demo", "prompt": "x", "best_of": 3}, 400, "best_of"),
        ("completions", {"model": "demo", "prompt": "x", "store": True}, 400, "store"),
        ("chat/interactive", {"prompt": "x", "cancel": True}, 400, "session_id"),
        ("encode", {"input": []}, 400, "input"),
        ("embeddings", {}, 400, "no embeddings"),
        ("nowhere", {}, 404, "/v1/nowhere"),
    ],
)  # fmt: skip
def test_wrong_request_gets_openais_error_object(base_url: str, path: str, body: Any, status: int, words: str) -> None:
    reply = httpx.post(f"{base_url}/v1/{path}", json=body, timeout=PATIENCE_S)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]


def test_body_that_is_no_json_is_400(base_url: str) -> None:
    reply = httpx.post(
        f"{base_url}/v1/completions", content=b"{nope", headers={"content-type": "application/json"}, timeout=PATIENCE_S
    )
    assert reply.status_code == 400
    assert "no JSON" in reply.json()["error"]["message"]


def test_conversation_goes_on_and_ends(base_url: str) -> None:
    def say(**body: Any) -> dict[str, Any]:
        reply: dict[str, Any] = httpx.post(
            f"{base_url}/v1/chat/interactive", json={"session_id": 11, "top_k": 1, **body}, timeout=PATIENCE_S
        ).json()
        return reply

    first = say(prompt="My name is Mia.", interactive_mode=True)
    assert first["history_tokens"] == 0
    second = say(prompt="What is 2 + 2?", interactive_mode=True)
    assert second["history_tokens"] == first["input_tokens"] + first["tokens"]
    say(prompt="", request_output_len=0, interactive_mode=False)
    assert say(prompt="What is 2 + 2?")["history_tokens"] == 0


def test_interactive_stream_is_json_lines_that_end_with_the_reason(base_url: str) -> None:
    body = {"prompt": "Spell cat.", "top_k": 1, "stream": True}
    with httpx.stream("POST", f"{base_url}/v1/chat/interactive", json=body, timeout=PATIENCE_S) as reply:
        lines = [json.loads(line) for line in reply.iter_lines()]
    assert [line["finish_reason"] for line in lines] == [None] * (len(lines) - 1) + ["stop"]
    assert "".join(line["text"] for line in lines)
    assert [line["tokens"] for line in lines] == sorted(line["tokens"] for line in lines)


def test_models_health_and_metrics(client: openai.OpenAI, base_url: str) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    assert httpx.get(f"{base_url}/health", timeout=PATIENCE_S).status_code == 200
    assert (
        'turbotriton_openai_requests_total{path="/v1/models",status="200"}'
        in httpx.get(f"{base_url}/metrics", timeout=PATIENCE_S).text
    )


def test_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=SUM)
    with pytest.raises(openai.BadRequestError, match="too long"):
        client.completions.create(model="demo", prompt="a " * 3000)


def test_keys_origins_and_a_dead_neighbour(demo_server: TritonServer) -> None:
    """One server with --api-keys, CORS for one origin, and two tritonservers behind it, the first of which is not there."""
    target = f"127.0.0.1:9,{demo_server.grpc_url}"
    with api_server(target, "--api-keys", "first-key", "second-key", "--allow-origins", "https://chat.example") as url:
        assert httpx.get(f"{url}/v1/models", timeout=PATIENCE_S).status_code == 401
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as wrong,
            pytest.raises(openai.AuthenticationError),
        ):
            wrong.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="second-key", max_retries=0) as right:
            for _ in range(4):
                assert right.chat.completions.create(messages=SUM, max_tokens=2, **GREEDY).choices[0].message.content
        headers = {"Origin": "https://chat.example", "Authorization": "Bearer first-key"}
        allowed = httpx.get(f"{url}/v1/models", headers=headers, timeout=PATIENCE_S)
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        assert (
            "access-control-allow-origin"
            not in httpx.get(f"{url}/v1/models", headers=headers | {"Origin": "https://evil.example"}, timeout=PATIENCE_S).headers
        )
        assert httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200


def test_full_queue_is_429_with_retry_after(demo_workspace: Path) -> None:
    options = {"max_batch_size": "1", "max_queued_requests": "1"}
    body = {"model": "demo", "messages": SUM, "stream": True, "max_tokens": 1500, "ignore_eos": True}
    with (
        TritonServer(demo_workspace / "model_repository", options=options) as server,
        api_server(server.grpc_url) as url,
        watched(server) as engine,
    ):
        chat = f"{url}/v1/chat/completions"

        async def fill() -> httpx.Response:
            async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
                asking = []
                for counts in ((1, 0), (1, 1)):  # running, waiting
                    asking.append(asyncio.create_task(http.post(chat, json=body)))
                    while (engine.newest.num_running, engine.newest.num_waiting) != counts:
                        await asyncio.sleep(0.02)
                refused = await http.post(chat, json=body)
                for one in asking:
                    one.cancel()
                await asyncio.wait(asking)
                return refused

        with throttled(engine_pid(server)):
            refused = asyncio.run(asyncio.wait_for(fill(), 2 * PATIENCE_S))
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "queue is full" in refused.json()["error"]["message"]
        wait_until(lambda: engine.newest.requests_total.get("cancelled") == 2, "both requests leaving")


def test_away_server_is_503() -> None:
    with api_server("127.0.0.1:9") as url:
        for reply in (
            httpx.get(f"{url}/health", timeout=PATIENCE_S),
            httpx.post(f"{url}/v1/completions", json={"model": "demo", "prompt": "x"}, timeout=PATIENCE_S),
        ):
            assert reply.status_code == 503
            assert "127.0.0.1:9" in reply.json()["error"]["message"]
            assert reply.headers["retry-after"] == "1"
