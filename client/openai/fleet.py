"""The tritonservers behind this server: which text doors they have, which one gets a request, which one is away.

A request goes to the live server with the fewest of ours under way, among equals to any: several processes, which do not know of each
other's requests, would all begin with the first. One that does not answer rests for REST_S; a request that met it
before its first token goes to the next.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from turbotriton.client.grpc_stream import AsyncClient
from turbotriton.client.text_door import DEFAULTS, Delta
from turbotriton.contract.errors import TurbotritonError, UnavailableError

from .errors import ApiError

__all__ = ["Fleet"]

REST_S = 2.0
MODELS_FRESH_S = 10.0
ANSWERS_A_TOKEN = 8
MOST_TOKENS = 4  # that wait for each other: 30 ms of an 8B model's steps of 64 rows


class _Server:
    def __init__(self, url: str) -> None:
        self.url = url
        self.num_running = 0
        self.rests_until = 0.0
        self.models: tuple[str, ...] = ()
        self._models_at = -MODELS_FRESH_S
        self._clients: dict[str, AsyncClient] = {}

    async def text_doors(self) -> tuple[str, ...]:
        """Names of its text doors, asked every MODELS_FRESH_S. Raises UnavailableError."""
        if time.monotonic() - self._models_at >= MODELS_FRESH_S:
            self.models = await self.client("").text_doors()
            self._models_at = time.monotonic()
        return self.models

    def client(self, model: str) -> AsyncClient:
        if model not in self._clients:
            self._clients[model] = AsyncClient(self.url, model or None)
        return self._clients[model]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()


class Fleet:
    """Make it inside a running event loop. urls: HOST:PORT of each tritonserver's gRPC.

    stream_interval: tokens in a delta after the first. 0: one, and one more for each ANSWERS_A_TOKEN answers under way when the stream
    begins, up to MOST_TOKENS: a response costs this process 40 to 160 us of its one core whatever is in it, and 64 streams of single
    tokens of a small model would wait for it and not for the engine.
    """

    def __init__(self, urls: Sequence[str], stream_interval: int = 0) -> None:
        self._servers = [_Server(url) for url in urls]
        self._stream_interval = stream_interval

    async def models(self) -> list[str]:
        """Every text door of every live server. Raises UnavailableError when none answers."""
        answers = await asyncio.gather(*(server.text_doors() for server in self._servers), return_exceptions=True)
        names: dict[str, None] = {}
        for server, answer in zip(self._servers, answers, strict=True):
            if isinstance(answer, TurbotritonError):
                server.rests_until = time.monotonic() + REST_S
            elif isinstance(answer, BaseException):
                raise answer
            else:
                names.update(dict.fromkeys(answer))
        failures = [answer for answer in answers if isinstance(answer, TurbotritonError)]
        if not names and failures:
            raise failures[0]
        return list(names)

    async def check_model(self, model: str) -> None:
        """Raises ApiError 404 unless some server has this text door."""
        if any(model in server.models for server in self._servers):
            return
        names = await self.models()
        if model not in names:
            raise ApiError(
                404,
                f"The model `{model}` does not exist; served: {', '.join(names) or 'none'}.",
                param="model",
                code="model_not_found",
            )

    @contextlib.asynccontextmanager
    async def stream(
        self, model: str, prompt: Mapping[str, Any], options: Mapping[str, Any], *, stream: bool = True
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        """The deltas of one answer; leaving the block early cancels it. prompt: one of prompt, messages and input_ids by name.

        The first delta is there when the block begins, so that a refusal can still become a status; without `stream` it is the only
        one. Raises TurbotritonError.
        """
        options = {name: value for name, value in options.items() if value is not None and value != DEFAULTS.get(name)}
        tried: list[_Server] = []
        num_running = sum(server.num_running for server in self._servers)
        interval = self._stream_interval or min(1 + num_running // ANSWERS_A_TOKEN, MOST_TOKENS)
        if stream and interval > 1:
            options = {**options, "sampling_parameters": {**options.get("sampling_parameters", {}), "stream_interval": interval}}
        while True:
            server = self._pick(model, tried)
            tried.append(server)
            server.num_running += 1
            try:
                async with await server.client(model).stream(**prompt, **options, in_deltas=stream) as deltas:
                    try:
                        await deltas.peek()
                    except UnavailableError as error:
                        if "no tritonserver answers" not in str(error):
                            raise
                        server.rests_until = time.monotonic() + REST_S
                        if len(tried) < len(self._having(model)):
                            continue
                        raise
                    yield deltas
                    return
            finally:
                server.num_running -= 1

    def _having(self, model: str) -> list[_Server]:
        return [server for server in self._servers if model in server.models] or self._servers

    def _pick(self, model: str, tried: Sequence[_Server]) -> _Server:
        now = time.monotonic()
        candidates = [server for server in self._having(model) if server not in tried]
        return min(candidates, key=lambda server: (server.rests_until > now, server.num_running, random.random()))

    def any_client(self) -> AsyncClient:
        """A client of the best server, for calls that are no answers."""
        return self._pick("", ()).client("")

    async def close(self) -> None:
        for server in self._servers:
            await server.close()
