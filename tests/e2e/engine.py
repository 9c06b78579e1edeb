"""What the engine behind a running server counts, without the metrics page between."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from turbotriton.backend.engine.client import EngineClient
from turbotriton.contract.wire import EngineInfo, EngineStats

from .server import TritonServer

#: Seconds until what has to happen counts as missing: only a test that fails waits for so long.
PATIENCE_S = 60.0


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> float:
    """Seconds until `condition()` held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - began


class EngineWatch:
    """A connection of its own to the engine of a server."""

    def __init__(self, server: TritonServer) -> None:
        self._client = EngineClient.connect(next((server.folder / "run").glob("*.sock")), timeout_s=PATIENCE_S)

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    @property
    def is_alive(self) -> bool:
        return self._client.is_alive

    @property
    def newest(self) -> EngineStats:
        """The newest snapshot that has come, which may be a fraction of a second old."""
        return self._client.stats()

    def stats(self) -> EngineStats:
        """A snapshot that the engine makes after this was called: all that had ended by then is counted."""
        for _ in range(2):  # the first to come may have been on its way
            seen = self.newest
            wait_until(lambda seen=seen: self.newest is not seen, "a snapshot of the engine")
        return self.newest

    def close(self) -> None:
        self._client.close()


@contextmanager
def watched(server: TritonServer) -> Iterator[EngineWatch]:
    watch = EngineWatch(server)
    try:
        yield watch
    finally:
        watch.close()


@contextmanager
def cancelling(server: TritonServer, count: int = 1) -> Iterator[EngineWatch]:
    """By what the block does the engine cancels `count` requests, and every KV block is free again."""
    with watched(server) as engine:

        def num_cancelled() -> int:
            return engine.stats().requests_total.get("cancelled", 0)

        before = num_cancelled()
        yield engine
        wait_until(lambda: num_cancelled() >= before + count, f"{count} requests being cancelled at the engine")
        assert num_cancelled() == before + count
        assert engine.stats().num_used_blocks == 0
