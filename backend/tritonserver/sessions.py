"""Sessions of the `turbomind` door: token ids a conversation has so far, kept between requests. Pure Python.

Rules (LMDeploy's, with its error codes):
    START and STOP together, or START = 0 for an unknown session    1 kInvalid
    the session is answering another request                        3 kBusy
    STOP without END for a session that is idle                     4 kInactive
    kept and new tokens together longer than session_len            6 kTooLong

Bounded: at most MAX_SESSIONS and MAX_TOKENS; the least recently used idle ones go first and are unknown from then on.
Not thread-safe: the door holds a lock around each call.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from turbotriton.contract.errors import InvalidInputError, TurbotritonError

__all__ = ["Session", "SessionError", "SessionStore"]

MAX_SESSIONS = 4096
MAX_TOKENS = 16_777_216

INVALID, CONFLICT, BUSY, INACTIVE, FAIL, TOO_LONG = 1, 2, 3, 4, 5, 6


class SessionError(InvalidInputError):
    """One of LMDeploy's codes; the text is the one its clients look for."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"TurboMind execute failure:  {code} ({reason})")
        self.code = code


@dataclass(slots=True)
class Session:
    """token_ids grows while a request runs; `running` names that request's interrupt, None when idle.

    num_kept: how many of token_ids were there before the request under way (or the last one) was taken in.
    """

    token_ids: list[int] = field(default_factory=list)
    seed: int | None = None
    running: object | None = None
    num_kept: int = 0
    ends_when_done: bool = False


class SessionStore:
    def __init__(self, max_sessions: int = MAX_SESSIONS, max_tokens: int = MAX_TOKENS) -> None:
        self._max_sessions = max_sessions
        self._max_tokens = max_tokens
        self._sessions: OrderedDict[int, Session] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_tokens(self) -> int:
        return sum(len(session.token_ids) for session in self._sessions.values())

    def find(self, session_id: int) -> Session | None:
        return self._sessions.get(session_id)

    def begin(
        self,
        session_id: int,
        input_ids: Sequence[int],
        *,
        start: bool,
        end: bool,
        step: int | None,
        seed: int | None,
        session_len: int,
        request: object,
    ) -> Session:
        """Takes a request in: its session now holds the kept tokens and the new ones. Raises SessionError; then nothing changed."""
        session = self._sessions.get(session_id)
        if session is not None and session.running is not None:
            raise SessionError(BUSY, f"session {session_id} is answering another request")
        if not start and session is None:
            raise SessionError(INVALID, f"session {session_id} is unknown; begin it with START = 1")
        kept = [] if start or session is None else session.token_ids
        if step is not None and 0 <= step < len(kept):  # a larger one is ignored, as LMDeploy does
            kept = kept[:step]
        if len(kept) + len(input_ids) > session_len:
            raise SessionError(TOO_LONG, f"{len(kept) + len(input_ids)} tokens, session_len is {session_len}")
        if start or session is None:
            session = self._sessions[session_id] = Session(seed=seed)
        session.token_ids = [*kept, *input_ids]
        session.num_kept = len(kept)
        session.running = request
        session.ends_when_done = end
        self._sessions.move_to_end(session_id)
        self._evict()
        return session

    def stop(self, session_id: int, *, start: bool, end: bool) -> Session:
        """The session that a STOP interrupts. Raises SessionError. With END an idle session is erased (running is None)."""
        if start:
            raise SessionError(INVALID, "START and STOP exclude each other")
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionError(INVALID, f"session {session_id} is unknown")
        if session.running is None:
            if not end:
                raise SessionError(INACTIVE, f"session {session_id} runs no request")
            del self._sessions[session_id]
        elif end:
            session.ends_when_done = True
        return session

    def done(self, session_id: int, session: Session) -> None:
        """The request under way has ended."""
        session.running = None
        if session.ends_when_done and self._sessions.get(session_id) is session:
            del self._sessions[session_id]

    def failed(self, session_id: int, session: Session) -> None:
        """The request under way was refused or broke: its tokens go, or they would break every later turn too."""
        del session.token_ids[session.num_kept :]
        self.done(session_id, session)

    def _evict(self) -> None:
        total = self.num_tokens
        for session_id in list(self._sessions):
            if len(self._sessions) <= self._max_sessions and total <= self._max_tokens:
                return
            session = self._sessions[session_id]
            if session.running is None:
                total -= len(session.token_ids)
                del self._sessions[session_id]


def execution_failure(error: TurbotritonError) -> str:
    """What the door says of any other failure: LMDeploy's kFail, with our reason."""
    return f"TurboMind execute failure:  {FAIL} ({error})"
