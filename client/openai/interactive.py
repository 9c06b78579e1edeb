"""LMDeploy's /v1/chat/interactive: conversations that live here as messages, answers as newline-delimited JSON.

The prefix cache of the engine keeps what it computed for a conversation; here only its messages are held, for the MAX_SESSIONS that
spoke last.
"""

import asyncio
import contextlib
import itertools
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from turbotriton.contract.errors import TurbotritonError

from .errors import ApiError, api_error
from .fleet import Fleet
from .schema import InteractiveRequest

__all__ = ["Interactive"]

MAX_SESSIONS = 4096


@dataclass(slots=True)
class _Session:
    messages: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: int = 0  # of the conversation so far
    running: "asyncio.Task[None] | None" = None


class Interactive:
    """Belongs to one event loop."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._sessions: OrderedDict[int, _Session] = OrderedDict()
        self._numbers = itertools.count(1)

    async def replies(self, request: InteractiveRequest) -> AsyncGenerator[dict[str, Any]]:
        """{text, tokens, input_tokens, history_tokens, finish_reason} as they come; the last has finish_reason. Raises ApiError."""
        if request.cancel:
            yield self._cancel(request.session_id)
            return
        session_id = next(self._numbers) | 1 << 62 if request.session_id < 0 else request.session_id
        if request.prompt in ("", []):  # LMDeploy's way to end a session
            self._sessions.pop(session_id, None)
            yield _reply("", 0, 0, 0, "stop")
            return
        session = self._open(session_id)
        turn = [{"role": "user", "content": request.prompt}] if isinstance(request.prompt, str) else list(request.prompt)
        session.running = asyncio.current_task()
        try:
            async with contextlib.aclosing(self._answer(request, session, turn)) as replies:
                async for reply in replies:
                    yield reply
        finally:
            session.running = None
            if not request.interactive_mode:
                self._sessions.pop(session_id, None)

    def _open(self, session_id: int) -> _Session:
        session = self._sessions.setdefault(session_id, _Session())
        self._sessions.move_to_end(session_id)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        if session.running is not None:
            raise ApiError(409, f"session_id {session_id} is answering; wait for it or send cancel", param="session_id")
        return session

    def _cancel(self, session_id: int) -> dict[str, Any]:
        if session_id < 0:
            raise ApiError(400, "cancel needs the session_id that is to be cancelled", param="session_id")
        session = self._sessions.get(session_id)
        if session is not None and session.running is not None:
            session.running.cancel()
        return _reply("", 0, 0, session.num_tokens if session else 0, "stop")

    async def _answer(
        self, request: InteractiveRequest, session: _Session, turn: list[dict[str, Any]]
    ) -> AsyncGenerator[dict[str, Any]]:
        history_tokens, text, num_input, num_output = session.num_tokens, "", 0, 0
        messages = [*session.messages, *turn]
        model = (await self._served())[0]
        try:
            async with self._fleet.stream(model, {"messages": messages}, _options(request)) as deltas:
                async for delta in deltas:
                    text += delta.text
                    num_input, num_output = delta.num_input_tokens or num_input, delta.num_output_tokens or num_output
                    if delta.finish_reason is not None:
                        session.messages = [*messages, {"role": "assistant", "content": text}]
                        session.num_tokens = num_input + num_output
                    yield _reply(delta.text, num_output, max(0, num_input - history_tokens), history_tokens, delta.finish_reason)
        except TurbotritonError as error:
            raise api_error(error) from None

    async def _served(self) -> list[str]:
        try:
            models = await self._fleet.models()
        except TurbotritonError as error:
            raise api_error(error) from None
        if not models:
            raise ApiError(503, "no model is ready", code="unavailable")
        return models


def _reply(text: str, tokens: int, input_tokens: int, history_tokens: int, finish_reason: str | None) -> dict[str, Any]:
    return {
        "text": text, "tokens": tokens, "input_tokens": input_tokens, "history_tokens": history_tokens, "finish_reason": finish_reason,
    }  # fmt: skip


def _options(request: InteractiveRequest) -> dict[str, Any]:
    names = ("top_p", "top_k", "temperature", "repetition_penalty", "ignore_eos", "skip_special_tokens")
    options = {name: getattr(request, name) for name in names}
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    return options | {"max_tokens": request.request_output_len, "stop_words": stop}
