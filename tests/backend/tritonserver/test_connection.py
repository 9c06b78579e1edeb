"""A door's engine: refused while it is away, taken up again when it is back, left alone after close."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.backend.tritonserver.fake_engine import FakeClient

from turbotriton.contract.errors import ServerError, UnavailableError


class DyingClient(FakeClient):
    def on_disconnect(self, callback: Callable[[], None]) -> None:
        self.die_with = callback

    def die(self) -> None:
        self.is_alive = False
        self.die_with()

    def close(self) -> None:
        self.is_alive = False


class Engines:
    """Each `connect` gives the next of `outcomes`: a client, or an error."""

    def __init__(self, *outcomes: DyingClient | Exception) -> None:
        self.outcomes = list(outcomes)

    def __call__(self) -> DyingClient:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    from turbotriton.backend.tritonserver import connection

    monkeypatch.setattr(connection, "RETRY_DELAYS_S", (0.05, 0.01))
    return lambda engines: connection.EngineConnection(tmp_path, 1, engines)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_dead_engine_is_refused_then_replaced_after_failed_tries(connect: Any) -> None:
    first, second = DyingClient(), DyingClient()
    connection = connect(Engines(first, ServerError("not yet"), OSError("nor now"), second))
    with pytest.raises(UnavailableError):
        connection.client()
    assert connection.connect() is connection.client() is first
    first.die()
    assert not connection.is_up
    with pytest.raises(UnavailableError, match="starting again"):
        connection.client()
    wait_until(lambda: connection.is_up)
    assert connection.client() is second


def test_the_replacement_is_watched_too(connect: Any) -> None:
    clients = [DyingClient() for _ in range(3)]
    connection = connect(Engines(*clients))
    connection.connect()
    for dead, alive in itertools.pairwise(clients):
        dead.die()
        wait_until(lambda alive=alive: connection.is_up and connection.client() is alive)


def test_the_first_connection_raises_what_the_launcher_raises(connect: Any) -> None:
    with pytest.raises(ServerError, match="no weights"):
        connect(Engines(ServerError("no weights"))).connect()


def test_after_close_nothing_is_started_again(connect: Any) -> None:
    client, never = DyingClient(), DyingClient()
    engines = Engines(client, never)
    connection = connect(engines)
    connection.connect()
    connection.close()
    client.die_with()
    time.sleep(0.1)
    assert engines.outcomes == [never]
    assert not connection.is_up


def test_close_during_the_wait_for_a_new_engine_ends_the_tries(connect: Any) -> None:
    client, never = DyingClient(), DyingClient()
    engines = Engines(client, never)
    connection = connect(engines)
    connection.connect()
    client.die()
    connection.close()
    time.sleep(0.15)
    assert engines.outcomes == [never]
