"""Reads and checks a request's tensors: every value is validated here, once. Errors name the tensor and the value."""

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from turbotriton.contract.errors import InvalidInputError

__all__ = ["check_parameters", "read_array", "read_bool", "read_float", "read_int", "read_string", "read_strings"]

#: Request parameters that clients and the server itself add; any other is a misspelt input.
KNOWN_PARAMETERS = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output", "binary_data_size"}
)
MAX_TEXT_BYTES = 8 * 1024 * 1024


def check_parameters(request: Any) -> None:
    """Raises InvalidInputError for a parameter nobody reads: over HTTP, every JSON key that is no input arrives as one."""
    text = request.parameters()
    parameters = json.loads(text) if text else {}
    unknown = [name for name in parameters if name not in KNOWN_PARAMETERS and not name.startswith("triton_")]
    if unknown:
        raise InvalidInputError(f"{unknown[0]!r} is no input of this model; see its inputs at /v2/models/<name>/config")


def read_array(request: Any, name: str) -> npt.NDArray[Any] | None:
    """The tensor flattened, or None when it was not sent. It is a copy: the server takes its memory back."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else np.array(tensor.as_numpy()).reshape(-1)


def _one(request: Any, name: str) -> Any:
    array = read_array(request, name)
    if array is None:
        return None
    if array.size != 1:
        raise InvalidInputError(f"{name} has {array.size} elements; send exactly one")
    return array[0]


def read_int(request: Any, name: str, low: int, high: int) -> int | None:
    value = _one(request, name)
    if value is None:
        return None
    if not low <= int(value) <= high:
        raise InvalidInputError(f"{name} is {int(value)}; it must be from {low} to {high}")
    return int(value)


def read_float(request: Any, name: str) -> float | None:
    value = _one(request, name)
    if value is None:
        return None
    if not math.isfinite(float(value)):
        raise InvalidInputError(f"{name} is {float(value)}; it must be a finite number")
    return float(value)


def read_bool(request: Any, name: str) -> bool | None:
    value = _one(request, name)
    return None if value is None else bool(value)


def read_string(request: Any, name: str) -> str | None:
    value = _one(request, name)
    return None if value is None else _text(name, value)


def read_strings(request: Any, name: str) -> list[str] | None:
    array = read_array(request, name)
    return None if array is None else [_text(name, value) for value in array]


def _text(name: str, value: Any) -> str:
    data = value if isinstance(value, bytes) else str(value).encode()
    if len(data) > MAX_TEXT_BYTES:
        raise InvalidInputError(f"{name} has {len(data)} bytes; at most {MAX_TEXT_BYTES} are read")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInputError(f"{name} is no UTF-8 text") from None
