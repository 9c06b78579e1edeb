"""What stands between a request's bytes and its endpoint, where no answer of tritonserver is needed to see it."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from turbotriton.client.openai.body import BodyRoute


class Count(BaseModel):
    number: int


def app_of_one_endpoint() -> FastAPI:
    app = FastAPI()
    app.router.route_class = BodyRoute

    @app.post("/count")
    async def count(body: Count, request: Request) -> Response:
        return Response(str(body.number + 1))

    return app


def status_and_text(messages: list[dict[str, Any]]) -> tuple[int, bytes]:
    """Of a request whose body comes in these messages."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"14")]
    scope = {"type": "http", "method": "POST", "path": "/count", "headers": headers, "query_string": b"", "http_version": "1.1"}
    asyncio.run(app_of_one_endpoint()(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def test_a_body_in_parts_is_one() -> None:
    parts = [{"type": "http.request", "body": b'{"number":', "more_body": True}, {"type": "http.request", "body": b" 41}"}]
    assert status_and_text(parts) == (200, b"42")


def test_a_caller_that_leaves_before_its_body_is_there_is_no_failure_of_the_server() -> None:
    parts = [{"type": "http.request", "body": b'{"number":', "more_body": True}, {"type": "http.disconnect"}]
    assert status_and_text(parts) == (499, b"")
