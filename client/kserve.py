"""The KServe v2 messages that both contracts travel in: one channel, tensors <-> numpy, failures -> our errors.

Knows nothing of doors, chats or sessions. Messages are tritonclient's protobuf stubs used directly: a request on a stream
of its own, half-closed after sending, so that the end of the RPC is the end of the answer and closing it cancels.
The header `triton_grpc_error` is never sent (it crashes tritonserver 24.10), therefore an error on a stream is a text
without a status; our doors begin theirs with it ("UNAVAILABLE: queue full ...") and `error_from_text` reads that.
"""

import asyncio
import contextlib
import itertools
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc

from turbotriton.contract.errors import (
    DeadlineExceededError,
    InvalidInputError,
    RequestCancelledError,
    ServerError,
    TurbotritonError,
    UnavailableError,
)

__all__ = [
    "Tensor",
    "build_request",
    "channel_options",
    "check_url",
    "drain",
    "drain_async",
    "error_from_rpc",
    "error_from_text",
    "make_stream_infer",
    "make_stub",
    "read_outputs",
    "read_values",
    "strings",
]

Tensor = npt.NDArray[Any]  # object arrays of bytes for BYTES

MAX_DRAINED = 64  # responses after an error or a last delta: the server sends none
MAX_DRAIN_S = 5.0
MAX_MESSAGE_BYTES = 64 * 2**20  # what tritonserver's own HTTP door takes

_KSERVE_TYPES = {
    "bool": "BOOL",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "float32": "FP32",
    "object": "BYTES",
}
_NUMPY_TYPES = {kserve: numpy for numpy, kserve in _KSERVE_TYPES.items()}

#: Of `memoryview.cast`; tensors are little-endian, as every machine that tritonserver runs on.
_STRUCT_CODES = {"BYTES": "", "BOOL": "?", "INT8": "b", "INT32": "i", "INT64": "q", "UINT32": "I", "UINT64": "Q", "FP32": "f"}

_UNAVAILABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
_INVALID = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.FAILED_PRECONDITION,
}
#: What to say -> how gRPC says it, in the order of looking; its own sentences differ from one release to the next.
_CONNECTION_LOST = {
    "connection refused": re.compile(r"refused", re.IGNORECASE),
    "the host name is unknown": re.compile(r"resolv|resolution|hostname lookup", re.IGNORECASE),
    "the connection broke": re.compile(r"Socket closed|reset|GOAWAY|RST_STREAM|Stream removed", re.IGNORECASE),
    "it cannot be reached": re.compile(r"connect", re.IGNORECASE),
}
_STATUS_PREFIX = re.compile(
    r"\[?(?P<status>INVALID_ARG(?:UMENT)?|UNAVAILABLE|CANCELLED|DEADLINE_EXCEEDED|NOT_FOUND|UNSUPPORTED|INTERNAL)\]?:\s+"
)
#: What tritonserver itself answers to a request that no model sees.
_REFUSED_BY_SERVER = re.compile(
    r"Request for unknown model|(\[request id: [^\]]*\] )?(unexpected|expected|inference input|missing)\b"
)
_STATUS_TO_ERROR: dict[str, type[TurbotritonError]] = {
    "INVALID_ARG": InvalidInputError,
    "INVALID_ARGUMENT": InvalidInputError,
    "NOT_FOUND": InvalidInputError,
    "UNSUPPORTED": InvalidInputError,
    "UNAVAILABLE": UnavailableError,
    "CANCELLED": RequestCancelledError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "INTERNAL": ServerError,
}


def check_url(url: str) -> str:
    """Returns url, a gRPC `HOST:PORT`. Raises InvalidInputError for anything else (a scheme, no port, port 0)."""
    match = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})", url)
    if match is None or not 0 < int(match.group(1)) < 65536:
        raise InvalidInputError(f"address {url!r} is not HOST:PORT; give tritonserver's gRPC address, such as localhost:8001")
    return url


def channel_options(url: str) -> list[tuple[str, int]]:
    """Channel options: large messages; a proxy from the environment is never asked for an address on this machine."""
    options = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 200),  # a server that is back is found at once, not after gRPC's two minutes
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    host = url.rsplit(":", 1)[0].strip("[]")
    if host in ("localhost", "::1", "0.0.0.0") or host.startswith("127."):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def make_stub(channel: "grpc.Channel | grpc.aio.Channel") -> service_pb2_grpc.GRPCInferenceServiceStub:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def make_stream_infer(channel: "grpc.aio.Channel") -> Any:
    """ModelStreamInfer for one request: the same bytes as by the stub's method, with the request, its end and the metadata in one operation
    instead of three and one task less, which is a sixth of what opening an RPC costs."""
    return channel.unary_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
    )


def strings(values: Iterable[str]) -> npt.NDArray[np.object_]:
    """values as the 1-D BYTES tensor of their UTF-8."""
    return np.array([value.encode() for value in values], dtype=object)


def build_request(
    model_name: str,
    tensors: Mapping[str, Tensor],
    *,
    request_id: str = "",
    parameters: Mapping[str, bool | int | str] | None = None,
) -> service_pb2.ModelInferRequest:
    """A ModelInferRequest with the tensors in their order, as raw contents. No outputs list: the server sends all."""
    request = service_pb2.ModelInferRequest(model_name=model_name, id=request_id)
    for key, value in (parameters or {}).items():
        if isinstance(value, bool):
            request.parameters[key].bool_param = value
        elif isinstance(value, int):
            request.parameters[key].int64_param = value
        else:
            request.parameters[key].string_param = value
    for name, array in tensors.items():
        request.inputs.add(name=name, datatype=_KSERVE_TYPES[array.dtype.name], shape=list(array.shape))
        request.raw_input_contents.append(_to_bytes(array))
    return request


def _to_bytes(array: Tensor) -> bytes:
    if array.dtype != object:
        return np.ascontiguousarray(array).tobytes()
    return b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel())


def read_outputs(response: service_pb2.ModelInferResponse) -> dict[str, Tensor]:
    """The response's tensors by name; BYTES become object arrays of bytes. Raises ServerError for a type we never use."""
    outputs: dict[str, Tensor] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        dtype = _NUMPY_TYPES.get(output.datatype)
        if dtype is None:
            raise ServerError(f"model {response.model_name} answered {output.name} as {output.datatype}; is it one of ours?")
        if dtype == "object":
            outputs[output.name] = np.array(_split_bytes(raw), dtype=object).reshape(output.shape)
        else:
            outputs[output.name] = np.frombuffer(raw, dtype=dtype).reshape(output.shape)
    return outputs


def read_values(response: service_pb2.ModelInferResponse) -> dict[str, Sequence[Any]]:
    """As `read_outputs`, flat and without numpy, whose arrays cost most of reading a response of one token."""
    values: dict[str, Sequence[Any]] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        code = _STRUCT_CODES.get(output.datatype)
        if code is None:
            raise ServerError(f"model {response.model_name} answered {output.name} as {output.datatype}; is it one of ours?")
        values[output.name] = memoryview(raw).cast(code) if code else _split_bytes(raw)  # type: ignore[call-overload]
    return values


def _split_bytes(raw: bytes) -> Sequence[bytes]:
    items, start = [], 0
    while start < len(raw):
        size = int.from_bytes(raw[start : start + 4], "little")
        items.append(raw[start + 4 : start + 4 + size])
        start += 4 + size
    return items


def drain(call: Any) -> None:
    """Reads a stream from its last delta or its error to its end, which the server sends next: tritonserver 24.10 keeps the request in
    flight for ever, and cannot stop, when a client cancels between the two. One that does not end within MAX_DRAIN_S is cancelled."""
    limit = threading.Timer(MAX_DRAIN_S, call.cancel)
    limit.daemon = True
    limit.start()
    with contextlib.suppress(grpc.RpcError):
        for _ in itertools.islice(call, MAX_DRAINED):
            pass
    limit.cancel()


async def drain_async(call: Any) -> None:
    """`drain` for grpc.aio."""
    with contextlib.suppress(grpc.RpcError, TimeoutError):
        async with asyncio.timeout(MAX_DRAIN_S):
            for _ in range(MAX_DRAINED):
                if await call.read() is grpc.aio.EOF:
                    return


def error_from_text(text: str) -> TurbotritonError:
    """The error for a stream's `error_message`: by its leading status when it has one."""
    line = " ".join(text.split("\n")).strip() or "the server failed without saying why; its log may tell"
    match = _STATUS_PREFIX.match(line)
    if match is None:
        return InvalidInputError(line) if _REFUSED_BY_SERVER.match(line) else ServerError(line)
    return _STATUS_TO_ERROR[match.group("status")](line[match.end() :])


def error_from_rpc(error: grpc.RpcError, url: str) -> TurbotritonError:
    """The error for a failed RPC: by its status code; a connection that cannot be made names url and the remedy."""
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return InvalidInputError(f"the request has more than {MAX_MESSAGE_BYTES >> 20} MiB; send less at once")
    if code in _UNAVAILABLE:
        reason = next((words for words, pattern in _CONNECTION_LOST.items() if pattern.search(details)), None)
        if reason is not None:
            return UnavailableError(f"no tritonserver answers at {url} ({reason}); is it running, and is this its gRPC port?")
        return UnavailableError(error_from_text(details).args[0])
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError(f"{url} did not answer in time; give a longer timeout or fewer tokens")
    if code is grpc.StatusCode.CANCELLED:
        return RequestCancelledError("the request was cancelled")
    if code in _INVALID:
        return InvalidInputError(error_from_text(details).args[0])
    return ServerError(f"{url} failed: {_shorten(details)}")


def _shorten(details: str, size: int = 160) -> str:
    return details if len(details) <= size else details[: size - 3] + "..."
