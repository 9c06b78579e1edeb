"""What the doors use of tritonserver's `triton_python_backend_utils`, in memory: requests to read, senders and metrics that record."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    def __init__(self, name: str, array: npt.NDArray[Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> npt.NDArray[Any]:
        return self._array


class TritonError(Exception):
    """The codes that every server has; newer ones know more."""

    INTERNAL, INVALID_ARG, UNAVAILABLE = "INTERNAL", "INVALID_ARG", "UNAVAILABLE"

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        super().__init__(message)
        self.code = code


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error = error


def get_input_tensor_by_name(request: "Request", name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


class Sender:
    """`gate`: cleared, `send` waits for it. A response after FINAL, or a poll after it, is the end of a real server."""

    def __init__(self) -> None:
        self.sent: list[tuple[InferenceResponse | None, int]] = []
        self.is_client_gone = False
        self.fails = False
        self.gate = threading.Event()
        self.gate.set()
        self.is_sending = threading.Event()
        self.is_final = threading.Event()
        self.num_polls = 0

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.is_final.is_set(), "a response after FINAL"
        self.is_sending.set()
        assert self.gate.wait(60)
        if self.fails:
            raise RuntimeError("the client's connection is gone")
        self.sent.append((response, flags))
        if flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.is_final.set()

    def is_cancelled(self) -> bool:
        assert not self.is_final.is_set(), "is_cancelled() after FINAL reads freed memory"
        self.num_polls += 1
        return self.is_client_gone

    def wait(self) -> Self:
        assert self.is_final.wait(60), "no last response"
        return self

    @property
    def responses(self) -> list[InferenceResponse]:
        return [response for response, _ in self.sent if response is not None]

    @property
    def error(self) -> TritonError:
        """Of a request that was answered by an error alone."""
        (response,) = self.responses
        assert response.error is not None
        return response.error


@dataclass
class Request:
    """Inputs by name, as tritonserver hands them over: strings are object arrays of bytes."""

    inputs: Mapping[str, npt.NDArray[Any]]
    parameter_values: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    sender: Sender = field(default_factory=Sender)

    def parameters(self) -> str:
        return json.dumps(dict(self.parameter_values)) if self.parameter_values else ""

    def request_id(self) -> str:
        return self.name

    def get_response_sender(self) -> Sender:
        return self.sender


def strings(*values: str | bytes) -> npt.NDArray[np.object_]:
    return np.array([value.encode() if isinstance(value, str) else value for value in values], dtype=np.object_)


class _Metric:
    def __init__(self, labels: Mapping[str, str], buckets: Sequence[float] | None) -> None:
        self.labels = dict(labels)
        self.value = 0.0
        self.steps: list[float] = []
        self.observed: list[float] = []
        self.is_histogram = buckets is not None

    def increment(self, step: float) -> None:
        self.value += step
        self.steps.append(step)

    def observe(self, value: float) -> None:
        assert self.is_histogram
        self.observed.append(value)


class MetricFamily:
    """As on a server, a name can be registered once while its family lives: `families` holds them all."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    families: dict[str, "MetricFamily"] = {}  # noqa: RUF012  cleared by the fixture

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        assert description
        assert name not in self.families, f"{name} is registered already"
        self.name, self.kind = name, kind
        self.metrics: list[_Metric] = []
        self.families[name] = self

    def Metric(self, *, labels: Mapping[str, str], buckets: Sequence[float] | None = None) -> _Metric:
        assert (buckets is not None) == (self.kind == self.HISTOGRAM)
        metric = _Metric(labels, buckets)
        self.metrics.append(metric)
        return metric
