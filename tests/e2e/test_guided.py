"""`guided` of the sampling JSON through a real server: the answer follows it, whatever the model would rather say."""

import json
import re
from typing import Any

import httpx
import pytest

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
