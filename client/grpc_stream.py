"""`Client` and `AsyncClient`: text in, text out over gRPC on the text door.

Each request travels on a gRPC stream of its own over one shared channel, so requests of several threads (or tasks) run at
once, and closing one's stream cancels it at the engine without touching the others.

    with Client("localhost:8001") as client:
        for delta in client.stream(messages=[{"role": "user", "content": "Hello"}], max_tokens=64):
            print(delta.text, end="", flush=True)
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from tritonclient.grpc import service_pb2

from turbotriton.contract.errors import ServerError, TurbotritonError

from .kserve import (
    Tensor,
    build_request,
    channel_options,
    check_url,
    drain,
    drain_async,
    error_from_rpc,
    make_stream_infer,
    make_stub,
    read_outputs,
)
from .text_door import LMDEPLOY_MODELS, Delta, DeltaReader, Result, build_generate_request, join_deltas, pick_model

__all__ = ["AsyncClient", "AsyncStream", "Client", "Delta", "Result", "Stream"]

LOOKUP_TIMEOUT_S = 10.0
RECONNECT_TIMEOUT_S = 2.0


class Stream(Iterator[Delta]):
    """The deltas of one request. `cancel()` may be called from any thread; leaving the `with` block early cancels too."""

    def __init__(self, call: Any, url: str, note_lost: Callable[[], None]) -> None:
        self._call = call
        self._url = url
        self._note_lost = note_lost
        self._read = DeltaReader().read
        self._is_finished = False  # its last delta or its error has come
        self._is_ended = False  # and the end of the RPC
        self._is_cancelled = False

    def __next__(self) -> Delta:
        """Raises StopIteration after the last delta or after cancel(), and our errors when the request failed."""
        try:
            for response in self._call:
                delta = self._read(response)
                if delta is not None:
                    self._is_finished = delta.finish_reason is not None
                    return delta
        except grpc.RpcError as error:
            if self._is_cancelled:
                raise StopIteration from None
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                self._note_lost()
            raise error_from_rpc(error, self._url) from None
        except TurbotritonError:  # the response carries it
            self._is_finished = True
            self.cancel()
            raise
        except BaseException:
            self.cancel()
            raise
        self._is_ended = True
        if not self._is_finished and not self._is_cancelled:
            raise ServerError(f"{self._url} ended the stream before the answer was complete; its log may tell why")
        raise StopIteration

    def cancel(self) -> None:
        """Closes the stream; the engine frees the request's blocks. Idempotent; after the last delta it is read to its end instead."""
        if self._is_finished and not self._is_ended:
            self._is_ended = True
            drain(self._call)
            return
        if not self._is_finished:
            self._is_cancelled = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()


class Client:
    """A connection to one text door. Thread-safe. `model` may be left out when the server has exactly one text door.

    `timeout` (seconds) of a request covers the whole answer; None waits as long as the server works.
    Raises InvalidInputError, UnavailableError, DeadlineExceededError, ServerError, each one line.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = check_url(url)
        self._model = model
        self._channel = grpc.insecure_channel(self.url, options=channel_options(self.url))
        self._stub = make_stub(self._channel)
        self._was_lost = False  # the last request found no server

    @property
    def model(self) -> str:
        """The text door's name; asked from the server (RepositoryIndex, then ModelConfig) on first use."""
        if self._model is None:
            index = self._lookup(self._stub.RepositoryIndex, service_pb2.RepositoryIndexRequest(ready=True))
            names = [entry.name for entry in index.models if entry.name not in LMDEPLOY_MODELS]
            configs = [self._lookup(self._stub.ModelConfig, service_pb2.ModelConfigRequest(name=name)).config for name in names]
            self._model = pick_model([config.name for config in configs if _is_text_door(config)], self.url)
        return self._model

    def _lookup(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=LOOKUP_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.url) from None

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Result:
        """One whole answer. prompt is sent as it is; messages go through the model's chat template. `sampling` takes the
        text door's flat options: max_tokens, temperature, top_p, top_k, seed, stop_words ..."""
        request = build_generate_request(
            self.model, prompt, messages, input_ids, stream=False, request_id=request_id, sampling=sampling
        )
        with self._open(request, timeout) as stream:
            return join_deltas(stream)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Stream:
        """As `generate`, as an iterator of deltas."""
        request = build_generate_request(
            self.model, prompt, messages, input_ids, stream=True, request_id=request_id, sampling=sampling
        )
        return self._open(request, timeout)

    def _open(self, request: service_pb2.ModelInferRequest, timeout: float | None) -> Stream:
        if self._was_lost:
            self._reconnect()
        return Stream(self._stub.ModelStreamInfer(iter([request]), timeout=timeout), self.url, self._note_lost)

    def _note_lost(self) -> None:
        self._was_lost = True

    def _reconnect(self) -> None:
        """Gives a server that may be back a moment: a channel that failed answers with the old failure until it has tried again."""
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=RECONNECT_TIMEOUT_S)
            self._was_lost = False
        except grpc.FutureTimeoutError:
            ready.cancel()  # still away: the request itself says so

    def close(self) -> None:
        """Closes the connection; open streams end as cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _is_text_door(config: Any) -> bool:
    return "text_input" in {tensor.name for tensor in config.input} and "text_output" in {tensor.name for tensor in config.output}


class AsyncStream:
    """As `Stream`, for `async for`. Cancelling the task that waits cancels the request."""

    def __init__(self, call: Any, url: str) -> None:
        self._call = call
        self._url = url
        self._read = DeltaReader().read
        self._is_finished = False
        self._is_cancelled = False
        self._draining: asyncio.Task[None] | None = None  # from the last delta or the error to the end of the RPC
        self._peeked: Delta | None = None

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def peek(self) -> Delta | None:
        """Waits for the next delta and leaves it there; None at the end."""
        if self._peeked is None:
            self._peeked = await anext(self, None)
        return self._peeked

    async def __anext__(self) -> Delta:
        if self._peeked is not None:
            peeked, self._peeked = self._peeked, None
            return peeked
        if self._is_finished:
            await self._drain()
            raise StopAsyncIteration
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                delta = self._read(response)
                if delta is not None:
                    self._is_finished = delta.finish_reason is not None
                    return delta
        except grpc.RpcError as error:
            if self._is_cancelled:
                raise StopAsyncIteration from None
            raise error_from_rpc(error, self._url) from None
        except asyncio.CancelledError:
            if self._is_cancelled:  # grpc.aio raises this for call.cancel() as for the task's own cancellation
                raise StopAsyncIteration from None
            self.cancel()
            raise
        except TurbotritonError:  # the response carries it
            self._is_finished = True
            await self._drain()
            raise
        except BaseException:
            self.cancel()
            raise
        if not self._is_finished and not self._is_cancelled:
            raise ServerError(f"{self._url} ended the stream before the answer was complete; its log may tell why")
        raise StopAsyncIteration

    async def _drain(self) -> None:
        """Goes on when whoever waits here is cancelled."""
        if self._draining is None:
            self._draining = asyncio.create_task(drain_async(self._call))
        await asyncio.shield(self._draining)

    def cancel(self) -> None:
        """Closes the stream; the engine frees the request's blocks. Idempotent; after the last delta it is read to its end instead."""
        if not self._is_finished:
            self._is_cancelled = True
            self._call.cancel()
        elif self._draining is None:
            self._draining = asyncio.create_task(drain_async(self._call))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()
        if self._is_finished:
            await self._drain()


class AsyncClient:
    """`Client` for asyncio: the same arguments and errors. Make it inside a running event loop."""

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = check_url(url)
        self._model = model
        self._channel = grpc.aio.insecure_channel(self.url, options=channel_options(self.url))
        self._stub = make_stub(self._channel)
        self._stream_infer = make_stream_infer(self._channel)

    async def model(self) -> str:
        """The text door's name; asked from the server on first use."""
        if self._model is None:
            self._model = pick_model(await self.text_doors(), self.url)
        return self._model

    async def text_doors(self) -> tuple[str, ...]:
        """Names of the ready text doors that the server has."""
        index = await self._lookup(self._stub.RepositoryIndex, service_pb2.RepositoryIndexRequest(ready=True))
        names = [entry.name for entry in index.models if entry.name not in LMDEPLOY_MODELS]
        return tuple([name for name in names if _is_text_door(await self.model_config(name))])

    async def model_config(self, name: str) -> Any:
        """A model's configuration as tritonserver's protobuf message."""
        return (await self._lookup(self._stub.ModelConfig, service_pb2.ModelConfigRequest(name=name))).config

    async def infer(self, model: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One request to a model that answers once, such as `preprocessing`: input and output tensors by name."""
        return read_outputs(await self._lookup(self._stub.ModelInfer, build_request(model, tensors)))

    async def _lookup(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=LOOKUP_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.url) from None

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Result:
        """See `Client.generate`."""
        request = build_generate_request(
            await self.model(), prompt, messages, input_ids, stream=False, request_id=request_id, sampling=sampling
        )
        async with self._open(request, timeout) as stream:
            return join_deltas([delta async for delta in stream])

    async def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | None = None,
        request_id: str = "",
        timeout: float | None = None,
        in_deltas: bool = True,
        **sampling: Any,
    ) -> AsyncStream:
        """As `generate`: `async for delta in await client.stream(...)`. in_deltas False: one delta, when the answer is complete."""
        request = build_generate_request(
            await self.model(), prompt, messages, input_ids, stream=in_deltas, request_id=request_id, sampling=sampling
        )
        return self._open(request, timeout)

    def _open(self, request: service_pb2.ModelInferRequest, timeout: float | None) -> AsyncStream:
        return AsyncStream(self._stream_infer(request, timeout=timeout), self.url)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
