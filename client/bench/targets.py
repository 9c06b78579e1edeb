"""Interfaces that a benchmark can load: tritonserver's gRPC and generate_stream, and OpenAI's /v1/completions.

target.stream(item)  ->  Progress, Progress, ...   one for each response with new tokens
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from turbotriton.client.grpc_stream import AsyncClient
from turbotriton.client.text_door import LMDEPLOY_MODELS, pick_model
from turbotriton.contract.errors import ServerError

from .workload import Item

__all__ = ["INTERFACES", "Address", "Progress", "Sampling", "Target", "open_target"]


@dataclass(frozen=True, slots=True)
class Progress:
    num_output_tokens: int  # so far
    num_input_tokens: int = 0  # 0: not told yet


class Target(Protocol):
    """A server under load. `stream` raises TurbotritonError when a request fails."""

    def stream(self, item: Item) -> AsyncIterator[Progress]: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How every request is sampled."""

    temperature: float = 0.0
    ignore_eos: bool = True
    timeout_s: float = 600.0


class GrpcTarget:
    """The text door over gRPC streams."""

    def __init__(self, client: AsyncClient, sampling: Sampling) -> None:
        self._client = client
        self._sampling = sampling

    async def stream(self, item: Item) -> AsyncIterator[Progress]:
        stream = await self._client.stream(
            item.prompt,
            input_ids=item.input_ids,
            max_tokens=item.max_tokens,
            temperature=self._sampling.temperature,
            ignore_eos=self._sampling.ignore_eos,
            timeout=self._sampling.timeout_s,
        )
        async with stream:
            async for delta in stream:
                yield Progress(delta.num_output_tokens, delta.num_input_tokens)

    async def close(self) -> None:
        await self._client.close()


class _HttpTarget:
    """What both HTTP interfaces share: a pool without a limit (the load is the caller's choice) and server-sent events."""

    def __init__(self, base_url: str, model: str, sampling: Sampling, http: httpx.AsyncClient) -> None:
        self._base_url, self._model, self._sampling, self._http = base_url, model, sampling, http

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            async with self._http.stream("POST", self._base_url + path, json=body) as reply:
                if reply.status_code != 200:
                    raise ServerError(f"HTTP {reply.status_code}: {(await reply.aread()).decode(errors='replace')[:300]}")
                async for line in reply.aiter_lines():
                    if line.startswith("data:") and line != "data: [DONE]":
                        event = json.loads(line[5:])
                        if "error" in event:
                            raise ServerError(f"HTTP 200, then {event['error']}")
                        yield event
        except (httpx.HTTPError, ValueError) as error:
            raise ServerError(f"{self._base_url}{path}: {type(error).__name__} {error}".rstrip()) from None

    async def close(self) -> None:
        await self._http.aclose()


class GenerateStreamTarget(_HttpTarget):
    """The text door over HTTP: /v2/models/NAME/generate_stream."""

    async def stream(self, item: Item) -> AsyncIterator[Progress]:
        body: dict[str, Any] = {
            "stream": True,
            "max_tokens": item.max_tokens,
            "temperature": self._sampling.temperature,
            "ignore_eos": self._sampling.ignore_eos,
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
        }
        body |= {"text_input": item.prompt} if item.input_ids is None else {"input_ids": list(item.input_ids)}
        async for event in self._events(f"/v2/models/{self._model}/generate_stream", body):
            if "num_output_tokens" in event:
                yield Progress(int(event["num_output_tokens"]), int(event["num_input_tokens"]))


class OpenAITarget(_HttpTarget):
    """Any server with OpenAI's /v1/completions; tokens are told in the last chunk, so a chunk before it counts as one token."""

    async def stream(self, item: Item) -> AsyncIterator[Progress]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": item.prompt if item.input_ids is None else list(item.input_ids),
            "max_tokens": item.max_tokens,
            "temperature": self._sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._sampling.ignore_eos:
            body["ignore_eos"] = True
        num_chunks = 0
        async for event in self._events("/v1/completions", body):
            if event.get("usage"):
                yield Progress(int(event["usage"]["completion_tokens"]), int(event["usage"]["prompt_tokens"]))
            elif any(choice.get("text") for choice in event.get("choices", ())):
                num_chunks += 1
                yield Progress(num_chunks)


@dataclass(frozen=True, slots=True)
class Address:
    """Where and what to load; api_key goes into a header and nowhere else."""

    url: str
    model: str | None = None
    api_key: str | None = None

    @property
    def base_url(self) -> str:
        return (self.url if "://" in self.url else f"http://{self.url}").rstrip("/").removesuffix("/v1")


async def _open_grpc(address: Address, sampling: Sampling) -> Target:
    client = AsyncClient(address.url, address.model)
    await client.model()
    return GrpcTarget(client, sampling)


async def _open_generate_stream(address: Address, sampling: Sampling) -> Target:
    http = _http(address, sampling)
    model = address.model
    if model is None:
        index = await _ask(http, "POST", f"{address.base_url}/v2/repository/index")
        ready = [entry["name"] for entry in index if entry.get("state") == "READY"]
        model = pick_model([name for name in ready if name not in LMDEPLOY_MODELS], address.url)
    return GenerateStreamTarget(address.base_url, model, sampling, http)


async def _open_openai(address: Address, sampling: Sampling) -> Target:
    http = _http(address, sampling)
    model = address.model
    if model is None:
        models = await _ask(http, "GET", f"{address.base_url}/v1/models")
        model = str(models["data"][0]["id"])
    return OpenAITarget(address.base_url, model, sampling, http)


def _http(address: Address, sampling: Sampling) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {address.api_key}"} if address.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(headers=headers, limits=limits, timeout=httpx.Timeout(sampling.timeout_s))


async def _ask(http: httpx.AsyncClient, method: str, url: str) -> Any:
    """-> the JSON answer. Closes `http` and raises ServerError when there is none."""
    try:
        reply = await http.request(method, url)
        reply.raise_for_status()
        return reply.json()
    except (httpx.HTTPError, ValueError) as error:
        await http.aclose()
        raise ServerError(f"{url} does not answer as it should: {type(error).__name__} {error}") from None


INTERFACES = {"grpc": _open_grpc, "generate_stream": _open_generate_stream, "openai": _open_openai}


@asynccontextmanager
async def open_target(interface: str, address: Address, sampling: Sampling) -> AsyncIterator[Target]:
    """The target of an interface, open inside the block. Raises ServerError when nothing answers there."""
    target = await INTERFACES[interface](address, sampling)
    try:
        yield target
    finally:
        await target.close()
