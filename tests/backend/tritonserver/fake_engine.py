"""An engine client that records what a door asks of it and answers when the test says so."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from turbotriton.contract.errors import EngineDiedError, UnavailableError
from turbotriton.contract.wire import EngineInfo, EngineStats, FinishReason, GenerateRequest, TokenDelta

INFO = EngineInfo(
    pid=1,
    model_name="demo",
    vocab_size=512,
    session_len=64,
    eos_token_ids=(2,),
    bos_token_id=0,
    max_batch_size=4,
    block_size=16,
    num_blocks=8,
    max_queued_requests=8,
    max_queued_tokens=64,
    device="cpu",
    compute_dtype="fp32",
)


@dataclass
class FakeClient:
    info: EngineInfo = INFO
    is_alive: bool = True
    requests: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    cancelled_names: list[str] = field(default_factory=list)
    current: EngineStats = field(default_factory=EngineStats)
    observations: tuple[list[float], list[float], list[float]] = ([], [], [])
    _sinks: dict[int, Callable[[TokenDelta], None]] = field(default_factory=dict)
    _ids: Any = field(default_factory=lambda: itertools.count(1))
    has_cancelled: threading.Event = field(default_factory=threading.Event)

    def next_request_id(self) -> int:
        return next(self._ids)

    def submit(self, request: GenerateRequest, sink: Callable[[TokenDelta], None]) -> None:
        if not self.is_alive:
            raise EngineDiedError("the engine process is away; try again when it is up")
        self.requests.append(request)
        self._sinks[request.request_id] = sink

    def answer(self, ids: Sequence[int] = (), finish: FinishReason | None = FinishReason.LENGTH, **rest: Any) -> None:
        """To the newest request."""
        request_id = self.requests[-1].request_id
        self._sinks[request_id](TokenDelta(request_id, tuple(ids), finish_reason=finish, **rest))

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)
        self.has_cancelled.set()

    def cancel_named(self, name: str) -> None:
        self.cancelled_names.append(name)

    def stats(self) -> EngineStats:
        return self.current

    def take_observations(self) -> tuple[list[float], list[float], list[float]]:
        taken, self.observations = self.observations, ([], [], [])
        return taken


@dataclass
class FakeConnection:
    """In the place of EngineConnection."""

    current: FakeClient = field(default_factory=FakeClient)
    is_closed: bool = False

    def connect(self) -> FakeClient:
        return self.current

    @property
    def is_up(self) -> bool:
        return self.current.is_alive

    def client(self) -> FakeClient:
        if not self.current.is_alive:
            raise UnavailableError("the engine is starting again; try in a few seconds")
        return self.current

    def close(self) -> None:
        self.is_closed = True
