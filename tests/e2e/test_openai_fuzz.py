"""Requests made from the server's own OpenAPI schema, right ones and wrong ones, against a real server: no answer is a 5xx."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from .engine import PATIENCE_S
from .openai_server import api_server
from .server import TritonServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

POSTS = (
    "/v1/chat/completions",
    "/v1/chat/completions_qos",
    "/v1/completions",
    "/v1/completions_qos",
    "/v1/chat/interactive",
    "/v1/chat/interactive_qos",
    "/v1/embeddings",
    "/v1/encode",
)
NUM_EXAMPLES = {GenerationMode.POSITIVE: 40, GenerationMode.NEGATIVE: 25}
#: What a made-up request may cost at most. n, prompts and text stay as they came.
FEW = {"max_tokens": 3, "max_completion_tokens": 3, "request_output_len": 3, "min_tokens": 0}


@pytest.fixture(scope="module")
def base_url(demo_server: TritonServer) -> Iterator[str]:
    with api_server(demo_server.grpc_url) as url:
        yield url


@pytest.fixture(scope="module")
def schema(base_url: str) -> Any:
    return schemathesis.openapi.from_url(f"{base_url}/openapi.json")


def servable(path: str, body: Any) -> Any:
    """The same request for the model that is there, and short."""
    if not isinstance(body, dict):
        return body
    body |= {name: value for name, value in FEW.items() if isinstance(body.get(name), int)}
    if "model" in body:
        body["model"] = "demo"
    if "interactive" in path:
        body["request_output_len"] = 3
    elif "completions" in path and "max_completion_tokens" not in body:
        body["max_tokens"] = 3
    return body


def test_every_endpoint_is_fuzzed(schema: Any) -> None:
    labels = {found.ok().label for found in schema.get_all_operations()}
    assert labels == {f"POST {path}" for path in POSTS} | {
        "GET /v1/models",
        "GET /v1/models/{model}",
        "GET /health",
        "GET /metrics",
    }


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", POSTS)
def test_no_request_is_answered_by_a_5xx(schema: Any, base_url: str, path: str, mode: GenerationMode) -> None:
    statuses: set[int] = set()
    if path == "/v1/embeddings" and mode is GenerationMode.NEGATIVE:
        mode = GenerationMode.POSITIVE  # it takes no body that could be wrong

    @seed(20)
    @settings(
        max_examples=NUM_EXAMPLES[mode],
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = servable(path, case.body)
        reply = case.call(base_url=base_url, timeout=60)
        statuses.add(reply.status_code)
        assert reply.status_code < 500, (case.body, reply.text)
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

    check()
    if mode is GenerationMode.POSITIVE and path in ("/v1/chat/completions", "/v1/completions", "/v1/encode"):
        assert 200 in statuses
    assert httpx.get(f"{base_url}/health", timeout=PATIENCE_S).status_code == 200
