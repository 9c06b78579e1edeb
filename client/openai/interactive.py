"""LMDeploy's /v1/chat/interactive: conversations that live here as messages, answers as newline-delimited JSON.

The prefix cache of the engine keeps what it computed for a conversation; here only its messages are held (sessions.py).
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from turbotriton.client.text_door import Delta
from turbotriton.contract.errors import TurbotritonError

from .chat_answers import plain_message
from .errors import ApiError, api_error
from .fleet import Fleet
from .schema import InteractiveRequest
from .sessions import Session, SessionStore

__all__ = ["Interactive"]


@dataclass(slots=True)
class _Turn:
    """One question and what there is of its answer. messages: of the conversation, the question last."""

    messages: list[dict[str, Any]]
    text: str = ""
    num_input: int = 0
    num_output: int = 0
    history_tokens: int = 0
    is_over: bool = False  # the last reply is given

    def take(self, delta: Delta) -> None:
        self.text += delta.text
        self.num_input = delta.num_input_tokens or self.num_input
        self.num_output = delta.num_output_tokens or self.num_output

    def note_in(self, session: Session) -> None:
        session.messages = [*self.messages, {"role": "assistant", "content": self.text}]
        session.num_tokens = self.num_input + self.num_output


class Interactive:
    """Belongs to one event loop."""

    def __init__(self, fleet: Fleet, sessions: SessionStore) -> None:
        self._fleet, self._sessions = fleet, sessions

    async def replies(self, request: InteractiveRequest) -> AsyncGenerator[dict[str, Any]]:
        """{text, tokens, input_tokens, history_tokens, finish_reason} as they come; the last has finish_reason. Raises ApiError."""
        if request.cancel:
            yield await self._cancel(request.session_id)
            return
        if request.prompt in ("", []):  # LMDeploy's way to end a session
            await self._sessions.end(request.session_id)
            yield _reply("", 0, 0, 0, "stop")
            return
        came: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        running: asyncio.Task[None]

        def cancel() -> None:
            asyncio.get_running_loop().call_soon(
                lambda: running.cancel()
            )  # after its first step: before that it would end unheard

        async with self._sessions.turn(request.session_id, cancel, is_kept=request.interactive_mode) as session:
            running = asyncio.create_task(self._run(request, session, came))
            try:
                while (reply := await came.get()) is not None:
                    if isinstance(reply, Exception):
                        raise reply
                    yield reply
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    async def _run(
        self, request: InteractiveRequest, session: Session, came: "asyncio.Queue[dict[str, Any] | Exception | None]"
    ) -> None:
        """A task of its own, which `cancel` ends; the caller still gets a last reply then, and the conversation keeps what came."""
        prompt = request.prompt
        turn = _Turn([*session.messages, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)])
        try:
            turn.messages = [plain_message(index, message) for index, message in enumerate(turn.messages)]
            async with contextlib.aclosing(self._answer(request, session, turn)) as replies:
                async for reply in replies:
                    came.put_nowait(reply)
                    turn.is_over = reply["finish_reason"] is not None
            came.put_nowait(
                None
            )  # not before the stream's end: one that is cancelled after its last response stays open in the server
        except asyncio.CancelledError:
            if not turn.is_over:
                if turn.num_output:
                    turn.note_in(session)
                num_new = max(0, turn.num_input - turn.history_tokens)
                came.put_nowait(_reply("", turn.num_output, num_new, turn.history_tokens, "stop"))
            came.put_nowait(None)
            raise
        except Exception as error:  # noqa: BLE001  handed to the caller's task
            came.put_nowait(error)

    async def _cancel(self, session_id: int) -> dict[str, Any]:
        if session_id < 0:
            raise ApiError(400, "cancel needs the session_id that is to be cancelled", param="session_id")
        return _reply("", 0, 0, await self._sessions.cancel(session_id), "stop")

    async def _answer(self, request: InteractiveRequest, session: Session, turn: _Turn) -> AsyncGenerator[dict[str, Any]]:
        turn.history_tokens = history_tokens = session.num_tokens
        model = (await self._served())[0]
        try:
            async with self._fleet.stream(model, {"messages": turn.messages}, _options(request)) as deltas:
                async for delta in deltas:
                    turn.take(delta)
                    if delta.finish_reason is not None:
                        turn.note_in(session)
                    num_new = max(0, turn.num_input - history_tokens)
                    yield _reply(delta.text, turn.num_output, num_new, history_tokens, delta.finish_reason)
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
