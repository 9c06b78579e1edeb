"""KServe messages built by hand from the protobuf classes alone: no client of ours and no tensor library between test and server."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

TIMEOUT_S = 120.0
#: KServe's type -> struct's letter.
LETTERS = {"UINT32": "I", "INT32": "i", "UINT64": "Q", "INT64": "q", "FP32": "f", "FP64": "d", "BOOL": "?", "INT8": "b"}


@dataclass(frozen=True)
class Input:
    """values: numbers, or bytes for datatype BYTES. `raw` replaces their encoding."""

    name: str
    datatype: str
    shape: Sequence[int]
    values: Sequence[Any]
    raw: bytes | None = None

    def encoded(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.datatype == "BYTES":
            return b"".join(struct.pack("<I", len(item)) + item for item in self.values)
        return struct.pack(f"<{len(self.values)}{LETTERS[self.datatype]}", *self.values)


def infer_request(model: str, inputs: Sequence[Input], request_id: str = "", **parameters: Any) -> Any:
    """A ModelInferRequest: inputs in the order given, raw contents, no outputs list, no version."""
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for key, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(request.parameters[key], kind, value)
    for item in inputs:
        request.inputs.add(name=item.name, datatype=item.datatype, shape=item.shape)
        request.raw_input_contents.append(item.encoded())
    return request


@dataclass(frozen=True)
class Output:
    shape: list[int]
    values: list[Any]


def outputs_of(response: Any) -> dict[str, Output]:
    found = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            values: list[Any] = []
            while raw:
                (size,) = struct.unpack_from("<I", raw)
                values.append(raw[4 : 4 + size])
                raw = raw[4 + size :]
        else:
            letter = LETTERS[output.datatype]
            values = list(struct.unpack(f"<{len(raw) // struct.calcsize(letter)}{letter}", raw))
        found[output.name] = Output(list(output.shape), values)
    return found


class Stream:
    """One ModelStreamInfer: the request is sent, the client's side is closed, the answers are read until the server closes."""

    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub, request: Any) -> None:
        self._call = stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S)

    def __iter__(self) -> Iterator[Any]:
        """ModelStreamInferResponses."""
        return iter(self._call)


class RawServer:
    """A plain channel to one server."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.insecure_channel(url, options=[("grpc.enable_http_proxy", 0)])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def infer(self, model: str, *inputs: Input) -> dict[str, Output]:
        return outputs_of(self.stub.ModelInfer(infer_request(model, inputs), timeout=TIMEOUT_S))

    def stream(self, request: Any) -> Stream:
        return Stream(self.stub, request)

    def refusal(self, request: Any) -> str:
        """The only message of a stream whose request is refused; the server closes the stream after it."""
        responses = list(self.stream(request))
        assert [bool(response.error_message) for response in responses] == [True], responses
        return str(responses[0].error_message)
