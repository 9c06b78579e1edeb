"""Malformed requests over HTTP and gRPC to every door: a clear error each, and the server serves on as if nothing had been."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from .malformed import GOOD, OTHER_HTTP, SERVER_HTTP, STREAMED, TEXT_HTTP, UNARY, query, tokens, turn
from .metrics import wait_idle
from .raw_grpc import TIMEOUT_S, Input, RawServer, outputs_of
from .server import TritonServer

pytestmark = pytest.mark.e2e


class Doors:
    def __init__(self, server: TritonServer, raw: RawServer) -> None:
        self.server = server
        self.raw = raw
        self.http = httpx.Client(base_url=f"{server.http_url}/v2/models/", timeout=TIMEOUT_S, trust_env=False)
        self.expected = self.good()
        self.num_refused = 0

    def good(self) -> Any:
        reply = self.http.post("demo/generate", json=GOOD)
        assert reply.status_code == 200, reply.text
        return reply.json()["output_ids"]

    def refused(self) -> None:
        """Counts a refusal; now and then all must be as it was."""
        self.num_refused += 1
        if self.num_refused % 25 == 0:
            self.check()

    def check(self) -> None:
        """A good request of every door, and nothing is left running."""
        assert self.good() == self.expected
        responses = list(self.raw.stream(turn()))
        assert not any(response.error_message for response in responses)
        assert outputs_of(responses[0].infer_response)["sequence_length"].values[0] > 2
        (text_ids,) = [outputs_of(self.raw.stub.ModelInfer(query(b"hello"), timeout=TIMEOUT_S))["INPUT_ID"].values]
        ids = Input("TOKENS_BATCH", "UINT32", [1, 1, len(text_ids)], text_ids)
        assert outputs_of(self.raw.stub.ModelInfer(tokens(ids), timeout=TIMEOUT_S))["OUTPUT"].values == [b"hello"]
        wait_idle(self.server)


@pytest.fixture(scope="module")
def doors(demo_server: TritonServer) -> Iterator[Doors]:
    with RawServer(demo_server.grpc_url) as raw:
        doors = Doors(demo_server, raw)
        yield doors
        doors.http.close()


@pytest.mark.parametrize("case", TEXT_HTTP)
def test_text_door_over_http(doors: Doors, case: str) -> None:
    body, named = TEXT_HTTP[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = doors.http.post("demo/generate", content=content)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert len(error) < 500
    for part in named:
        assert part in error
    doors.refused()


@pytest.mark.parametrize("case", SERVER_HTTP)
def test_json_that_the_server_itself_refuses(doors: Doors, case: str) -> None:
    body, status, words = SERVER_HTTP[case]
    reply = doors.http.post("demo/generate", content=body if isinstance(body, bytes) else json.dumps(body).encode())
    assert reply.status_code == status
    assert words in reply.json()["error"]
    doors.refused()


@pytest.mark.parametrize("case", OTHER_HTTP)
def test_other_doors_over_http(doors: Doors, case: str) -> None:
    path, body, status, named = OTHER_HTTP[case]
    reply = doors.http.post(path, json=body)
    assert reply.status_code == status, reply.text
    assert named in reply.json()["error"]
    doors.refused()


def test_generate_stream_gives_the_error_as_its_only_event(doors: Doors) -> None:
    reply = doors.http.post("demo/generate_stream", json={**GOOD, "stream": True, "temperature": -1.0})
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]
    assert [event["error"] for event in events] == ["INVALID_ARG: temperature is -1.0; it must be from 0 to 100"]
    doors.refused()


@pytest.mark.parametrize("case", STREAMED)
def test_streamed_request(doors: Doors, case: str) -> None:
    request, named = STREAMED[case]
    error = doors.raw.refusal(request)
    assert len(error) < 500
    for part in named:
        assert part in error
    doors.refused()


@pytest.mark.parametrize("case", UNARY)
def test_unary_request(doors: Doors, case: str) -> None:
    request, named = UNARY[case]
    with pytest.raises(grpc.RpcError) as caught:
        doors.raw.stub.ModelInfer(request, timeout=TIMEOUT_S)
    for part in named:
        assert part in caught.value.details()
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
    doors.refused()


def test_the_server_serves_on_after_all(doors: Doors) -> None:
    doors.check()
