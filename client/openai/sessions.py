"""The conversations of /v1/chat/interactive, by session_id: who has one now, and the MAX_SESSIONS that spoke last."""

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .errors import ApiError

__all__ = ["Session", "SessionStore", "Sessions"]

MAX_SESSIONS = 4096


@dataclass(slots=True)
class Session:
    """messages, num_tokens: of the conversation so far; the turn that has it writes them. cancel: ends that turn; None: nobody has it."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: int = 0
    cancel: Callable[[], None] | None = None


class SessionStore(Protocol):
    """`Sessions`, or the way to those of another process (`hub.SharedSessions`)."""

    def turn(
        self, session_id: int, cancel: Callable[[], None], *, is_kept: bool
    ) -> contextlib.AbstractAsyncContextManager[Session]:
        """The conversation, nobody else's until the block ends, which keeps what was written to it or forgets it.

        A negative session_id stands for a new one. cancel: called when somebody cancels the session. Raises ApiError 409.
        """

    async def cancel(self, session_id: int) -> int:
        """Cancels the turn that has it, if one has. Returns its num_tokens."""

    async def end(self, session_id: int) -> None:
        """Forgets it."""


class Sessions:
    """A SessionStore in this process. Belongs to one event loop."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[int, Session] = OrderedDict()
        self._numbers = itertools.count(1)

    @contextlib.asynccontextmanager
    async def turn(self, session_id: int, cancel: Callable[[], None], *, is_kept: bool) -> AsyncIterator[Session]:
        if session_id < 0:
            session_id = next(self._numbers) | 1 << 62
        session = self._sessions.setdefault(session_id, Session())
        self._sessions.move_to_end(session_id)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        if session.cancel is not None:
            raise ApiError(409, f"session_id {session_id} is answering; wait for it or send cancel", param="session_id")
        session.cancel = cancel
        try:
            yield session
        finally:
            session.cancel = None
            if not is_kept:
                self._sessions.pop(session_id, None)

    async def cancel(self, session_id: int) -> int:
        session = self._sessions.get(session_id)
        if session is None:
            return 0
        if session.cancel is not None:
            session.cancel()
        return session.num_tokens

    async def end(self, session_id: int) -> None:
        self._sessions.pop(session_id, None)
