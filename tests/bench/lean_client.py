"""A client of /v1/completions that costs little: what a load generator spends on the same cores is not the server's.

httpx and a JSON parser take longer over an event than the server that makes it. This one counts the events of a read and parses the last
with the usage. Connections are kept and used again.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast
from urllib.parse import urlsplit

from turbotriton.client.bench.targets import Progress, Sampling
from turbotriton.client.bench.workload import Item
from turbotriton.contract.errors import ServerError

__all__ = ["LeanOpenAITarget"]

END = b"data: [DONE]\n\n\r\n0\r\n\r\n"


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.unread = b""
        self.is_lost = False
        self._change: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.unread += data
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        self._wake()

    def _wake(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    async def read(self) -> bytes:
        """What has come since the last time; waits for something. Raises ServerError at the connection's end."""
        if not self.unread and not self.is_lost:
            self._change = asyncio.get_running_loop().create_future()
            await self._change
        if not self.unread:
            raise ServerError("the server closed the connection")
        data, self.unread = self.unread, b""
        return data


class LeanOpenAITarget:
    """As `targets.OpenAITarget`, of our own server. url: http://HOST:PORT."""

    def __init__(self, url: str, model: str, sampling: Sampling) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), parts.port
        self._model, self._sampling = model, sampling
        self._idle: list[_Connection] = []

    async def stream(self, item: Item) -> AsyncIterator[Progress]:
        connection = self._idle.pop() if self._idle else await self._connect()
        assert connection.transport is not None
        connection.transport.write(self._request(item))
        came = await connection.read()
        if not came.startswith(b"HTTP/1.1 200 "):
            raise ServerError(came.decode(errors="replace")[:300])
        num_events, tail = 0, b""
        while True:
            num_events += came.count(b"data: {")  # one that two reads share is not counted: the usage tells the true number
            tail = (tail + came)[-1000:]
            if num_events:
                yield Progress(num_events)
            if tail.endswith(END):
                break
            came = await connection.read()
        self._idle.append(connection)
        usage = json.loads(tail[tail.rindex(b"data: {") + 6 :].split(b"\n\n")[0])["usage"]
        yield Progress(usage["completion_tokens"], usage["prompt_tokens"])

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return connection

    def _request(self, item: Item) -> bytes:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": item.prompt if item.input_ids is None else list(item.input_ids),
            "max_tokens": item.max_tokens,
            "temperature": self._sampling.temperature,
            "ignore_eos": self._sampling.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    async def close(self) -> None:
        for connection in self._idle:
            assert connection.transport is not None
            connection.transport.close()
