"""Every sampling field and every engine option changes behaviour or is refused: a table, and a test that the table is whole."""

import ast
import dataclasses
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.throttle import in_parts, throttled

from turbotriton.client import Client
from turbotriton.contract.errors import UnavailableError
from turbotriton.contract.ini import EngineConfig

from .engine import PATIENCE_S, wait_until, watched
from .metrics import metric
from .processes import engine_pid
from .server import TritonServer

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
_SOURCE = (ROOT / "backend" / "tritonserver" / "text_request.py").read_text()
#: vLLM's JSON names -> ours; read from the source, since the module imports only inside a stub.
JSON_NAMES: dict[str, str] = next(
    ast.literal_eval(node.value)
    for node in ast.parse(_SOURCE).body
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "JSON_NAMES"
)
PROMPT = "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n"
GREEDY = {"temperature": 0.0, "max_tokens": 24}
LONG: dict[str, Any] = {"max_tokens": 120, "ignore_eos": True}


class Door:
    """The text door over HTTP; `ask` fails the test unless the status is the wanted one."""

    def __init__(self, server: TritonServer) -> None:
        self.server = server
        self.url = f"{server.http_url}/v2/models/demo"

    def ask(self, status: int = 200, **body: Any) -> dict[str, Any]:
        body = body if {"text_input", "messages", "input_ids"} & body.keys() else {"text_input": PROMPT, **body}
        reply = httpx.post(f"{self.url}/generate", json=body, timeout=60)
        assert reply.status_code == status, reply.text
        content: dict[str, Any] = reply.json()
        return content

    def ids(self, **body: Any) -> list[int]:
        ids = self.ask(**body)["output_ids"]
        return ids if isinstance(ids, list) else [ids]

    def text(self, **body: Any) -> str:
        return str(self.ask(**body)["text_output"])

    def refused(self, name: str, **body: Any) -> None:
        assert name in self.ask(status=400, **body)["error"]


@pytest.fixture(scope="module")
def door(demo_server: TritonServer) -> Door:
    return Door(demo_server)


def _changes(**options: Any) -> Callable[[Door], None]:
    """The option gives other tokens than greedy decoding without it."""

    def check(door: Door) -> None:
        assert door.ids(**GREEDY | options) != door.ids(**GREEDY)

    return check


def _sampled(**options: Any) -> Callable[[Door], None]:
    """The option makes a hot draw greedy: only the likeliest token survives it."""

    def check(door: Door) -> None:
        hot = {"temperature": 30.0, "seed": 5, "max_tokens": 12}
        assert door.ids(**hot) != door.ids(temperature=0.0, max_tokens=12)
        assert door.ids(**hot | options) == door.ids(temperature=0.0, max_tokens=12)

    return check


def _stream(door: Door) -> None:
    def ask() -> list[Any]:
        body = {"text_input": PROMPT, "stream": True, **GREEDY}
        reply = httpx.post(f"{door.url}/generate_stream", json=body, timeout=PATIENCE_S)
        return [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]

    events = in_parts(engine_pid(door.server), ask)
    assert "".join(event["text_output"] for event in events) == door.text(**GREEDY)


def _stop_words(door: Door) -> None:
    whole = door.text(**GREEDY)
    word = whole[5:9]
    assert door.text(**GREEDY, stop_words=[word]) == whole[: whole.find(word)]


def _bad_words(door: Door) -> None:
    word = re.findall(r"\w+", door.text(**GREEDY))[1]
    assert f" {word} " not in door.text(**GREEDY, bad_words=[word])


def _stop_token_ids(door: Door) -> None:
    ids = door.ids(**GREEDY)
    assert door.ids(**GREEDY, stop_token_ids=[ids[3]]) == ids[: ids.index(ids[3]) + 1]


def _ignore_eos(door: Door) -> None:
    ends = {"messages": '[{"role": "user", "content": "Hello!"}]', "temperature": 0.0, "max_tokens": 300}
    assert len(door.ids(**ends)) < 300
    assert len(door.ids(**ends, ignore_eos=True)) == 300


def _skip_special_tokens(door: Door) -> None:
    ends = {"messages": '[{"role": "user", "content": "Hello!"}]', "temperature": 0.0, "max_tokens": 300}
    assert "<|im_end|>" not in door.text(**ends)
    assert "<|im_end|>" in door.text(**ends, skip_special_tokens=False)


def _max_tokens(door: Door) -> None:
    assert [len(door.ids(max_tokens=n, ignore_eos=True)) for n in (1, 7)] == [1, 7]


def _min_tokens(door: Door) -> None:
    ends = {"messages": '[{"role": "user", "content": "Hello!"}]', "temperature": 0.0, "max_tokens": 200}
    num = len(door.ids(**ends))
    assert len(door.ids(**ends, min_tokens=num + 10)) >= num + 10


def _seed(door: Door) -> None:
    draws = [door.ids(max_tokens=24, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def _samples(door: Door) -> None:
    texts = door.ask(max_tokens=24, temperature=2.0, seed=1, n=3)["text_output"]
    assert len(set(texts)) == 3
    assert texts[0] == door.text(max_tokens=24, temperature=2.0, seed=1)
    door.refused("n is 3", n=3, stream=True)


def _logprobs(door: Door) -> None:
    reply = door.ask(**GREEDY, num_logprobs=2, return_cumulative_logprob=True)
    entries = json.loads(reply["logprobs"])
    assert [entry["token_id"] for entry in entries] == reply["output_ids"]
    assert all(entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"] for entry in entries)
    assert reply["cumulative_logprob"] == pytest.approx(sum(entry["logprob"] for entry in entries), rel=1e-4)


def _deadline(door: Door) -> None:
    error = door.ask(status=400, max_tokens=900, ignore_eos=True, deadline_ms=60)["error"]
    assert "deadline_ms" in error


def _exclude(door: Door) -> None:
    assert door.text(**GREEDY, exclude_input_in_output=False) == PROMPT + door.text(**GREEDY)


def _flag(name: str, output: str) -> Callable[[Door], None]:
    def check(door: Door) -> None:
        assert output not in door.ask(**GREEDY)
        assert output in door.ask(**GREEDY, **{name: True})

    return check


def _stop(door: Door) -> None:
    door.refused("stop needs the id", stop=True)


def _json(door: Door) -> None:
    assert door.ids(sampling_parameters=json.dumps({"temperature": 0.0, "max_tokens": 24})) == door.ids(**GREEDY)
    assert len(door.ids(sampling_parameters='{"temperature": 0, "max_tokens": 24}', max_tokens=5)) == 5, "flat tensors win"
    door.refused("best_of", sampling_parameters='{"best_of": 2}')


def _chat_template_kwargs(door: Door) -> None:
    messages = '[{"role": "user", "content": "Hello!"}]'
    lengths = [
        door.ask(**GREEDY, messages=messages, return_num_input_tokens=True, chat_template_kwargs=text)["num_input_tokens"]
        for text in ("{}", '{"add_generation_prompt": false}')
    ]
    assert lengths[0] > lengths[1]
    door.refused("is set by the server", messages=messages, chat_template_kwargs='{"messages": []}')
    door.refused("chat_template_kwargs is for messages", text_input=PROMPT, chat_template_kwargs="{}")


#: input tensor -> the proof that it is honoured.
INPUTS: dict[str, Callable[[Door], None]] = {
    "text_input": lambda door: _different(door, {"text_input": PROMPT}, {"text_input": "count"}),
    "messages": lambda door: _different(
        door,
        {"messages": '[{"role": "user", "content": "Hello!"}]'},
        {"messages": '[{"role": "user", "content": "Sort 3 1 2."}]'},
    ),
    "chat_template_kwargs": _chat_template_kwargs,
    "input_ids": lambda door: _different(door, {"input_ids": [40, 41, 42]}, {"input_ids": [60, 61, 62]}),
    "stream": _stream,
    "sampling_parameters": _json,
    "max_tokens": _max_tokens,
    "min_tokens": _min_tokens,
    "temperature": lambda door: _different(door, {"temperature": 0.0}, {"temperature": 5.0}),
    "top_p": _sampled(top_p=1e-6),
    "min_p": _sampled(min_p=1.0),
    "top_k": _sampled(top_k=1),
    "repetition_penalty": _changes(repetition_penalty=50.0),
    "presence_penalty": lambda door: _different(door, LONG, LONG | {"presence_penalty": 2.0}),
    "frequency_penalty": lambda door: _repeats_less(door, frequency_penalty=2.0),
    "seed": _seed,
    "stop_words": _stop_words,
    "bad_words": _bad_words,
    "stop_token_ids": _stop_token_ids,
    "ignore_eos": _ignore_eos,
    "skip_special_tokens": _skip_special_tokens,
    "deadline_ms": _deadline,
    "stop": _stop,
    "n": _samples,
    "num_logprobs": _logprobs,
    "exclude_input_in_output": _exclude,
    "return_finish_reason": _flag("return_finish_reason", "finish_reason"),
    "return_num_input_tokens": _flag("return_num_input_tokens", "num_input_tokens"),
    "return_num_output_tokens": _flag("return_num_output_tokens", "num_output_tokens"),
    "return_logprobs": _flag("return_logprobs", "logprobs"),
    "return_cumulative_logprob": _flag("return_cumulative_logprob", "cumulative_logprob"),
}


def _different(door: Door, one: dict[str, Any], other: dict[str, Any]) -> None:
    base = {"max_tokens": 24, "seed": 3} | ({} if "temperature" in one else {"temperature": 0.0})
    assert door.ids(**base | one) != door.ids(**base | other)


def _repeats_less(door: Door, **penalty: float) -> None:
    long = {"temperature": 0.0, "max_tokens": 120, "ignore_eos": True}
    assert len(set(door.ids(**long, **penalty))) > len(set(door.ids(**long)))


def test_the_table_names_every_input_of_the_door() -> None:
    config = (ROOT / "model_repository" / "text" / "config.pbtxt").read_text()
    inputs = config.split("input [", 1)[1].split("\noutput [", 1)[0]
    proven_under_load = {"priority"}  # _queue_is_bounded_and_ordered
    assert set(re.findall(r'name: "(\w+)"', inputs)) == set(INPUTS) | proven_under_load


@pytest.mark.parametrize("name", list(INPUTS))
def test_input_is_honoured(door: Door, name: str) -> None:
    INPUTS[name](door)


#: JSON key -> a value that the flat tensor of the same meaning gives the same answer for.
JSON_VALUES: dict[str, Any] = {
    "max_tokens": 5,
    "min_tokens": 4,
    "temperature": 0.0,
    "top_p": 0.5,
    "min_p": 0.5,
    "top_k": 3,
    "repetition_penalty": 50.0,
    "presence_penalty": 2.0,
    "frequency_penalty": 2.0,
    "seed": 9,
    "stop": ["e"],
    "bad_words": ["the"],
    "stop_token_ids": [101],
    "ignore_eos": True,
    "skip_special_tokens": False,
    "n": 2,
    "logprobs": 1,
}


def test_json_keys_mean_what_the_flat_tensors_mean(door: Door) -> None:
    elsewhere = {"guided", "prompt_logprobs"}  # test_guided.py, test_openai.py
    without_tensor = {"include_stop_str_in_output", "logit_bias", "stream_interval"} | elsewhere
    assert set(JSON_VALUES) | without_tensor == set(JSON_NAMES)
    base = {"max_tokens": 20, "seed": 4}
    for key, value in JSON_VALUES.items():
        flat = door.ask(**base | {JSON_NAMES[key]: value})
        rest = {name: number for name, number in base.items() if name != JSON_NAMES[key]}
        assert door.ask(**rest, sampling_parameters=json.dumps({key: value})) == flat, key
    assert door.ids(temperature=0.0, max_tokens=3, sampling_parameters='{"logit_bias": {"40": 100}}') == [40, 40, 40]
    shown = door.text(**GREEDY, sampling_parameters='{"stop": ["e"], "include_stop_str_in_output": true}')
    assert shown == door.text(**GREEDY, stop_words=["e"]) + "e"
    body = {"text_input": PROMPT, "stream": True, "sampling_parameters": '{"stream_interval": 10}', **GREEDY}
    reply = httpx.post(f"{door.url}/generate_stream", json=body, timeout=60)
    events = [json.loads(line[6:])["output_ids"] for line in reply.text.splitlines() if line.startswith("data: ")]
    sizes = [len(ids) if isinstance(ids, list) else 1 for ids in events]
    assert all(size >= 10 for size in sizes[1:-1])
    assert sum(sizes) == GREEDY["max_tokens"]
    door.refused("stream_interval is for stream", sampling_parameters='{"stream_interval": 10}')


#: engine option -> (value, what is seen of it): a refusal text, or a check on the running engine.
def _info(field: str, wanted: Any) -> Callable[[TritonServer], None]:
    def check(server: TritonServer) -> None:
        with watched(server) as engine:
            assert getattr(engine.info, field) == wanted

    return check


def _no_prefix_hits(server: TritonServer) -> None:
    door = Door(server)
    for _ in range(2):
        door.ask(text_input="a" * 100, max_tokens=1)
    with watched(server) as engine:
        stats = engine.stats()
    assert stats.prompt_tokens_total >= 2 * 16
    assert stats.cached_tokens_total == 0


def _queue_is_bounded_and_ordered(server: TritonServer) -> None:
    """max_batch_size 1 and max_queued_requests 3: one runs, three wait, the next is refused; the lowest priority goes first."""
    with watched(server) as engine, Client(server.grpc_url) as client, throttled(engine_pid(server)) as throttle:
        running = client.stream(PROMPT, max_tokens=250, ignore_eos=True)
        next(running)
        ended: list[int] = []

        def wait_for(priority: int) -> None:
            client.generate(PROMPT, max_tokens=120, ignore_eos=True, priority=priority)
            ended.append(priority)

        threads = [threading.Thread(target=wait_for, args=(priority,)) for priority in (3, 1, 2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: engine.newest.num_waiting == 3, "three requests waiting")
        with pytest.raises(UnavailableError, match="the queue is full"):
            client.generate(PROMPT, max_tokens=2)
        running.cancel()
        throttle.release()
        with throttled(engine_pid(server), share=0.2):  # one is told of its end long before the next one has its own
            for thread in threads:
                thread.join()
    assert ended == [1, 2, 3]


#: Options that one server can show together, with what shows each.
SERVED: dict[str, tuple[str, Callable[[TritonServer], None]]] = {
    "session_len": ("320", _info("session_len", 320)),
    "cache_max_entry_count": ("40", _info("num_blocks", 40)),
    "cache_block_seq_len": ("16", _info("block_size", 16)),
    "compute_dtype": ("bf16", _info("compute_dtype", "bf16")),
    "device": ("cpu", _info("device", "cpu")),
    "enable_prefix_caching": ("0", _no_prefix_hits),
    "max_batch_size": ("1", _info("max_batch_size", 1)),
    "max_queued_requests": ("3", _queue_is_bounded_and_ordered),
}
#: Options whose effect other tests show.
ELSEWHERE = {
    "num_tokens_per_iter": "tests/backend/scheduling/test_scheduler.py",
    "max_queued_tokens": "tests/backend/scheduling/test_scheduler.py",
    "quant_policy": "tests/e2e/test_quantized.py",
    "schedule_policy": "tests/backend/scheduling/test_scheduler.py",
    "deterministic": "tests/backend/runner/test_deterministic.py",
    "cuda_graphs": "tests/backend/runner/test_decode_graphs.py, on a GPU; without one there are none",
}


def test_every_engine_option_is_honoured(demo_workspace: Path) -> None:
    assert {field.name for field in dataclasses.fields(EngineConfig)} == set(SERVED) | set(ELSEWHERE)
    options = {name: value for name, (value, _) in SERVED.items()} | {"metric_aliases": "0"}
    with TritonServer(demo_workspace / "model_repository", options=options) as server:
        for _name, (_value, check) in SERVED.items():
            check(server)
        assert metric(server, "turbotriton_engine_up") == 1
        assert not re.search(r"^(vllm:|nv_trt_llm_)", httpx.get(server.metrics_url, timeout=PATIENCE_S).text, re.MULTILINE)


@pytest.mark.parametrize(("name", "value"), [("quant_policy", 5), ("max_batch_size", 0), ("schedule_policy", "lifo")])
def test_values_that_no_version_knows_are_refused(name: str, value: Any) -> None:
    with pytest.raises(Exception, match=name):
        EngineConfig(session_len=128, **{name: value})
