"""Answers that end when the caller leaves: a coroutine that is cancelled then, and a stream of text as an ASGI response."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["EventStream", "until_gone"]

T = TypeVar("T")


async def until_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """The work's result; None when the caller left first: the work is cancelled and has ended then."""

    async def working() -> T:
        return await work

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.create_task(working()), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


class EventStream(Response):
    """Starlette's StreamingResponse with less between a line and its write, and with its generator closed before it ends."""

    media_type = "text/event-stream"

    def __init__(self, first: str, lines: AsyncGenerator[str], headers: Mapping[str, str]) -> None:
        self.status_code = 200
        self.background = None
        self._first, self._lines = first, lines
        self.init_headers(headers)

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers(headers)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._lines) as lines:
            await send({"type": "http.response.body", "body": self._first.encode(), "more_body": True})
            async for line in lines:
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
