"""Our errors as tritonserver's responses."""

from typing import Any

import triton_python_backend_utils as pb_utils

from turbotriton.contract.errors import TurbotritonError

__all__ = ["error_response", "status_text", "triton_error"]


def status_text(error: TurbotritonError) -> str:
    """A gRPC stream carries no status code, so the message begins with it."""
    return f"{error.triton_status}: {error}"


def error_response(error: TurbotritonError) -> Any:
    return pb_utils.InferenceResponse(error=triton_error(error, status_text(error)))


def triton_error(error: TurbotritonError, message: str) -> Any:
    """Servers differ in the codes they know; INTERNAL is in all."""
    code = getattr(pb_utils.TritonError, error.triton_status, pb_utils.TritonError.INTERNAL)
    return pb_utils.TritonError(message, code)
