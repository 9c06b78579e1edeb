"""The app without a server behind it: a fleet that answers from a script and notes what it was asked for."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import httpx

from turbotriton.client.openai import app as app_module
from turbotriton.client.openai.app import ServerOptions, make_app
from turbotriton.client.openai.fleet import Fleet
from turbotriton.client.text_door import Delta
from turbotriton.contract.errors import TurbotritonError

TOOLS_TEMPLATE = "{% if tools %}<tool_call>{% endif %}"
Pieces = Sequence[str]


class ScriptedFleet:
    """Answers every request with `pieces`, or with the error. `asked`: (model, prompt, options) of each; `streams`: whether in deltas."""

    def __init__(
        self, pieces: Pieces = ("Hel", "lo"), error: TurbotritonError | None = None, template: str = TOOLS_TEMPLATE
    ) -> None:
        self.pieces, self.error, self.template = pieces, error, template
        self.asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self.num_open = 0
        self.streams: list[bool] = []

    async def models(self) -> list[str]:
        return ["demo"]

    async def check_model(self, model: str) -> None:
        await Fleet.check_model(SimpleNamespace(_servers=[], models=self.models), model)  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def stream(
        self, model: str, prompt: Mapping[str, Any], options: Mapping[str, Any], *, stream: bool = True
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        self.asked.append((model, dict(prompt), dict(options)))
        self.streams.append(stream)
        if self.error is not None:
            raise self.error
        self.num_open += 1
        try:
            yield self._deltas(prompt, options)
        finally:
            self.num_open -= 1

    async def _deltas(self, prompt: Mapping[str, Any], options: Mapping[str, Any]) -> AsyncIterator[Delta]:
        """Words of an echoed prompt count as its tokens, and token i is " ti"."""
        words = prompt.get("prompt", "").split() or [f"t{token_id}" for token_id in prompt.get("input_ids", ())]
        echoed = "" if options.get("exclude_input_in_output", True) else prompt.get("prompt", " ".join(words))
        scored = None
        if "prompt_logprobs" in options.get("sampling_parameters", {}):
            scored = [{"token": word, "logprob": -index / 4 or None, "top_logprobs": []} for index, word in enumerate(words)]
        for number, piece in enumerate(self.pieces, 1):
            await asyncio.sleep(0)
            entry = {
                "token": piece,
                "logprob": -0.5,
                "top_logprobs": [{"token": piece, "logprob": -0.5}][: options.get("num_logprobs") or 0],
            }
            logprobs = None if options.get("num_logprobs") is None else [entry]
            finish = "stop" if number == len(self.pieces) else None
            yield Delta(echoed + piece, (number,), finish, 7, number, logprobs, scored)
            echoed, scored = "", None

    def any_client(self) -> Any:
        async def model_config(name: str) -> Any:
            return SimpleNamespace(parameters={"chat_template": SimpleNamespace(string_value=self.template)})

        return SimpleNamespace(model_config=model_config)

    async def close(self) -> None:
        pass


def with_app(fleet: ScriptedFleet, use: Callable[[httpx.AsyncClient], Any], **options: Any) -> Any:
    """Runs `use(client)` against the app in an event loop of its own."""

    async def run() -> Any:
        original = app_module.Fleet
        app_module.Fleet = lambda urls, stream_interval: fleet  # type: ignore[assignment,misc]
        try:
            app = make_app(ServerOptions(urls=["scripted"], **options))
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(
                    transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://scripted"
                ) as client,
            ):
                return await use(client)
        finally:
            app_module.Fleet = original  # type: ignore[misc]

    return asyncio.run(run())


def post(
    path: str, body: Any, fleet: ScriptedFleet | None = None, headers: Mapping[str, Any] | None = None, **options: Any
) -> httpx.Response:
    """One request. body: JSON, or bytes as they are."""

    async def use(client: httpx.AsyncClient) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body)
        return await client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json", **(headers or {})})

    reply: httpx.Response = with_app(fleet or ScriptedFleet(), use, **options)
    return reply


def events(reply: httpx.Response) -> list[Any]:
    """Objects of an event stream; the closing [DONE] is asserted and left out."""
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
