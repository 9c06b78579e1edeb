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

__all__ = ["ApiError", "api_error", "error_response", "on_http_error", "on_invalid_request"]

RETRY_AFTER_S = 1


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
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        message = f"unknown or unsupported field {field!r}; remove it"
    elif first["type"] == "json_invalid":
        message = f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    else:
        shown = repr(first.get("input"))
        message = f"{field or 'the body'}: {first['msg']} (found {shown if len(shown) <= 80 else shown[:77] + '...'})"
    return error_response(ApiError(400, message, param=field or None))
