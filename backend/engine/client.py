"""The door's side of the engine's socket: submits requests, hands deltas to their sinks on one receive thread.

When the engine goes away every open sink gets a last TokenDelta with an error, then `on_disconnect` callbacks run, once.
"""

import contextlib
import itertools
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from turbotriton.contract.errors import EngineDiedError, ServerError
from turbotriton.contract.wire import EngineStats, FinishReason, GenerateRequest, TokenDelta

from .ipc import FrameSocket, decode_deltas, decode_info, decode_stats, encode_request

__all__ = ["EngineClient", "Sink"]

logger = logging.getLogger(__name__)

Sink = Callable[[TokenDelta], None]

ENGINE_DIED = "the engine process ended while it worked on this request; send it again"
MAX_OBSERVATIONS = 4096


class EngineClient:
    """Thread-safe. Sinks run on the receive thread and must not block.

    Raises from the constructor: ServerError when the socket does not greet as an engine does, OSError when it closes before it greets
    (an engine that is being killed still takes connections for a moment).
    """

    def __init__(self, sock: socket.socket) -> None:
        self._frames = FrameSocket(sock)
        greeting = self._frames.receive()
        if greeting is None:
            self._frames.close()
            raise ConnectionResetError("the engine closed the connection before it greeted")
        if greeting[0] != "hello":
            self._frames.close()
            raise ServerError(
                f"an engine greets with 'hello', and this socket with {greeting[0]!r}: are both sides of one version?"
            )
        self.info = decode_info(greeting[1])
        self._lock = threading.Lock()
        self._sinks: dict[int, Sink] = {}
        self._ids = itertools.count(1)
        self._stats = EngineStats()
        self._observations: tuple[list[float], list[float], list[float]] = ([], [], [])
        self._callbacks: list[Callable[[], None]] = []
        self._is_alive = True
        self._thread = threading.Thread(target=self._receive, name="engine-receive", daemon=True)
        self._thread.start()

    @classmethod
    def connect(cls, path: Path, timeout_s: float = 5.0) -> "EngineClient":
        """Raises OSError when no living engine listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
            sock.settimeout(None)
            return cls(sock)
        except BaseException:
            sock.close()
            raise

    @property
    def is_alive(self) -> bool:
        return self._is_alive

    def next_request_id(self) -> int:
        return next(self._ids)

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Raises EngineDiedError when the engine is gone; everything else comes to `sink`, refusals included."""
        with self._lock:
            if not self._is_alive:
                raise EngineDiedError("the engine process is away; try again when it is up")
            self._sinks[request.request_id] = sink
        with contextlib.suppress(OSError):  # the receive thread sees the same end and tells every sink
            self._frames.send("submit", encode_request(request))

    def cancel(self, request_id: int) -> None:
        """Idempotent. The last TokenDelta (CANCELLED) still comes."""
        with self._lock:
            known = request_id in self._sinks
        if known:
            with contextlib.suppress(OSError):  # as in submit
                self._frames.send("cancel", request_id)

    def cancel_named(self, name: str) -> None:
        """Cancels every request of this name, whichever connection submitted it."""
        with contextlib.suppress(OSError):
            self._frames.send("cancel_named", name)

    def stats(self) -> EngineStats:
        """The newest snapshot; observations are handed out by take_observations."""
        return self._stats

    def take_observations(self) -> tuple[list[float], list[float], list[float]]:
        """Seconds observed since the last call: to first token, between tokens, end to end."""
        with self._lock:
            taken, self._observations = self._observations, ([], [], [])
        return taken

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Runs `callback` on the receive thread when the engine goes away; at once when it has."""
        with self._lock:
            if self._is_alive:
                self._callbacks.append(callback)
                return
        callback()

    def close(self) -> None:
        """The engine cancels all that is open; sinks get their last delta."""
        self._frames.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _receive(self) -> None:
        try:
            while (frame := self._frames.receive()) is not None:
                kind, payload = frame
                if kind == "deltas":
                    for delta in decode_deltas(payload):
                        self._hand_on(delta)
                elif kind == "stats":
                    self._take_stats(decode_stats(payload))
        except ServerError as error:
            logger.error("closing the connection: %s", error)
        self._end()

    def _hand_on(self, delta: TokenDelta) -> None:
        with self._lock:
            is_last = delta.finish_reason is not None
            sink = self._sinks.pop(delta.request_id, None) if is_last else self._sinks.get(delta.request_id)
        if sink is None:
            return
        try:
            sink(delta)
        except Exception:  # one request's sink must not end the others
            logger.exception("request %s: its sink failed", delta.request_id)

    def _take_stats(self, stats: EngineStats) -> None:
        with self._lock:
            for kept, new in zip(self._observations, (stats.ttft_s, stats.inter_token_s, stats.e2e_s), strict=True):
                kept.extend(new)
                del kept[:-MAX_OBSERVATIONS]
        self._stats = stats

    def _end(self) -> None:
        with self._lock:
            self._is_alive = False
            open_ids = list(self._sinks)
            callbacks, self._callbacks = self._callbacks, []
        for request_id in open_ids:
            self._hand_on(TokenDelta(request_id, finish_reason=FinishReason.ERROR, error=ENGINE_DIED, error_status="UNAVAILABLE"))
        for callback in callbacks:
            callback()
