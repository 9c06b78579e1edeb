"""`turbotriton.client` against a real tritonserver."""

import asyncio
from typing import Any

import pytest
from tests.throttle import throttled

from turbotriton.cli.running_server import held_ports
from turbotriton.client import AsyncClient, Client
from turbotriton.contract.errors import DeadlineExceededError, InvalidInputError, UnavailableError

from .engine import cancelling, wait_until
from .metrics import metric, wait_idle
from .processes import engine_pid
from .server import TritonServer

pytestmark = pytest.mark.e2e

QUESTION = [{"role": "user", "content": "Count from 1 to 5."}]
ENDLESS = {"messages": QUESTION, "max_tokens": 1900, "ignore_eos": True}


def test_streamed_deltas_join_to_the_generated_answer(demo_server: TritonServer) -> None:
    with Client(demo_server.grpc_url) as client:
        whole = client.generate(messages=QUESTION, max_tokens=48, temperature=0)
        deltas = list(client.stream(messages=QUESTION, max_tokens=48, temperature=0))
    assert whole.text
    assert "".join(delta.text for delta in deltas) == whole.text
    assert sum((delta.output_ids for delta in deltas), ()) == whole.output_ids
    last = deltas[-1]
    assert (last.finish_reason, last.num_input_tokens) == (whole.finish_reason, whole.num_input_tokens)
    assert last.num_output_tokens == whole.num_output_tokens == len(whole.output_ids)


def test_finish_reason_and_count_at_max_tokens(demo_server: TritonServer) -> None:
    with Client(demo_server.grpc_url) as client:
        result = client.generate(messages=QUESTION, max_tokens=7, ignore_eos=True, temperature=0)
    assert (result.finish_reason, result.num_output_tokens) == ("length", 7)


def test_async_client_equals_the_sync_one_with_eight_at_once(demo_server: TritonServer) -> None:
    with Client(demo_server.grpc_url) as client:
        expected = client.generate(messages=QUESTION, max_tokens=32, temperature=0).text

    async def run() -> list[str]:
        async with AsyncClient(demo_server.grpc_url) as client:

            async def ask() -> str:
                stream = await client.stream(messages=QUESTION, max_tokens=32, temperature=0)
                return "".join([delta.text async for delta in stream])

            return await asyncio.gather(*(ask() for _ in range(8)))

    assert asyncio.run(run()) == [expected] * 8


def test_cancelling_a_stream_returns_its_blocks(demo_server: TritonServer) -> None:
    with (
        Client(demo_server.grpc_url) as client,
        cancelling(demo_server),
        throttled(engine_pid(demo_server)),
        client.stream(**ENDLESS) as stream,
    ):
        next(stream)
        wait_until(lambda: metric(demo_server, "turbotriton_kv_cache_usage") > 0, "blocks being held")
    wait_idle(demo_server)


def test_a_timeout_ends_the_request_at_the_engine_too(demo_server: TritonServer) -> None:
    with Client(demo_server.grpc_url) as client:
        assert client.model  # the look-up is not part of the request's time
        with cancelling(demo_server), throttled(engine_pid(demo_server)), pytest.raises(DeadlineExceededError):
            list(client.stream(**ENDLESS, timeout=3.0))
    wait_idle(demo_server)


def test_wrong_values_are_invalid_input_with_the_doors_reason(demo_server: TritonServer) -> None:
    with Client(demo_server.grpc_url) as client:
        for sampling, name in (({"temperature": -1.0}, "temperature"), ({"top_p": 2.0}, "top_p"), ({"max_tokens": -3}, "max_")):
            with pytest.raises(InvalidInputError, match=name):
                client.generate(messages=QUESTION, **sampling)
        assert client.generate(messages=QUESTION, max_tokens=4).num_output_tokens <= 4


def test_an_unknown_model_is_named(demo_server: TritonServer) -> None:
    with Client(demo_server.grpc_url, "nobody") as client, pytest.raises(InvalidInputError, match="nobody"):
        client.generate("x")


def test_no_server_is_unavailable(demo_server: TritonServer) -> None:
    with held_ports(1) as (port,), Client(f"127.0.0.1:{port}") as client, pytest.raises(UnavailableError, match=str(port)):
        client.generate("x")


def test_streams_that_are_left_at_their_last_delta_leave_nothing_behind(demo_server: TritonServer) -> None:
    """Before the end that follows it: the server that this module stops could not end otherwise."""
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    with Client(demo_server.grpc_url) as client:
        for _ in range(100):
            with client.stream(**question) as stream:
                assert any(delta.finish_reason for delta in stream)

    async def run() -> None:
        async with AsyncClient(demo_server.grpc_url) as many:

            async def one() -> None:
                async with await many.stream(**question) as stream:
                    async for delta in stream:
                        if delta.finish_reason is not None:
                            break

            for _ in range(20):
                await asyncio.gather(*(one() for _ in range(10)))

    asyncio.run(run())
    wait_idle(demo_server)
