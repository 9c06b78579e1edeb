"""From a request's body to its model: one pass for what is right, FastAPI's own way for the rest.

FastAPI looks for dependencies of each kind around parsing and validating, which takes a sixth of the app's time on a request. A body that
says it is JSON, is UTF-8 and fits its model needs none of that. Whatever does not is read again by FastAPI, whose errors `errors.py`
puts in OpenAI's words, so there is one place that refuses. Routes and their schema are FastAPI's throughout.
"""

import inspect
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from .event_stream import DISCONNECTED
from .schema import IS_TEXT

__all__ = ["BodyRoute"]


class BodyRoute(APIRoute):
    """For endpoints of (body, request), body a pydantic model, that return a Response; FastAPI's way for those of other parameters."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        usual = super().get_route_handler()
        endpoint = self.endpoint
        parameters = inspect.signature(endpoint).parameters
        if list(parameters) != ["body", "request"]:
            return usual
        model: type[BaseModel] = parameters["body"].annotation

        async def handler(request: Request) -> Response:
            try:
                content = await request.body()  # Starlette keeps it for a second reader
            except ClientDisconnect:
                return Response(status_code=DISCONNECTED)
            if request.headers.get("content-type", "").partition(";")[0].rstrip() != "application/json":
                return await usual(request)
            try:
                text = content.decode()
                body = model.model_validate(json.loads(text), context=None if "\\u" in text else IS_TEXT)
            except (ValueError, RecursionError):
                return await usual(request)
            response: Response = await endpoint(body, request)
            return response

        return handler
