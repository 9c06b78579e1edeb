"""Failures as OpenAI's clients expect them: a status code and `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from turbotriton.contract.errors import (
    DeadlineExceededError,
    InvalidInputError,
    RequestCancelledError,
    TurbotritonError,
    UnavailableError,
)

__all__ = ["ApiError", "api_error", "error_response", "on_failure", "on_http_error", "on_invalid_request"]

RETRY_AFTER_S = 1
MAX_SHOWN_PARTS = 6


class ApiError(Exception):
    """A failure with its HTTP status. `param`: the field that is wrong; `code`: OpenAI's short name for some failures."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: TurbotritonError) -> ApiError:
    """What a door or the connection to it said, as the status that tells a client whether to try again."""
    text = str(error)
    if isinstance(error, InvalidInputError):
        return ApiError(400, text, code="context_length_exceeded" if "too long" in text else None)
    if isinstance(error, DeadlineExceededError):
        return ApiError(504, text, code="deadline_exceeded")
    if isinstance(error, RequestCancelledError):
        return ApiError(499, text, code="cancelled")
    if isinstance(error, UnavailableError):
        return ApiError(429, text, code="queue_full") if "queue is full" in text else ApiError(503, text, code="unavailable")
    return ApiError(502, text)


def error_response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = error_response(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


async def on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    """The body does not fit the schema: 400 that names the first wrong field."""
    assert isinstance(error, RequestValidationError)
    paths = [(_path(one, error.body), one) for one in error.errors()]
    path, first = max(
        paths, key=lambda one: len(one[0])
    )  # of a field that may have several types: what came furthest in one of them
    field = ".".join(path[:MAX_SHOWN_PARTS])
    if first["type"] == "extra_forbidden":
        message = f"unknown or unsupported field {field!r}; remove it"
    elif first["type"] == "json_invalid":
        message = f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    elif first["type"] == "value_error":  # of our own validators
        message = f"{field}: {first['ctx']['error']}" if field else str(first["ctx"]["error"])
    elif isinstance(error.body, bytes):
        message = "the body is not read as JSON; send the header Content-Type: application/json"
    else:
        shown = repr(first.get("input"))
        message = f"{field or 'the body'}: {first['msg']} (found {shown if len(shown) <= 80 else shown[:77] + '...'})"
    return error_response(ApiError(400, message, param=field or None))


def _path(error: Any, body: Any) -> list[str]:
    """Keys and places in the body that lead to the fault; pydantic puts names of types between them."""
    path: list[str] = []
    for part in error["loc"]:
        is_place = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if is_place or (isinstance(body, dict) and part in body):
            body = body[part]
        elif not (error["type"] == "missing" and part == error["loc"][-1]):
            continue
        path.append(str(part))
    return path


async def on_failure(request: Request, error: Exception) -> JSONResponse:
    """A fault of our own; its traceback is in the log."""
    return error_response(ApiError(500, "the server failed; its log tells why", code="internal_error"))
