"""The server's routes: body -> request -> answer -> JSON or an event stream."""

import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from turbotriton import __version__
from turbotriton.contract.errors import TurbotritonError

from .access import BodyLimit, KeyCheck, Meter, Metrics
from .answers import DONE, Answer, CompletionAnswer
from .body import BodyRoute
from .chat_answers import ChatAnswer
from .encode import encode
from .errors import ApiError, api_error, error_response, on_failure, on_http_error, on_invalid_request
from .event_stream import DISCONNECTED, EventStream, until_gone
from .fleet import Fleet
from .hub import SharedGate, SharedSessions
from .interactive import Interactive
from .qos import QosGate, read_qos_config
from .schema import ChatRequest, CompletionRequest, EncodeRequest, InteractiveRequest
from .sessions import Sessions
from .tools import TOOL_FORMATS, ToolFormat, find_tool_format

__all__ = ["ServerOptions", "make_app", "make_gate"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """urls: gRPC addresses of the tritonservers. api_keys are compared and never written anywhere.

    shared: the folder with a `Hub`'s socket and the metrics where several processes are one server; None: this process is the server.
    """

    urls: Sequence[str]
    api_keys: Sequence[str] = field(default=(), repr=False)
    allow_origins: Sequence[str] = ("*",)
    allow_methods: Sequence[str] = ("*",)
    allow_headers: Sequence[str] = ("*",)
    allow_credentials: bool = False
    tool_call_parser: str = "auto"
    qos_config_path: Path | None = None  # LMDeploy's QoS file
    qos_max_running: int = 64
    stream_interval: int = 0  # see Fleet
    shared: Path | None = None


class _Service:
    """What the routes share; made when the event loop runs."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.fleet = Fleet(options.urls, options.stream_interval)
        shared = options.shared
        self.interactive = Interactive(self.fleet, Sessions() if shared is None else SharedSessions(shared))
        self.gate: QosGate | SharedGate | None = None
        if options.qos_config_path is not None:
            self.gate = make_gate(options) if shared is None else SharedGate(shared)
        self._tool_formats: dict[str, ToolFormat | None] = {}

    async def tool_format(self, request: ChatRequest) -> ToolFormat | None:
        """None where the request has no tools or does not want a call."""
        if not request.tools or request.tool_choice == "none":
            return None
        if self.options.tool_call_parser != "auto":
            return TOOL_FORMATS[self.options.tool_call_parser]
        if request.model not in self._tool_formats:
            config = await self.fleet.any_client().model_config(request.model)
            self._tool_formats[request.model] = find_tool_format(config.parameters["chat_template"].string_value)
        found = self._tool_formats[request.model]
        if found is None:
            raise ApiError(400, f"the chat template of {request.model} has no tools; leave tools out", param="tools")
        return found

    @contextlib.asynccontextmanager
    async def turn(self, user_id: str | None, is_qos: bool) -> AsyncIterator[None]:
        if not is_qos:
            yield
            return
        if self.gate is None:
            raise ApiError(404, "this server runs without --qos-config-path; use the endpoint without _qos")
        async with self.gate.turn(user_id):
            yield


def make_gate(options: ServerOptions) -> QosGate | None:
    """None without a QoS file. Raises ConfigError for one that cannot be read."""
    if options.qos_config_path is None:
        return None
    return QosGate(read_qos_config(options.qos_config_path), options.qos_max_running)


def make_app(options: ServerOptions) -> FastAPI:
    """Raises ConfigError for a QoS file that cannot be read."""
    if options.shared is None:
        make_gate(options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = _Service(options)
        yield
        await app.state.service.fleet.close()

    app = FastAPI(title="turbotriton", version=__version__, lifespan=lifespan, docs_url="/", redoc_url=None)
    app.router.route_class = BodyRoute
    metrics = Metrics(options.shared)
    app.add_middleware(BodyLimit)
    app.add_middleware(Meter, metrics=metrics)
    app.add_middleware(KeyCheck, keys=options.api_keys)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(options.allow_origins),
        allow_methods=list(options.allow_methods),
        allow_headers=list(options.allow_headers),
        allow_credentials=options.allow_credentials,
    )
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(TurbotritonError, _on_our_error)
    app.add_exception_handler(Exception, on_failure)
    _add_answers(app)
    _add_others(app, metrics)
    return app


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_our_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TurbotritonError)
    return error_response(api_error(error))


def _add_answers(app: FastAPI) -> None:
    async def chat(body: ChatRequest, request: Request, is_qos: bool = False) -> Response:
        service: _Service = app.state.service
        await service.fleet.check_model(body.model)
        answer = ChatAnswer(service.fleet, body, await service.tool_format(body))
        return await _respond(service, request, answer, body.stream, body.user_id, is_qos)

    async def completions(body: CompletionRequest, request: Request, is_qos: bool = False) -> Response:
        service: _Service = app.state.service
        await service.fleet.check_model(body.model)
        return await _respond(service, request, CompletionAnswer(service.fleet, body), body.stream, body.user_id, is_qos)

    async def interactive(body: InteractiveRequest, request: Request, is_qos: bool = False) -> Response:
        service: _Service = app.state.service
        replies = _in_turn(service, body.user_id, is_qos, service.interactive.replies(body))
        if body.stream:
            return EventStream(_lines(replies), {})
        return await _unless_disconnected(request, _joined(replies))

    @app.post("/v1/chat/completions")
    async def chat_completions_v1(body: ChatRequest, request: Request) -> Response:
        """Chat, whole or streamed."""
        return await chat(body, request)

    @app.post("/v1/chat/completions_qos")
    async def chat_completions_v1_qos(body: ChatRequest, request: Request) -> Response:
        """The same in the order of the QoS file, by user_id."""
        return await chat(body, request, is_qos=True)

    @app.post("/v1/completions")
    async def completions_v1(body: CompletionRequest, request: Request) -> Response:
        """Text or token ids go on, whole or streamed."""
        return await completions(body, request)

    @app.post("/v1/completions_qos")
    async def completions_v1_qos(body: CompletionRequest, request: Request) -> Response:
        """The same in the order of the QoS file, by user_id."""
        return await completions(body, request, is_qos=True)

    @app.post("/v1/chat/interactive")
    async def chat_interactive_v1(body: InteractiveRequest, request: Request) -> Response:
        """LMDeploy's conversations by session_id; streamed as one JSON object a line."""
        return await interactive(body, request)

    @app.post("/v1/chat/interactive_qos")
    async def chat_interactive_v1_qos(body: InteractiveRequest, request: Request) -> Response:
        """The same in the order of the QoS file, by user_id."""
        return await interactive(body, request, is_qos=True)


def _add_others(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Every model that the servers behind this one have ready."""
        return {"object": "list", "data": [_model(name) for name in await app.state.service.fleet.models()]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        """One of them, or 404."""
        await app.state.service.fleet.check_model(model)
        return _model(model)

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        """Refused: these models give no embeddings."""
        raise ApiError(400, "this server gives no embeddings; its models generate text")

    @app.post("/v1/encode")
    async def encode_v1(body: EncodeRequest) -> dict[str, Any]:
        """LMDeploy's: text to token ids."""
        return await encode(app.state.service.fleet, body)

    @app.get("/health")
    async def health() -> Response:
        """200 when a model is ready behind this server, else 503."""
        if not await app.state.service.fleet.models():
            raise ApiError(503, "no model is ready", code="unavailable")
        return Response()

    @app.get("/metrics")
    async def metrics_page() -> Response:
        """Prometheus; the engine's own figures are on tritonserver's metrics port."""
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "turbotriton"}


async def _respond(
    service: _Service, request: Request, answer: Answer, stream: bool, user_id: str | None, is_qos: bool
) -> Response:
    if stream:
        chunks = _in_turn(service, user_id, is_qos, answer.chunks())
        return EventStream(_events(chunks), {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def whole() -> dict[str, Any]:
        async with service.turn(user_id, is_qos):
            return await answer.whole()

    return await _unless_disconnected(request, whole())


def _in_turn(service: _Service, user_id: str | None, is_qos: bool, items: AsyncGenerator[T]) -> AsyncGenerator[T]:
    if not is_qos:
        return items

    async def waited() -> AsyncGenerator[T]:
        async with service.turn(user_id, is_qos), contextlib.aclosing(items) as opened:
            async for item in opened:
                yield item

    return waited()


async def _events(chunks: AsyncGenerator[list[str]]) -> AsyncGenerator[tuple[str, bool]]:
    """For an `EventStream`: one write for what came together; a failure after the first of them is an event."""
    has_begun = False
    try:
        async with contextlib.aclosing(chunks) as opened:
            async for texts in opened:
                events = f"data: {texts[0]}\n\n" if len(texts) == 1 else "".join([f"data: {text}\n\n" for text in texts])
                yield events, texts[-1] == DONE
                has_begun = True
    except ApiError as error:
        if not has_begun:
            raise
        yield f"data: {json.dumps(error.body(), ensure_ascii=False)}\n\n", True


async def _lines(replies: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[tuple[str, bool]]:
    """A line each; a failure after the first is one, too. None says that it is the last: the conversation is to be free by then."""
    has_begun = False
    try:
        async with contextlib.aclosing(replies) as opened:
            async for reply in opened:
                yield f"{json.dumps(reply, ensure_ascii=False)}\n", False
                has_begun = True
    except ApiError as error:
        if not has_begun:
            raise
        yield f"{json.dumps(error.body(), ensure_ascii=False)}\n", False


async def _joined(replies: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    text, last = "", {}
    async for last in replies:
        text += last["text"]
    return {**last, "text": text}


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The answer; a caller that leaves first has it cancelled, at the engine too."""
    answer = await until_gone(request.receive, work)
    return Response(status_code=DISCONNECTED) if answer is None else JSONResponse(answer)
