"""The engine's side of the socket: one reader and one writer thread a connection, around an EngineLoop.

    connection ── frames ──> reader ──> EngineLoop inbox          EngineLoop ──> outbox ──> writer ──> connection

The engine thread only puts into outboxes. A connection whose door does not read (outbox full) is closed: its requests are
cancelled, the others go on. A connection's end cancels what it submitted.
"""

import contextlib
import fcntl
import logging
import os
import queue
import select
import socket
import threading
import time
from pathlib import Path
from typing import Any

from turbotriton.contract.errors import ServerError, TurbotritonError, UnavailableError
from turbotriton.contract.wire import EngineStats, FinishReason, TokenDelta

from .engine import Engine
from .ipc import FrameSocket, decode_request, encode_deltas, encode_fields
from .loop import EngineLoop

__all__ = ["EngineServer", "alive_path"]

logger = logging.getLogger(__name__)

MAX_OUTBOX_FRAMES = 20_000
LINGER_S = 2.0  # how long the engine outlives its last connection
FIRST_CONNECTION_S = 60.0  # how long it waits for the first
DRAINED_S = (
    30.0  # how long a drained engine waits for its connections to leave: the server may stop, or only the engine was asked to
)


def alive_path(socket_path: Path) -> Path:
    """The file beside a socket that its engine keeps locked while it lives."""
    return socket_path.with_suffix(".alive")


class _Connection:
    def __init__(self, sock: socket.socket, number: int) -> None:
        self.frames = FrameSocket(sock)
        self.number = number
        self.outbox: queue.Queue[tuple[str, Any] | None] = queue.Queue(MAX_OUTBOX_FRAMES)

    def put(self, kind: str, payload: Any) -> None:
        try:
            self.outbox.put_nowait((kind, payload))
        except queue.Full:
            logger.error("connection %d does not read its %d frames; closing it", self.number, MAX_OUTBOX_FRAMES)
            self.frames.close()


class EngineServer:
    """Serves `engine` at `path` until the owner is gone, or `LINGER_S` after the last connection closed."""

    def __init__(self, engine: Engine, path: Path, owner_pid: int | None) -> None:
        self._engine = engine
        self._path = path
        self._owner_pid = owner_pid
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._num_connections = 0
        self._last_change = time.monotonic()
        self._failure: str | None = None
        self._drained_until: float | None = None  # on time.monotonic
        self._wake_read, self._wake_write = os.pipe()
        self._loop = EngineLoop(engine, self._deliver, self._publish, self._fail)

    def serve(self) -> int:
        """Blocks. Returns the exit code of the process: 0 when nobody needs the engine, 1 when it failed."""
        with open(alive_path(self._path), "w", encoding="utf-8") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            return self._serve()

    def drain(self) -> None:
        """Ends every request and refuses new ones, for a server that stops; the connections stay. May run in a signal handler."""
        self._drained_until = time.monotonic() + DRAINED_S
        self._loop.drain(UnavailableError("the server is stopping; send the request again when it is back"))

    def _serve(self) -> int:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        staged = self._path.with_suffix(".new")
        staged.unlink(missing_ok=True)
        listener.bind(str(staged))
        os.chmod(staged, 0o600)
        listener.listen(64)
        os.rename(staged, self._path)  # whoever sees the socket can connect to it
        self._loop.start()
        try:
            self._accept(listener)
        finally:
            for path in (self._path, alive_path(self._path)):
                path.unlink(missing_ok=True)
            listener.close()
        if self._failure is not None:
            return 1
        self._loop.stop()
        self._engine.close()
        return 0

    def _accept(self, listener: socket.socket) -> None:
        owner_fd = _pidfd(self._owner_pid)
        watched: list[Any] = [listener, self._wake_read, *([] if owner_fd is None else [owner_fd])]
        while self._failure is None:
            ready, _, _ = select.select(watched, [], [], 0.2)
            if owner_fd is not None and owner_fd in ready:
                logger.info("process %s is gone; the engine leaves with it", self._owner_pid)
                return
            if listener in ready:
                sock, _ = listener.accept()
                self._open(sock)
            elif self._is_abandoned():
                logger.info("no connection is left; the engine leaves")
                return
            elif self._drained_until is not None and time.monotonic() > self._drained_until:
                logger.info("the engine was asked to end; it leaves")
                return

    def _is_abandoned(self) -> bool:
        with self._lock:
            patience = LINGER_S if self._num_connections else FIRST_CONNECTION_S
            return not self._connections and time.monotonic() - self._last_change > patience

    def _open(self, sock: socket.socket) -> None:
        with self._lock:
            self._num_connections += 1
            connection = _Connection(sock, self._num_connections)
            self._connections.add(connection)
        connection.put("hello", encode_fields(self._engine.info(os.getpid())))
        threading.Thread(target=self._write, args=(connection,), name=f"write-{connection.number}", daemon=True).start()
        threading.Thread(target=self._read, args=(connection,), name=f"read-{connection.number}", daemon=True).start()

    def _read(self, connection: _Connection) -> None:
        try:
            while (frame := connection.frames.receive()) is not None:
                self._take(connection, *frame)
        except TurbotritonError as error:
            logger.error("connection %d: %s", connection.number, error)
        self._loop.drop(connection)
        with self._lock:
            self._connections.discard(connection)
            self._last_change = time.monotonic()
        connection.frames.close()
        with contextlib.suppress(queue.Full):  # a full outbox's writer ends at the closed socket
            connection.outbox.put_nowait(None)

    def _take(self, connection: _Connection, kind: str, payload: Any) -> None:
        if kind == "cancel" and isinstance(payload, int):
            self._loop.cancel(connection, payload)
            return
        if kind == "cancel_named" and isinstance(payload, str):
            self._loop.cancel_named(payload)
            return
        try:
            self._loop.submit(connection, decode_request(payload))
        except TurbotritonError as error:
            request_id = payload.get("request_id") if isinstance(payload, dict) else None
            if not isinstance(request_id, int) or not 0 <= request_id < 2**63:
                raise ServerError(f"a submit frame without a request id: {error}") from None
            refusal = TokenDelta(request_id, finish_reason=FinishReason.ERROR, error=str(error), error_status=error.triton_status)
            connection.put("deltas", encode_deltas([refusal]))

    def _write(self, connection: _Connection) -> None:
        while (frame := connection.outbox.get()) is not None:
            try:
                connection.frames.send(*frame)
            except OSError:
                connection.frames.close()  # the reader sees it and cleans up
                return

    def _deliver(self, owner: object, deltas: list[TokenDelta]) -> None:
        assert isinstance(owner, _Connection)
        owner.put("deltas", encode_deltas(deltas))

    def _publish(self, stats: EngineStats) -> None:
        payload = encode_fields(stats)
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.put("stats", payload)

    def _fail(self, reason: str) -> None:
        logger.critical("%s", reason)
        self._failure = reason
        os.write(self._wake_write, b"x")


def _pidfd(pid: int | None) -> int | None:
    """A descriptor that becomes readable when the process ends; a dead pid raises ProcessLookupError."""
    return None if pid is None else os.pidfd_open(pid)
