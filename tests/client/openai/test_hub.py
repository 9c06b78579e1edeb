"""What several processes of one server share, by way of a real socket: conversations and turns are nobody's twice and never lost."""

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from turbotriton.client.openai import qos
from turbotriton.client.openai.errors import ApiError
from turbotriton.client.openai.hub import Hub, SharedGate, SharedSessions, hub_path
from turbotriton.client.openai.qos import QosGate, read_qos_config

QUESTION = [{"role": "user", "content": "x" * 200_000}]  # more than one read of a socket


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="turbotriton-", dir="/tmp") as name:  # tmp_path would be too long for a socket
        yield Path(name)


@contextlib.asynccontextmanager
async def hub_in(folder: Path, gate: QosGate | None = None) -> AsyncIterator[None]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(hub_path(folder)))
        sock.listen()
        until = asyncio.Event()
        serving = asyncio.create_task(Hub(gate).serve(sock, until))
        try:
            yield
        finally:
            until.set()
            await serving


def with_stores(folder: Path, act: Callable[[SharedSessions, SharedSessions], Awaitable[None]]) -> None:
    async def run() -> None:
        async with hub_in(folder):
            await act(SharedSessions(folder), SharedSessions(folder))

    asyncio.run(run())


def never() -> None:
    raise AssertionError("nobody cancels")


def test_a_conversation_goes_on_wherever_its_next_turn_is(folder: Path) -> None:
    async def act(one: SharedSessions, other: SharedSessions) -> None:
        async with one.turn(7, never, is_kept=True) as session:
            assert (session.messages, session.num_tokens) == ([], 0)
            session.messages, session.num_tokens = QUESTION, 12
        async with other.turn(7, never, is_kept=True) as session:
            assert (session.messages, session.num_tokens) == (QUESTION, 12)
        assert await one.cancel(7) == 12
        async with one.turn(7, never, is_kept=False):
            pass
        async with other.turn(7, never, is_kept=True) as session:
            assert session.messages == []
            session.messages = QUESTION
        await one.end(7)
        assert await other.cancel(7) == 0

    with_stores(folder, act)


def test_a_conversation_has_one_turn_at_a_time(folder: Path) -> None:
    async def act(one: SharedSessions, other: SharedSessions) -> None:
        async with one.turn(7, never, is_kept=True):
            with pytest.raises(ApiError, match="session_id 7 is answering") as caught:
                async with other.turn(7, never, is_kept=True):
                    pass
            assert (caught.value.status, caught.value.param) == (409, "session_id")
        async with other.turn(7, never, is_kept=True):
            pass

    with_stores(folder, act)


def test_a_turn_is_cancelled_from_another_process(folder: Path) -> None:
    async def act(one: SharedSessions, other: SharedSessions) -> None:
        cancelled = asyncio.Event()
        async with one.turn(7, cancelled.set, is_kept=True) as session:
            await other.cancel(7)
            await asyncio.wait_for(cancelled.wait(), 10)
            session.messages, session.num_tokens = QUESTION, 3
        assert await other.cancel(7) == 3

    with_stores(folder, act)


def test_a_process_that_dies_gives_its_conversation_back_as_it_was(folder: Path) -> None:
    async def act(one: SharedSessions, other: SharedSessions) -> None:
        async with one.turn(7, never, is_kept=True) as session:
            session.messages = QUESTION
        reader, writer = await asyncio.open_unix_connection(hub_path(folder))
        request = json.dumps({"do": "turn", "session_id": 7, "is_kept": True}).encode()
        writer.write(len(request).to_bytes(8) + request)
        await reader.readexactly(8)
        with pytest.raises(ApiError, match="is answering"):
            async with other.turn(7, never, is_kept=True):
                pass
        writer.write(b"\0\0")  # half a message
        writer.close()
        for _ in range(1000):
            with contextlib.suppress(ApiError):
                async with other.turn(7, never, is_kept=True) as session:
                    assert session.messages == QUESTION
                    return
            await asyncio.sleep(0.01)
        pytest.fail("the conversation is still taken")

    with_stores(folder, act)


def test_new_conversations_are_different_ones(folder: Path) -> None:
    async def act(one: SharedSessions, other: SharedSessions) -> None:
        async with one.turn(-1, never, is_kept=False), other.turn(-1, never, is_kept=False):
            pass

    with_stores(folder, act)


def test_turns_of_all_processes_are_counted_together(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "qos.json"
    users = {"High": [{"id": "boss", "quota_pct": 100}], "Low": [{"id": "default", "quota_pct": 100}]}
    config.write_text(json.dumps({"user_groups": ["High", "Low"], "user_group_map": users}))
    order: list[str] = []

    async def ask(gate: SharedGate, user: str, until: asyncio.Event) -> None:
        async with gate.turn(user):
            order.append(user)
            await until.wait()

    async def run() -> None:
        gate = QosGate(read_qos_config(config), max_running=1)
        async with hub_in(folder, gate):
            one, other = SharedGate(folder), SharedGate(folder)
            first_ends = asyncio.Event()
            first = asyncio.create_task(ask(one, "first", first_ends))
            while not order:
                await asyncio.sleep(0)
            ended = asyncio.Event()
            ended.set()
            waiting = [
                asyncio.create_task(ask(gate, user, ended)) for gate, user in ((one, "low"), (other, "boss"), (one, "gone"))
            ]
            await waits(gate, 3)
            monkeypatch.setattr(qos, "MAX_WAITING", 3)
            with pytest.raises(ApiError, match="the queue is full") as caught:
                await ask(other, "one too many", ended)
            assert (caught.value.status, caught.value.code) == (429, "queue_full")
            waiting.pop().cancel()
            await waits(gate, 2)
            first_ends.set()
            await asyncio.gather(first, *waiting)

    asyncio.run(run())
    assert order == ["first", "boss", "low"]


async def waits(gate: QosGate, count: int) -> None:
    async with asyncio.timeout(10):
        while len(gate._waiting) != count:
            await asyncio.sleep(0.001)


def test_without_a_hub_the_server_is_stopping(folder: Path) -> None:
    async def run() -> None:
        await SharedSessions(folder).end(1)

    with pytest.raises(ApiError, match="the server is stopping") as caught:
        asyncio.run(run())
    assert caught.value.status == 503
