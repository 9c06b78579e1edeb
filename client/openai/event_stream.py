"""Answers that end when the caller leaves: a coroutine that is cancelled then, and a stream of text as an ASGI response."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DISCONNECTED", "EventStream", "until_gone"]

T = TypeVar("T")
DISCONNECTED = 499


async def until_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """The work's result; None when the caller left first: the work is cancelled and has ended then."""
    working = asyncio.current_task()
    assert working is not None
    has_left = False

    async def gone() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True
        working.cancel()

    leaving = asyncio.create_task(gone())
    try:
        return await work
    except asyncio.CancelledError:
        if not has_left or working.cancelling() > 1:  # somebody else wants this task's end, too
            raise
        return None
    finally:
        leaving.cancel()
        if has_left:
            working.uncancel()


class EventStream(Response):
    """Starlette's StreamingResponse with less between a line and its write, and with its generator closed before it ends.

    lines: text, and whether it is the last, whose write then ends the response; what the generator has to do behind it delays nobody, and
    a caller that leaves does not stop it. Nothing is sent before the first line is there: what fails until then is raised, and
    still gets a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[tuple[str, bool]], headers: Mapping[str, str]) -> None:
        self.status_code = 200
        self.background = None
        self._lines = lines
        self._has_begun = False
        self.init_headers(headers)

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers(headers)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._lines):
            if await until_gone(receive, self._send_all(send)):
                async for _ in self._lines:
                    pass
        if not self._has_begun:
            await Response(status_code=DISCONNECTED)(scope, receive, send)

    async def _send_all(self, send: Send) -> bool:
        """True."""
        async for line, is_last in self._lines:
            if not self._has_begun:
                self._has_begun = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": line.encode(), "more_body": not is_last})
            if is_last:
                return True
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True
