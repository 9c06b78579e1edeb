"""A door's connection to its engine: made at load, made again when the engine dies, refused while it is away."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from turbotriton.backend.engine.client import EngineClient
from turbotriton.backend.engine.launcher import EngineLauncher
from turbotriton.contract.errors import TurbotritonError, UnavailableError

__all__ = ["EngineConnection"]

logger = logging.getLogger(__name__)

RETRY_DELAYS_S = (0.05, 0.5, 2.0, 5.0)  # the last one repeats


class EngineConnection:
    """Thread-safe. `connect` blocks while the weights load; after that a dead engine is replaced in the background."""

    def __init__(self, weights_dir: Path, owner_pid: int, connect: Callable[[], EngineClient] | None = None) -> None:
        self._connect = connect or EngineLauncher(weights_dir, owner_pid).connect
        self._client: EngineClient | None = None
        self._is_closing = threading.Event()

    def connect(self) -> EngineClient:
        """The first connection. Raises what the launcher raises: a model that cannot load should not become ready."""
        client = self._connect()
        self._client = client
        client.on_disconnect(self._reconnect)
        return client

    @property
    def is_up(self) -> bool:
        client = self._client
        return client is not None and client.is_alive

    def client(self) -> EngineClient:
        """Raises UnavailableError while the engine is away."""
        client = self._client
        if client is None or not client.is_alive:
            raise UnavailableError("the engine is starting again; try in a few seconds")
        return client

    def close(self) -> None:
        """The engine cancels what this door has submitted and leaves when it was the last."""
        self._is_closing.set()
        if self._client is not None:
            self._client.close()

    def _reconnect(self) -> None:
        if not self._is_closing.is_set():
            logger.error("the engine process ended; starting it again")
            threading.Thread(target=self._retry, name="engine-reconnect", daemon=True).start()

    def _retry(self) -> None:
        attempt = 0
        while not self._is_closing.wait(RETRY_DELAYS_S[min(attempt, len(RETRY_DELAYS_S) - 1)]):
            attempt += 1
            try:
                client = self._connect()
            except (TurbotritonError, OSError) as error:
                logger.error("the engine is still away: %s", error)
                continue
            if self._is_closing.is_set():
                client.close()
                return
            self._client = client
            client.on_disconnect(self._reconnect)
            logger.info("the engine is back (pid %d)", client.info.pid)
            return
