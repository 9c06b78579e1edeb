"""`guided` of the sampling JSON through a real server: the answer follows it, whatever the model would rather say."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.throttle import in_parts, throttled

from turbotriton.client import Client

from .engine import wait_until, watched
from .metrics import metric
from .processes import engine_pid
from .server import TritonServer

pytestmark = pytest.mark.e2e

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ask(server: TritonServer, guided: Any, status: int = 200, **body: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 120, "temperature": 0.0, "guided": guided}
    body = {"text_input": "Hello", "return_finish_reason": True, "sampling_parameters": json.dumps(sampling), **body}
    reply = httpx.post(f"{server.http_url}/v2/models/demo/generate", json=body, timeout=60)
    assert reply.status_code == status, reply.text
    content: dict[str, Any] = reply.json()
    return content


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["object", "text"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answer_follows_the_json_schema(demo_server: TritonServer, schema: Any, temperature: float) -> None:
    reply = ask(demo_server, {"json_schema": schema}, temperature=temperature, seed=3)
    answer = json.loads(reply["text_output"])
    assert set(answer) == {"name", "age"}
    assert isinstance(answer["name"], str)
    assert 0 <= answer["age"] <= 150
    assert reply["finish_reason"] == "stop"


def test_answer_follows_regex_grammar_and_choice(demo_server: TritonServer) -> None:
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", ask(demo_server, {"regex": r"[0-9]{4}-[0-9]{2}"})["text_output"])
    lark = 'start: "(" (NUMBER | start) ")"\nNUMBER: /[0-9]{1,3}/'
    assert re.fullmatch(r"\(+[0-9]{1,3}\)+", ask(demo_server, {"grammar": lark}, top_k=1, temperature=1.0)["text_output"])
    assert ask(demo_server, {"choice": ["maybe", "perhaps not"]})["text_output"] in ("maybe", "perhaps not")
    hot = ask(
        demo_server, {"json_object": True}, temperature=20.0, seed=1, max_tokens=900
    )  # the cold model never ends its string
    assert isinstance(json.loads(hot["text_output"]), dict)


@pytest.mark.parametrize(
    ("guided", "words"),
    [
        ({"regex": "(["}, "regex cannot be compiled: at 1(8): invalid regex"),
        ({"json_schema": {"type": "objekt"}}, "json_schema cannot be compiled: Invalid type: objekt"),
        ({"json_schema": {"not": {}}}, "Unimplemented keys"),
        ({"grammar": "start: foo"}, "grammar cannot be compiled"),
        ({"choice": []}, "choice must be a list"),
        ({"words": ["a"]}, "'words'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_followed_is_refused_with_the_reason(
    demo_server: TritonServer, guided: Any, words: str, stream: bool
) -> None:
    assert words in ask(demo_server, guided, 400, stream=stream)["error"]


def test_samples_and_streams_follow_it_too(demo_server: TritonServer) -> None:
    code = r"[A-Z]{3}-[0-9]{3}"
    sampling = {"max_tokens": 20, "temperature": 1.5, "n": 4, "seed": 1, "guided": {"regex": code}}
    with Client(demo_server.grpc_url) as client:
        options: dict[str, Any] = {"seed": 5, "temperature": 1.5, "sampling_parameters": {"guided": {"regex": code}}}
        deltas = in_parts(engine_pid(demo_server), lambda: list(client.stream("Hello", **options)))
        assert re.fullmatch(code, "".join(delta.text for delta in deltas))
    body = {"text_input": "Hello", "sampling_parameters": json.dumps(sampling)}
    texts = httpx.post(f"{demo_server.http_url}/v2/models/demo/generate", json=body, timeout=60).json()["text_output"]
    assert len(set(texts)) == 4
    assert all(re.fullmatch(code, text) for text in texts)


@pytest.mark.slow
def test_crowd_of_guided_requests_beside_free_ones_with_few_blocks(demo_workspace: Path) -> None:
    """Room for about three at once: the others wait or are preempted, and every answer still follows its grammar.

    Twelve are at the engine before the first is answered, or there might never be more than there is room for.
    """
    options = {"session_len": "192", "cache_block_seq_len": "8", "cache_max_entry_count": "24", "num_tokens_per_iter": "16"}
    regex = r"([0-9]{3} ){8}[0-9]{3}"

    def one(index: int) -> bool:
        with Client(server.grpc_url) as client:
            guided = {"guided": {"regex": regex}} if index % 3 else {}
            reply = client.generate(
                "Tell me a number, and another one, and one more", max_tokens=80, seed=index, sampling_parameters=guided
            )
        return not guided or re.fullmatch(regex, reply.text) is not None

    with (
        TritonServer(demo_workspace / "model_repository", options=options) as server,
        ThreadPoolExecutor(12) as pool,
        watched(server) as engine,
    ):
        with throttled(engine_pid(server)):
            follows = pool.map(one, range(24))
            wait_until(lambda: engine.newest.num_running + engine.newest.num_waiting == 12, "twelve requests at the engine")
        assert all(follows)
        wait_until(lambda: metric(server, "turbotriton_preemptions_total") > 0, "a preemption")
