"""Who may call, how much, and what was called: API keys, sizes, Prometheus metrics; plain ASGI middleware, streams pass untouched."""

import hmac
import os
import time
from collections.abc import Sequence
from pathlib import Path

from fastapi import HTTPException
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response

__all__ = ["BodyLimit", "KeyCheck", "Meter", "Metrics"]

#: Paths that need no key: probes and scrapers have none.
OPEN_PATHS = ("/health", "/metrics")
MAX_BODY_BYTES = 32 << 20  # half of what gRPC takes: two signs of JSON can be a token id of four bytes


class KeyCheck:
    """401 without one of the keys, compared in constant time. No key given: everyone may call."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            found = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
            if scheme.lower() != "bearer" or not any(found):
                refused = error_response(ApiError(401, "Please request with valid api key!", code="invalid_api_key"))
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """413 for a body of more than MAX_BODY_BYTES, whether its size is announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
            await error_response(_too_large())(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, _too_large().message)
            return message

        await self._app(scope, counted, send)


def _too_large() -> ApiError:
    return ApiError(413, f"the body has more than {MAX_BODY_BYTES >> 20} MiB; send less at once")


class Metrics:
    """Requests by path and status, their seconds until the last bytes go out, how many are under way, how many each process answered.

    folder: where the processes of one server keep their figures, by prometheus_client's multiprocess mode (which reads the variable
    PROMETHEUS_MULTIPROC_DIR when it is imported); the page is about all of them then. None: this process is the server.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        registry = self._registry = CollectorRegistry()
        self.total = Counter("turbotriton_openai_requests", "Requests answered", ["path", "status"], registry=registry)
        self.running = Gauge(
            "turbotriton_openai_requests_running", "Requests under way", registry=registry, multiprocess_mode="livesum"
        )
        self.seconds = Histogram("turbotriton_openai_request_seconds", "Seconds to the end", ["path"], registry=registry)
        workers = Counter("turbotriton_openai_worker_requests", "Requests answered by a process", ["pid"], registry=registry)
        self.of_worker = workers.labels(os.getpid())

    def page(self) -> bytes:
        registry = self._registry
        if self._folder is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, path=str(self._folder))  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class Meter:
    """Counts into `metrics`, before the end of an answer is sent: who has read it finds it counted."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, is_counted = time.monotonic(), 500, False

        def count() -> None:
            nonlocal is_counted
            if is_counted:
                return
            is_counted = True
            route = scope.get("route")
            path = route.path if route is not None else "other"  # a bounded number of labels
            self._metrics.total.labels(path, status).inc()
            self._metrics.of_worker.inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - began)

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                count()
            await send(message)

        try:
            with self._metrics.running.track_inprogress():
                await self._app(scope, receive, counted)
        finally:
            count()
