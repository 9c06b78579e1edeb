"""What the worker processes of one server have in common: the conversations and the order of the _qos endpoints.

    worker ──┐
    worker ──┼── Unix socket ──> Hub, in the process that started them: Sessions, QosGate
    worker ──┘

A connection is one turn: whoever closes it has given it back, so a worker that dies keeps neither a conversation nor a place. A message
is JSON behind its length. Requests that need neither never come here.
"""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.types import Message

from .errors import ApiError
from .event_stream import until_gone
from .qos import QosGate
from .sessions import Session, Sessions

__all__ = ["Hub", "SharedGate", "SharedSessions", "hub_path"]

_LENGTH = struct.Struct(">Q")


def hub_path(folder: Path) -> Path:
    """Of the socket, in the folder that the processes of one server share."""
    return folder / "hub.sock"


async def _receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """None: the other side has hung up."""
    try:
        (num_bytes,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        message: dict[str, Any] = json.loads(await reader.readexactly(num_bytes))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message


def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    content = json.dumps(message).encode()
    writer.write(_LENGTH.pack(len(content)) + content)


class Hub:
    """Belongs to one event loop. gate: None where there is no QoS file."""

    def __init__(self, gate: QosGate | None) -> None:
        self._gate, self._sessions = gate, Sessions()

    async def serve(self, sock: socket.socket, until: asyncio.Event) -> None:
        """sock: bound to `hub_path`."""
        async with await asyncio.start_unix_server(self._answer, sock=sock, backlog=1024):
            await until.wait()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):  # the worker has gone
            try:
                request = await _receive(reader)
                if request is not None:
                    await self._act(reader, writer, **request)
            except ApiError as error:
                _send(writer, {"error": [error.status, error.message, error.param, error.code]})
            finally:
                writer.close()

    async def _act(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, do: str, **values: Any) -> None:
        if do == "wait":
            await self._wait(reader, writer, **values)
        elif do == "turn":
            await self._turn(reader, writer, **values)
        elif do == "cancel":
            _send(writer, {"num_tokens": await self._sessions.cancel(**values)})
        else:
            await self._sessions.end(**values)
            _send(writer, {})

    async def _wait(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, user_id: str | None) -> None:
        async def hung_up() -> Message:
            await _receive(reader)
            return {"type": "http.disconnect"}

        async def hold() -> None:
            assert self._gate is not None
            async with self._gate.turn(user_id):
                _send(writer, {})
                await asyncio.Event().wait()

        await until_gone(hung_up, hold())

    async def _turn(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session_id: int, is_kept: bool) -> None:
        async with self._sessions.turn(session_id, lambda: _send(writer, {"cancel": True}), is_kept=is_kept) as session:
            _send(writer, {"messages": session.messages, "num_tokens": session.num_tokens})
            if noted := await _receive(reader):
                session.messages, session.num_tokens = noted["messages"], noted["num_tokens"]
        _send(writer, {})


@contextlib.asynccontextmanager
async def _asked(
    folder: Path, **request: Any
) -> AsyncIterator[tuple[dict[str, Any], asyncio.StreamReader, asyncio.StreamWriter]]:
    """The hub's first message; the connection is closed when the block ends. Raises ApiError."""
    try:
        reader, writer = await asyncio.open_unix_connection(hub_path(folder))
    except OSError:
        raise _stopping() from None
    try:
        _send(writer, request)
        if (reply := await _receive(reader)) is None:
            raise _stopping()
        if "error" in reply:
            status, message, param, code = reply["error"]
            raise ApiError(status, message, param=param, code=code)
        yield reply, reader, writer
    finally:
        writer.close()


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping; send the request again when it is back", code="unavailable")


class SharedGate:
    """A `QosGate` that is in the hub. folder: see `hub_path`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.asynccontextmanager
    async def turn(self, user_id: str | None) -> AsyncIterator[None]:
        async with _asked(self._folder, do="wait", user_id=user_id):
            yield


class SharedSessions:
    """A SessionStore that is in the hub. folder: see `hub_path`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.asynccontextmanager
    async def turn(self, session_id: int, cancel: Callable[[], None], *, is_kept: bool) -> AsyncIterator[Session]:
        async with _asked(self._folder, do="turn", session_id=session_id, is_kept=is_kept) as (found, reader, writer):
            session = Session(found["messages"], found["num_tokens"], cancel)
            listening = asyncio.create_task(self._listen(reader, cancel))
            try:
                yield session
            finally:
                is_same = session.messages is found["messages"]
                _send(writer, {} if is_same else {"messages": session.messages, "num_tokens": session.num_tokens})
                await listening  # whoever gets the answer's end may go on at another worker

    async def _listen(self, reader: asyncio.StreamReader, cancel: Callable[[], None]) -> None:
        """Until the hub has the conversation back."""
        while (message := await _receive(reader)) and "cancel" in message:
            cancel()

    async def cancel(self, session_id: int) -> int:
        async with _asked(self._folder, do="cancel", session_id=session_id) as (reply, _, _):
            return int(reply["num_tokens"])

    async def end(self, session_id: int) -> None:
        async with _asked(self._folder, do="end", session_id=session_id):
            pass
