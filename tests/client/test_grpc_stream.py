"""Client and AsyncClient against the fake server: answers, names, errors, cancellation."""

import asyncio
import threading
import time

import grpc
import pytest
from tests.client.fake_server import FakeTriton, encode

from turbotriton.cli.running_server import held_ports
from turbotriton.client import AsyncClient, Client
from turbotriton.client.kserve import error_from_rpc
from turbotriton.contract.errors import DeadlineExceededError, InvalidInputError, ServerError, UnavailableError


def wait_until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def test_generate_gives_text_reason_and_counts(fake):
    with Client(fake.url) as client:
        result = client.generate("hello")
    assert (result.text, result.finish_reason) == ("echo:HELLO", "stop")
    assert (result.num_input_tokens, result.num_output_tokens) == (5, 10)
    assert list(result.output_ids) == encode("echo:HELLO", add_bos=False)


def test_stream_yields_deltas_that_join_to_the_answer(fake):
    with Client(fake.url, "chatty") as client:
        deltas = list(client.stream(messages=[{"role": "user", "content": "grüß"}]))
    assert "".join(delta.text for delta in deltas) == "echo:GRÜSS"
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "stop"


def test_sampling_options_travel_as_flat_tensors_of_their_type(fake):
    with Client(fake.url) as client:
        client.generate(
            input_ids=[72, 73],
            max_tokens=4,
            temperature=0,
            seed=2**64 - 1,
            ignore_eos=True,
            stop_words="x",
            stop_token_ids=[7, 8],
        )
    inputs = fake.seen[0].inputs
    assert inputs["max_tokens"].dtype.name == "int32"
    assert inputs["temperature"].dtype.name == "float32"
    assert inputs["seed"].tolist() == [2**64 - 1]
    assert inputs["ignore_eos"].tolist() == [True]
    assert inputs["stop_words"].tolist() == [b"x"]
    assert inputs["stop_token_ids"].tolist() == [7, 8]
    assert inputs["stream"].tolist() == [False]
    assert "top_k" not in inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of prompt, messages and input_ids, not none"),
        ({"prompt": "a", "input_ids": [1]}, "not prompt and input_ids"),
        ({"prompt": "a", "max_token": 3}, "'max_token' is no sampling option"),
        ({"prompt": "a", "top_k": 1.5}, "top_k is 1.5"),
        ({"prompt": "a", "top_k": "many"}, "top_k is 'many'"),
        ({"prompt": "a", "ignore_eos": 1}, "True or False"),
        ({"prompt": "a", "seed": -1}, "does not fit uint64"),
        ({"prompt": "a", "max_tokens": 2**31}, "does not fit int32"),
        ({"prompt": "a", "stop_words": [3]}, "stop_words contains 3"),
        ({"messages": "hello"}, "messages is text"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(fake, arguments, message):
    with Client(fake.url) as client, pytest.raises(InvalidInputError, match=message):
        client.generate(**arguments)
    assert fake.seen == []


def test_the_only_text_door_is_found():
    with FakeTriton(models=("turbomind", "preprocessing", "postprocessing", "mine")) as fake, Client(fake.url) as client:
        assert client.model == "mine"


@pytest.mark.parametrize(
    ("models", "message"), [(("turbomind",), "serves no text door"), (("a", "b"), "several text doors .a, b.")]
)
def test_no_or_several_text_doors_is_an_error(models, message):
    with FakeTriton(models=models) as fake, Client(fake.url) as client, pytest.raises(InvalidInputError, match=message):
        _ = client.model


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("UNAVAILABLE: the queue is full", UnavailableError, "^the queue is full$"),
        ("INVALID_ARG: top_k is -1\nsecond line", InvalidInputError, "^top_k is -1 second line$"),
        ("Request for unknown model: 'x' is not found", InvalidInputError, "unknown model: 'x'"),
        ("[request id: <id_unknown>] inference input 'a' data-type is 'BYTES'", InvalidInputError, "input 'a' data-type"),
        ("something broke", ServerError, "^something broke$"),
    ],
)
def test_a_streams_error_message_becomes_our_error_in_one_line(fake, text, error, message):
    fake.fail_stream_with = text
    with Client(fake.url) as client, pytest.raises(error, match=message) as caught:
        client.generate("x")
    assert type(caught.value) is error


def test_no_server_is_unavailable_and_names_the_address():
    with held_ports(1) as (port,):
        url = f"127.0.0.1:{port}"
        with Client(url, "chatty") as client, pytest.raises(UnavailableError, match=url):
            client.generate("x")


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ("failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:9: Connection refused", "connection refused"),
        ("DNS resolution failed for nobody.invalid:8001: Domain name not found", "the host name is unknown"),
        ("errors resolving nobody.invalid:8001: [field:hostname lookup error]", "the host name is unknown"),
        ("Stream removed (recvmsg:Connection reset by peer {created_time:1})", "the connection broke"),
        ('GOAWAY received; Error code: 2; Debug Text: Cancelling all calls (at: "x"))); ', "the connection broke"),
        ("failed to connect to all addresses; last error: UNKNOWN: no route", "it cannot be reached"),
    ],
)
def test_a_broken_connection_is_told_in_words_of_ours(details, reason):
    class Broken(grpc.RpcError):
        def code(self):
            return grpc.StatusCode.UNAVAILABLE

        def details(self):
            return details

    found = error_from_rpc(Broken(), "there:8001")
    assert type(found) is UnavailableError
    assert str(found) == f"no tritonserver answers at there:8001 ({reason}); is it running, and is this its gRPC port?"


def test_a_server_that_is_back_is_found_by_the_first_request():
    with held_ports(1) as (port,):
        with FakeTriton(port=port) as fake:
            client = Client(fake.url)
            client.generate("x")
        for _ in range(3):
            with pytest.raises(UnavailableError, match="no tritonserver"):
                client.generate("x")
        with FakeTriton(port=port):
            assert client.generate("x").text == "echo:X"
        client.close()


def test_a_server_that_goes_away_mid_answer_is_unavailable(fake):
    fake.hold_after(1)
    with Client(fake.url) as client:
        stream = client.stream("x" * 50)
        next(stream)
        threading.Thread(target=fake.stop).start()
        with pytest.raises((UnavailableError, ServerError)):
            list(stream)


@pytest.mark.parametrize("url", ["localhost", "http://localhost:8000", "localhost:0", "localhost:99999", "a b:1"])
def test_an_address_that_is_no_host_and_port_is_refused(url):
    with pytest.raises(InvalidInputError, match="HOST:PORT"):
        Client(url)


def test_a_stream_cut_before_the_finish_reason_is_an_error(fake):
    fake.fail_after = 3
    with Client(fake.url) as client, pytest.raises(ServerError, match="before the answer was complete"):
        list(client.stream("hello"))


def test_timeout_ends_a_slow_answer_at_the_server_too(fake):
    fake.hold_after(1)
    with Client(fake.url) as client:
        assert client.model  # the look-up is not part of the request's time
        with pytest.raises(DeadlineExceededError, match="longer timeout"):
            list(client.stream("x" * 100, timeout=1.0))
    wait_until(lambda: fake.seen and fake.seen[0].is_cancelled)


def test_cancel_from_another_thread_ends_the_iteration_and_reaches_the_server(fake):
    fake.hold_after(3)
    with Client(fake.url) as client:
        stream = client.stream("x" * 500)
        deltas = [next(stream)]
        threading.Thread(target=stream.cancel).start()
        deltas += stream
        assert len(deltas) <= 3
        wait_until(lambda: fake.seen[0].is_cancelled)


def test_leaving_the_with_block_early_cancels(fake):
    fake.hold_after(3)
    with Client(fake.url) as client:
        with client.stream("x" * 500) as stream:
            next(stream)
        wait_until(lambda: fake.seen[0].is_cancelled)


def test_streams_of_one_client_run_at_once(fake):
    fake.token_delay_s = 0.02
    with Client(fake.url) as client:
        streams = [client.stream(f"question {index}") for index in range(4)]
        firsts = [next(stream) for stream in streams]
        texts = [first.text + "".join(delta.text for delta in stream) for first, stream in zip(firsts, streams, strict=True)]
    assert texts == [f"echo:QUESTION {index}" for index in range(4)]


def test_async_client_streams_concurrently_and_generates(fake):
    fake.token_delay_s = 0.01

    async def ask(client, text):
        return "".join([delta.text async for delta in await client.stream(text)])

    async def run():
        async with AsyncClient(fake.url) as client:
            texts = await asyncio.gather(*(ask(client, f"q{index}") for index in range(4)))
            result = await client.generate("hello", max_tokens=4)
            return texts, result

    texts, result = asyncio.run(run())
    assert texts == [f"echo:Q{index}" for index in range(4)]
    assert (result.text, result.finish_reason) == ("echo", "length")


def test_cancelling_an_async_task_cancels_the_request(fake):
    fake.hold_after(3)

    async def run():
        async with AsyncClient(fake.url) as client:

            async def read():
                return [delta async for delta in await client.stream("x" * 500)]

            task = asyncio.create_task(read())
            while not fake.seen:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not fake.seen[0].is_cancelled:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_async_stream_cancel_ends_the_iteration(fake):
    fake.hold_after(3)

    async def run():
        async with AsyncClient(fake.url) as client:
            stream = await client.stream("x" * 500)
            deltas = []
            async for delta in stream:
                deltas.append(delta)
                asyncio.get_running_loop().call_soon(stream.cancel)
            return deltas

    assert 0 < len(asyncio.run(asyncio.wait_for(run(), 60))) <= 3


def test_async_errors_are_ours():
    async def run(url):
        async with AsyncClient(url) as client:
            await client.generate("x")

    with held_ports(1) as (port,), pytest.raises(UnavailableError, match=f"127.0.0.1:{port}"):
        asyncio.run(run(f"127.0.0.1:{port}"))


def test_importing_the_package_loads_no_grpc():
    import subprocess
    import sys

    code = "import sys, turbotriton.client; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
