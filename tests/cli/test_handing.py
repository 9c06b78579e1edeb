"""Who gets a connection: workers in turn, none that has gone or is full, and whoever comes first where there was none."""

import asyncio
import contextlib
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from turbotriton.cli.handing import Entrance, HandedLoop, HandingServer, entrance_path

PATIENCE_S = 30.0


class Greeter(asyncio.Protocol):
    """Says who it is and hangs up."""

    def __init__(self, name: str) -> None:
        self._name = name

    def connection_made(self, transport: Any) -> None:
        transport.write(self._name.encode())
        transport.close()


class Port:
    def __init__(self, folder: Path, port: int, serving: "asyncio.Task[None]") -> None:
        self._folder, self._port, self.serving = folder, port, serving

    async def worker(self, name: str) -> Any:
        server = await asyncio.get_running_loop().create_server(lambda: Greeter(name), sock=Entrance(entrance_path(self._folder)))
        await asyncio.sleep(0.01)  # the parent notes it
        return server

    async def greeting(self) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        text = await reader.read()
        writer.close()
        return text.decode()

    async def greetings(self, num: int) -> Counter[str]:
        return Counter(await asyncio.gather(*(self.greeting() for _ in range(num))))


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # short enough for a socket
        yield Path(name)


@contextlib.asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Port]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as entrance:
        entrance.bind(str(entrance_path(folder)))
        entrance.listen()
        serving = asyncio.create_task(HandingServer([listener]).serve(entrance))
        yield Port(folder, listener.getsockname()[1], serving)
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


def run(folder: Path, use: Callable[[Port], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE_S), opened(folder) as port:
            await use(port)

    with asyncio.Runner(loop_factory=HandedLoop) as runner:
        runner.run(main())


def test_connections_go_to_the_workers_in_turn(folder: Path) -> None:
    async def use(port: Port) -> None:
        for name in "abc":
            await port.worker(name)
        assert [await port.greeting() for _ in range(6)] == list("abcabc")
        assert await port.greetings(30) == dict.fromkeys("abc", 10)

    run(folder, use)


def test_a_connection_waits_where_there_is_no_worker(folder: Path) -> None:
    async def use(port: Port) -> None:
        first = await port.worker("a")
        first.close()
        await first.wait_closed()
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(port.greeting())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await port.worker("b")
        assert await waiting == "b"

    run(folder, use)


def test_a_worker_that_has_gone_gets_none(folder: Path) -> None:
    async def use(port: Port) -> None:
        servers = [await port.worker(name) for name in "abc"]
        assert await port.greeting() == "a"
        servers[1].close()
        assert [await port.greeting() for _ in range(4)] == list("caca")

    run(folder, use)


def test_a_worker_that_is_full_is_passed_over_and_nobody_waits_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, num_refusals = socket.send_fds, 2

    def full_at_first(*args: Any) -> int:
        nonlocal num_refusals
        num_refusals -= 1
        if num_refusals >= 0:
            raise BlockingIOError
        return real(*args)

    async def use(port: Port) -> None:
        nonlocal num_refusals
        for name in "abc":
            await port.worker(name)
        monkeypatch.setattr(socket, "send_fds", full_at_first)
        assert [await port.greeting() for _ in range(4)] == list("cabc")
        num_refusals = 3
        assert [await port.greeting() for _ in range(2)] == ["a", "b"]  # all were full: it waited

    run(folder, use)


def test_a_server_that_stops_refuses_connections_and_its_workers_notice(folder: Path) -> None:
    async def use(port: Port) -> None:
        server = await port.worker("a")
        port.serving.cancel()
        await asyncio.wait([port.serving])
        with pytest.raises(ConnectionRefusedError):
            await port.greeting()
        await asyncio.sleep(0.01)
        server.close()  # once more, as uvicorn does

    run(folder, use)
