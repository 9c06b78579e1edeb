"""The engine on a thread of this process: requests in, deltas to the sink that came with each.

    any thread ── submit(request, sink) ──> EngineLoop ──> engine thread: sink(delta)

Sinks must not block; the last delta of a request (finish_reason set) is always delivered. When the engine fails, every open
request gets one with an error.
"""

import itertools
import logging
import os
import threading
import warnings
from collections.abc import Callable

from turbotriton.backend.engine.engine import Engine
from turbotriton.backend.engine.loop import EngineLoop
from turbotriton.contract import env
from turbotriton.contract.errors import EngineDiedError
from turbotriton.contract.ini import read_workspace_config
from turbotriton.contract.wire import EngineInfo, EngineStats, FinishReason, GenerateRequest, TokenDelta

from .model_files import ModelFiles
from .options import EngineOptions

__all__ = ["EngineThread", "Sink", "load_engine"]

logger = logging.getLogger(__name__)

Sink = Callable[[TokenDelta], None]
_OWNER = "pipeline"


class EngineThread:
    """Thread-safe. `close` ends open requests with an error delta."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.info: EngineInfo = engine.info(os.getpid())
        self._lock = threading.Lock()
        self._sinks: dict[int, Sink] = {}  # under the lock
        self._ids = itertools.count(1)
        self._failure: str | None = None  # under the lock
        self._is_closed = False  # under the lock
        self._stats = EngineStats()
        self._loop = EngineLoop(engine, self._deliver, self._publish, self._fail)
        self._loop.start()

    def next_request_id(self) -> int:
        return next(self._ids)

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Raises EngineDiedError when the engine is closed or has failed; refusals come to `sink`."""
        with self._lock:
            if self._failure is not None:
                raise EngineDiedError(self._failure)
            self._sinks[request.request_id] = sink
        self._loop.submit(_OWNER, request)

    def cancel(self, request_id: int) -> None:
        """Idempotent; the last delta (CANCELLED) still comes."""
        with self._lock:
            known = request_id in self._sinks
        if known:
            self._loop.cancel(_OWNER, request_id)

    @property
    def stats(self) -> EngineStats:
        """The newest snapshot."""
        return self._stats

    def close(self) -> None:
        """Ends the thread after the step under way and frees the device's memory. Idempotent."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if was_closed:
            return
        self._fail("the pipeline is closed")
        self._loop.stop()
        self._engine.close()

    def _deliver(self, owner: object, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            with self._lock:
                is_last = delta.finish_reason is not None
                sink = self._sinks.pop(delta.request_id, None) if is_last else self._sinks.get(delta.request_id)
            if sink is not None:
                sink(delta)

    def _publish(self, stats: EngineStats) -> None:
        self._stats = stats

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = reason
            sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(TokenDelta(request_id, finish_reason=FinishReason.ERROR, error=reason, error_status="UNAVAILABLE"))


def load_engine(files: ModelFiles, options: EngineOptions) -> Engine:
    """Loads the weights and allocates the KV cache. Options, then TURBOTRITON_* variables, then config.ini.

    Raises WorkspaceError, ConfigError.
    """
    from turbotriton.backend.runner.model_runner import ModelRunner

    overrides = options.overrides
    changed = {
        "rope_scaling_factor": str(options.rope_scaling_factor),
        "use_logn_attn": "1" if options.use_logn_attn else None,
    }
    workspace = read_workspace_config(files.weights / "config.ini").with_model_options(changed.get)
    model = workspace.model_config()
    config = workspace.engine_config(lambda name: overrides.get(name) or env.engine_option(name))
    runner = ModelRunner(model, config, files.weights, reference_ops=options.reference_ops)
    if not options.reference_ops and runner.device == "cpu":
        warnings.warn("no CUDA device: the plain torch reference ops run on the CPU instead of the kernels", stacklevel=2)
    return Engine(model, config, runner)
