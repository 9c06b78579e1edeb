"""The text door's messages: what a reader of one stream remembers changes nothing that it reads."""

from typing import Any

import numpy as np
import pytest
from tests.client.fake_server import as_response
from tritonclient.grpc import service_pb2

from turbotriton.client.kserve import strings
from turbotriton.client.text_door import DeltaReader, build_generate_request, read_delta
from turbotriton.contract.errors import ServerError, UnavailableError


def outputs(text: str, ids: list[int], reason: str = "", count_type: Any = np.uint32, **more: Any) -> dict[str, Any]:
    counts = {"num_input_tokens": np.array([70000], count_type), "num_output_tokens": np.array([3], count_type)}
    return {
        "text_output": strings([text]),
        "output_ids": np.array(ids, np.int32),
        "finish_reason": strings([reason]),
        **counts,
        **more,
    }


def response(tensors: dict[str, Any]) -> service_pb2.ModelStreamInferResponse:
    return service_pb2.ModelStreamInferResponse(infer_response=as_response("m", "", tensors))


ENTRIES = strings(['[{"token": "a", "logprob": -0.5}]'])
STREAMS = {
    "tokens": [outputs("a", [5]), outputs("grüß", [7, 2**31 - 1, 8]), outputs("", []), outputs("b", [-1], "stop")],
    "counts as int32": [outputs("a", [5], count_type=np.int32), outputs("b", [6], "length", np.int32)],
    "log-probabilities": [outputs("a", [5], logprobs=ENTRIES), outputs("b", [6], logprobs=ENTRIES)],
    "log-probabilities of the prompt in the first": [
        outputs("a", [5], prompt_logprobs=ENTRIES),
        outputs("b", [6]),
        outputs("c", [7]),
    ],
    "an end with one more": [outputs("a", [5]), outputs("b", [6], "stop", cumulative_logprob=np.array([-1.5], np.float32))],
    "another order": [dict(reversed(outputs(text, [5]).items())) for text in "abc"],
    "half a character": [outputs("a", [5]), outputs("a", [5]) | {"text_output": np.array([b"\xe2\x82"], object)}],
    "other types": [outputs("a", [5]) | {"output_ids": np.array([5], np.int64)}] * 2,
    "nothing": [outputs("a", [5]), {}, outputs("b", [6])],
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_reader_of_a_stream_reads_each_response_as_if_alone(name: str) -> None:
    reader = DeltaReader()
    for tensors in STREAMS[name]:
        assert reader.read(response(tensors)) == read_delta(response(tensors))


def test_a_reader_of_a_stream_raises_what_a_response_carries() -> None:
    reader = DeltaReader()
    reader.read(response(outputs("a", [5])))
    with pytest.raises(UnavailableError, match=r"^the queue is full$"):
        reader.read(service_pb2.ModelStreamInferResponse(error_message="UNAVAILABLE: the queue is full"))
    failed = response(outputs("a", [5]))
    failed.error_message = "it broke"
    with pytest.raises(ServerError, match="it broke"):
        reader.read(failed)
    with pytest.raises(ServerError, match="no text door"):
        reader.read(response({"other": strings(["x"])}))


@pytest.mark.parametrize(
    ("given", "sent"), [({}, True), ({"exclude_input_in_output": None}, True), ({"exclude_input_in_output": False}, False)]
)
def test_each_tensor_is_sent_once(given: dict[str, Any], sent: bool) -> None:
    sampling = {"num_logprobs": 2, "max_tokens": 5, "stop_words": ["a", "bc"], **given}
    request = build_generate_request("m", "x", None, None, stream=True, request_id="", sampling=sampling)
    names = [tensor.name for tensor in request.inputs]
    assert len(names) == len(set(names)) == len(request.raw_input_contents)
    found = dict(zip(names, request.raw_input_contents, strict=True))
    assert found["exclude_input_in_output"] == bytes([sent])
    assert found["return_logprobs"] == b"\x01"
    assert found["stop_words"] == b"\x01\0\0\0a\x02\0\0\0bc"
