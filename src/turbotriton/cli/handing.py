"""Connections of one port for several worker processes in turn: the parent accepts them, a worker takes them from a Unix socket.

    clients ──> HandingServer, in the parent ──(descriptors, in turn)──> HandedLoop.create_server, in each worker ──> uvicorn's protocol

uvicorn asks its event loop for a server on the socket that its supervisor gave it. Where that is an `Entrance`, the loop connects to the
parent instead of listening, and from then on gets its turn; until it closes that server or dies. Knows nothing of HTTP.
"""

import asyncio
import contextlib
import logging
import socket
import ssl as ssl_module
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

__all__ = ["Entrance", "HandedLoop", "HandingServer", "entrance_path"]

logger = logging.getLogger(__name__)

RETRY_S = 1.0  # after an accept that failed: no descriptors are left, for one
FULL_S = 0.01  # where every worker is full: a burst is more than Unix sockets hold, or all of them are busy


def entrance_path(folder: Path) -> Path:
    """Of the parent's socket, in the folder that the processes of one server share."""
    return folder / "entrance.sock"


class Entrance(socket.socket):
    """A worker's end of the way from the parent; connected when the worker is ready to serve."""

    def __init__(self, path: Path) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Entrance, (self.path,)


class HandingServer:
    """Belongs to one event loop. listeners: each bound and listening."""

    def __init__(self, listeners: Sequence[socket.socket]) -> None:
        self._listeners = listeners
        self._workers: deque[socket.socket] = deque()  # whose turn it is first
        self._has_worker = asyncio.Event()

    async def serve(self, entrance: socket.socket) -> None:
        """Until it is cancelled; closes the listeners then. entrance: bound to `entrance_path` and listening."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._accept(entrance, self._enter))
                for listener in self._listeners:
                    tasks.create_task(self._accept(listener, self._hand))
        finally:
            for worker in list(self._workers):
                self._leave(worker)
            for listener in self._listeners:
                listener.close()

    async def _accept(self, listener: socket.socket, take: Callable[[socket.socket], Awaitable[None]]) -> None:
        listener.setblocking(False)
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            except ConnectionError:
                continue  # the caller has gone
            except OSError as error:
                logger.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            await take(connection)

    async def _enter(self, worker: socket.socket) -> None:
        self._workers.append(worker)
        self._has_worker.set()
        asyncio.get_running_loop().add_reader(worker, self._leave, worker)  # it says nothing: there is its end to read

    async def _hand(self, connection: socket.socket) -> None:
        """To the next worker that takes it, which one that is full does not. Waits where there is none, and later callers in the kernel."""
        with connection:
            while True:
                await self._has_worker.wait()
                for worker in list(self._workers):
                    self._workers.rotate(-1)
                    try:
                        socket.send_fds(worker, [b"."], [connection.fileno()])
                    except ConnectionError:
                        self._leave(worker)
                    except OSError:  # so many wait there, or on all ways together, that the kernel takes no more
                        continue
                    else:
                        return
                if self._workers:
                    await asyncio.sleep(FULL_S)

    def _leave(self, worker: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(worker)
        self._workers.remove(worker)
        worker.close()
        if not self._workers:
            self._has_worker.clear()


class HandedLoop(uvloop.Loop):
    """An event loop whose servers on an `Entrance` are handed their connections."""

    async def create_server(self, protocol_factory: Any, *args: Any, **options: Any) -> Any:
        entrance = options.get("sock")
        if not isinstance(entrance, Entrance):
            return await super().create_server(protocol_factory, *args, **options)
        entrance.connect(str(entrance.path))
        return _HandedServer(self, entrance, protocol_factory, options.get("ssl"))


class _HandedServer:
    """What uvicorn asks of a server."""

    def __init__(
        self,
        loop: HandedLoop,
        entrance: Entrance,
        protocol_factory: Callable[[], asyncio.Protocol],
        ssl: ssl_module.SSLContext | None,
    ) -> None:
        self._loop, self._entrance, self._protocol_factory, self._ssl = loop, entrance, protocol_factory, ssl
        self._opening: set[asyncio.Task[None]] = set()
        entrance.setblocking(False)
        loop.add_reader(entrance, self._take)

    def _take(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._entrance, 1, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:  # the parent stops
            self.close()
        elif not descriptors:  # the kernel closes what it cannot give
            logger.warning("a connection was lost: this process may have no more descriptors")
        for descriptor in descriptors:
            task = self._loop.create_task(self._open(socket.socket(fileno=descriptor)))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(self._protocol_factory, connection, ssl=self._ssl)
        except OSError as error:  # the caller has gone, or does not speak TLS
            logger.debug("a connection ended before its first request: %s", error)
            connection.close()

    def close(self) -> None:
        """The parent notes it; what it has handed over and nobody has taken is closed with the entrance."""
        with contextlib.suppress(ValueError):
            self._loop.remove_reader(self._entrance)
        self._entrance.close()

    async def wait_closed(self) -> None:
        pass
