"""APIClient.stream over real sockets: the same deltas as gRPC's client gives, cancelled at any moment, failures as our classes."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from tests.client.openai.scripted import ScriptedFleet

from turbotriton.cli.running_server import held_ports
from turbotriton.client.api_client import APIClient
from turbotriton.client.openai import app as app_module
from turbotriton.client.openai.app import ServerOptions, make_app
from turbotriton.client.text_door import Delta
from turbotriton.contract.errors import InvalidInputError, UnavailableError

#: Seconds until what has to happen counts as missing: only a test that fails waits for so long.
PATIENCE_S = 60.0
MESSAGES = [{"role": "user", "content": "x"}]


class SlowFleet(ScriptedFleet):
    """Waits `delays_s[i]` before piece i, and the last of them before those behind it."""

    delays_s: Sequence[float] = (0.0,)
    num_given = 0

    async def _deltas(self, prompt: Mapping[str, Any], options: Mapping[str, Any]) -> AsyncIterator[Delta]:
        async for delta in super()._deltas(prompt, options):
            await asyncio.sleep(self.delays_s[min(self.num_given, len(self.delays_s) - 1)])
            self.num_given += 1
            yield delta


@pytest.fixture
def fleet() -> SlowFleet:
    return SlowFleet(["Hel", "lo ", "you"])


@pytest.fixture
def url(fleet: SlowFleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with served(fleet, monkeypatch, api_keys=["right"]) as url:
        yield url


@contextmanager
def served(fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[str]:
    """The app's URL."""
    monkeypatch.setattr(app_module, "Fleet", lambda urls, stream_interval: fleet)
    app = make_app(ServerOptions(urls=["scripted"], **options))
    with held_ports(1) as (port,):
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(PATIENCE_S)


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_deltas_carry_text_then_reason_and_counts(url: str, fleet: SlowFleet) -> None:
    with APIClient(url, "right") as client, client.stream(messages=MESSAGES, max_tokens=9, top_k=0) as stream:
        deltas = list(stream)
    assert [delta.text for delta in deltas] == ["Hel", "lo ", "you", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "stop"]
    assert (deltas[-1].num_input_tokens, deltas[-1].num_output_tokens) == (7, 3)
    model, prompt, options = fleet.asked[0]
    assert (model, prompt["messages"], options["max_tokens"], options["top_k"]) == ("demo", MESSAGES, 9, 0)


@pytest.mark.parametrize("num_before", [0, 1])
def test_cancel_wakes_the_reader_and_frees_the_server(url: str, fleet: SlowFleet, num_before: int) -> None:
    fleet.pieces, fleet.delays_s = ["x"] * 2, [0.0] * num_before + [3600.0]
    with APIClient(url, "right") as client:
        stream = client.stream(messages=MESSAGES)
        seen: list[Delta] = []
        reader = threading.Thread(target=lambda: seen.extend(stream))
        if num_before:
            first = iter(stream)
            seen.append(next(first))
            reader = threading.Thread(target=lambda: seen.extend(first))
        reader.start()
        wait_until(lambda: fleet.num_open == 1)
        stream.cancel()
        reader.join(PATIENCE_S)
        assert not reader.is_alive(), "the reader waits for the next piece"
        wait_until(lambda: fleet.num_open == 0)
    assert len(seen) == num_before


def test_stream_that_was_cancelled_before_it_began_gives_nothing(url: str) -> None:
    with APIClient(url, "right") as client:
        stream = client.stream(messages=MESSAGES)
        stream.cancel()
        assert list(stream) == []


def test_failures_are_our_classes(url: str, fleet: SlowFleet) -> None:
    with APIClient(url, "wrong", model="demo") as client, pytest.raises(InvalidInputError, match="valid api key"):
        list(client.stream(messages=MESSAGES))
    fleet.error = UnavailableError("the queue is full: 3 wait")
    with APIClient(url, "right", model="demo") as client, pytest.raises(UnavailableError, match="queue is full"):
        list(client.stream(messages=MESSAGES))
    with APIClient("http://127.0.0.1:9", model="demo") as client, pytest.raises(UnavailableError, match="no server answers"):
        list(client.stream(messages=MESSAGES))
    with pytest.raises(InvalidInputError, match="no http"):
        APIClient("127.0.0.1:9")


def test_other_models_can_be_named(url: str) -> None:
    with APIClient(url, "right") as client:
        assert client.model == "demo"
    with APIClient(url, "right", model="other") as client, pytest.raises(InvalidInputError, match="`other` does not exist"):
        list(client.stream(messages=MESSAGES))
