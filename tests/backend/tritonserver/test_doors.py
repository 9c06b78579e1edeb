"""What all doors share: readiness, an unfilled repository, errors as tritonserver's; and the text and tokenizer doors on a fake engine."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.backend.tritonserver.fake_engine import FakeConnection
from tests.backend.tritonserver.fake_pb_utils import Request, Sender, TritonError, strings

from turbotriton.contract.errors import EngineDiedError, InvalidInputError, RequestCancelledError, UnavailableError
from turbotriton.contract.wire import FinishReason, TokenDelta, TokenLogprobs
from turbotriton.demo import checkpoint_path
from turbotriton.text.detokenizer import TextTokenizer

TOKENIZER = TextTokenizer.load(checkpoint_path())


class Bench:
    def __init__(self, door: Any, connection: FakeConnection) -> None:
        self.door, self.connection = door, connection
        self.engine = connection.current

    def send(self, name: str = "", parameters: dict[str, Any] | None = None, **inputs: Any) -> Sender:
        request = Request({"text_input": strings("hello")} | inputs, parameters or {}, name)
        self.door.execute([request])
        return request.sender


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> FakeConnection:
    from turbotriton.backend.tritonserver import door, text_door, turbomind_door

    connection = FakeConnection()
    monkeypatch.setattr(door, "_prepare_stub", lambda: 1)
    for module in (text_door, turbomind_door):
        monkeypatch.setattr(module, "EngineConnection", lambda weights, pid: connection)
    return connection


def load(folder: Path, module: str, *, filled: bool = True, instance: str = "demo_0_1") -> Any:
    """A door of the demo model: instance 1 publishes no metrics."""
    import importlib

    (folder / "1").mkdir()
    if filled:
        (folder / "1" / "weights").mkdir()
        (folder / "1" / "tokenizer").symlink_to(checkpoint_path())
    door = importlib.import_module(f"turbotriton.backend.tritonserver.{module}").TritonPythonModel()
    args = {"model_repository": str(folder), "model_version": "1", "model_name": "demo", "model_instance_name": instance}
    door.initialize(args)
    return door


@pytest.fixture
def bench(connection: FakeConnection, tmp_path: Path) -> Iterator[Bench]:
    door = load(tmp_path, "text_door")
    yield Bench(door, connection)
    door._responder.close(timeout_s=0.1)


@pytest.mark.parametrize("module", ["text_door", "turbomind_door"])
def test_an_unfilled_door_loads_is_not_ready_and_says_what_to_do(connection: FakeConnection, tmp_path: Path, module: str) -> None:
    door = load(tmp_path, module, filled=False)
    assert not door.is_ready()
    request = Request({})
    door.execute([request])
    error = request.sender.wait().error
    assert (error.code, "turbotriton convert" in str(error)) == ("UNAVAILABLE", True)
    door.finalize()


@pytest.mark.parametrize("module", ["preprocessing_door", "postprocessing_door"])
def test_an_unfilled_tokenizer_door_says_what_to_do(connection: FakeConnection, tmp_path: Path, module: str) -> None:
    door = load(tmp_path, module, filled=False)
    (response,) = door.execute([Request({})])
    assert (response.error.code, "turbotriton convert" in str(response.error)) == ("UNAVAILABLE", True)
    door.finalize()


def test_ready_while_the_engine_is(bench: Bench) -> None:
    assert bench.door.is_ready()
    bench.engine.is_alive = False
    assert not bench.door.is_ready()
    assert str(bench.send().wait().error).startswith("UNAVAILABLE: the engine is starting again")


def test_one_bad_request_of_a_batch_leaves_the_others(bench: Bench) -> None:
    bad, good = Request({}), Request({"text_input": strings("hello")})
    bench.door.execute([bad, good])
    assert "none" in str(bad.sender.wait().error)
    bench.engine.answer([])
    assert good.sender.wait().responses[-1].error is None


def test_an_unstreamed_answer_is_one_response(bench: Bench) -> None:
    ids = TOKENIZER.encode("one two")
    sender = bench.send(return_finish_reason=np.array([True]))
    for token_id in ids:
        bench.engine.answer([token_id], finish=None)
    bench.engine.answer([])
    (response,) = sender.wait().responses
    assert response.outputs["text_output"].tolist() == [b"one two"]
    assert response.outputs["output_ids"].tolist() == ids
    assert response.outputs["finish_reason"].tolist() == [b"length"]


def test_a_stream_with_an_interval_sends_its_first_token_then_so_many_at_once(bench: Bench) -> None:
    sender = bench.send(stream=np.array([True]), sampling_parameters=strings('{"stream_interval": 3}'))
    ids = TOKENIZER.encode("one two three four five six seven eight nine ten eleven twelve")[:9]
    for token_id in ids:
        bench.engine.answer([token_id], finish=None)
        wait_until_taken(bench)
    bench.engine.answer([])
    responses = sender.wait().responses
    assert [response.outputs["output_ids"].tolist() for response in responses] == [ids[:1], ids[1:4], ids[4:7], ids[7:]]
    assert b"".join(response.outputs["text_output"][0] for response in responses) == TOKENIZER.decode(ids).encode()


def wait_until_taken(bench: Bench) -> None:
    (mailbox,) = bench.door._responder._open.values()
    end = time.monotonic() + 60
    while mailbox.is_queued:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_stop_word_ends_the_answer_and_the_request(bench: Bench) -> None:
    sender = bench.send(stop_words=strings("two"), return_finish_reason=np.array([True]))
    bench.engine.answer(TOKENIZER.encode("one two three"), finish=None)
    (response,) = sender.wait().responses
    assert (response.outputs["text_output"].tolist(), response.outputs["finish_reason"].tolist()) == ([b"one "], [b"stop"])
    assert bench.engine.cancelled == [bench.engine.requests[0].request_id]


def test_stop_cancels_by_the_requests_own_id(bench: Bench) -> None:
    (response,) = bench.send("job-7", stop=np.array([True])).wait().responses
    assert bench.engine.cancelled_names == ["job-7"]
    assert response.outputs["finish_reason"].tolist() == [b"stopped"]
    assert "id" in str(bench.send(stop=np.array([True])).wait().error)


def test_a_stopped_request_is_answered_as_cancelled(bench: Bench) -> None:
    sender = bench.send("job-8")
    assert bench.engine.requests[0].name == "job-8"
    bench.engine.answer([], finish=FinishReason.CANCELLED)
    assert str(sender.wait().error).startswith("CANCELLED: ")


def test_a_stop_with_a_misspelt_input_is_refused(bench: Bench) -> None:
    error = bench.send("job-9", {"forced": 1}, stop=np.array([True])).wait().error
    assert "'forced'" in str(error)
    assert not bench.engine.cancelled_names


def test_a_deadline_before_the_end_is_an_error_unless_streamed(bench: Bench) -> None:
    deadline = np.array([50], dtype=np.int32)
    sender = bench.send(deadline_ms=deadline)
    assert bench.engine.requests[-1].deadline_ms == 50
    bench.engine.answer([40], finish=FinishReason.DEADLINE)
    assert "deadline_ms of 50" in str(sender.wait().error)
    sender = bench.send(deadline_ms=deadline, stream=np.array([True]), return_finish_reason=np.array([True]))
    bench.engine.answer([40], finish=FinishReason.DEADLINE)
    assert sender.wait().responses[-1].outputs["finish_reason"].tolist() == [b"deadline"]


def test_logprobs_are_json_with_one_entry_a_token(bench: Bench) -> None:
    sender = bench.send(num_logprobs=np.array([1], dtype=np.int32), return_cumulative_logprob=np.array([True]))
    entries = (TokenLogprobs(-0.5, ((40, -0.5),)), TokenLogprobs(-0.25, ((41, -0.25),)))
    bench.engine.answer([40, 41], logprobs=entries)
    outputs = sender.wait().responses[-1].outputs
    shown = json.loads(outputs["logprobs"][0])
    assert [(entry["token_id"], entry["logprob"], len(entry["top_logprobs"])) for entry in shown] == [
        (40, -0.5, 1),
        (41, -0.25, 1),
    ]
    assert outputs["cumulative_logprob"].tolist() == [-0.75]


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_logprobs_come_once_with_the_first_response_and_are_asked_for_once(bench: Bench, stream: bool) -> None:
    prompt = TOKENIZER.encode("one two")
    asked = {"prompt_logprobs": 1} | ({} if stream else {"n": 2})
    inputs = {"text_input": strings("one two"), "stream": np.array([stream])}
    sender = bench.send(**inputs, sampling_parameters=strings(json.dumps(asked)))
    assert [request.sampling.prompt_logprobs for request in bench.engine.requests] == ([1] if stream else [1, None])
    scores = tuple(TokenLogprobs(-index / 8, ((7, -0.125),)) for index in range(1, len(prompt)))
    if stream:
        bench.engine.answer([40], finish=None, prompt_logprobs=scores)
        wait_until_taken(bench)
        bench.engine.answer([41])
    else:
        for index, request in enumerate(bench.engine.requests):
            sent = TokenDelta(
                request.request_id, (40, 41), finish_reason=FinishReason.LENGTH, prompt_logprobs=() if index else scores
            )
            bench.engine._sinks[request.request_id](sent)
    responses = sender.wait().responses
    assert ["prompt_logprobs" in response.outputs for response in responses] == [True] + [False] * stream
    shown = json.loads(responses[0].outputs["prompt_logprobs"][0])
    assert [entry["token_id"] for entry in shown] == prompt
    assert [entry["logprob"] for entry in shown] == [None, *(-index / 8 for index in range(1, len(prompt)))]
    assert shown[1]["top_logprobs"] == [{"token_id": 7, "token": TOKENIZER.decode([7]), "logprob": -0.125}]
    assert "".join(entry["token"] for entry in shown) == "one two"


def test_token_ids_are_turned_back_into_the_text_in_front(bench: Bench) -> None:
    request = Request({"input_ids": np.array(TOKENIZER.encode("one two")), "exclude_input_in_output": np.array([False])}, {}, "")
    bench.door.execute([request])
    bench.engine.answer(TOKENIZER.encode(" three"))
    (response,) = request.sender.wait().responses
    assert response.outputs["text_output"].tolist() == [b"one two three"]


def test_the_engine_and_the_threads_end_with_the_door(connection: FakeConnection, tmp_path: Path) -> None:
    door = load(tmp_path, "text_door", instance="demo_0_0")
    door.finalize()
    assert connection.is_closed
    assert not any(thread.is_alive() for thread in door._responder._threads)


def test_an_unknown_status_is_internal_on_servers_that_lack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from turbotriton.backend.tritonserver.errors import error_response

    error = RequestCancelledError("gone")
    assert error_response(error).error.code == "INTERNAL"
    monkeypatch.setattr(TritonError, "CANCELLED", "CANCELLED", raising=False)
    assert error_response(error).error.code == "CANCELLED"
    assert str(error_response(error).error) == "CANCELLED: gone"


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        ("INVALID_ARG", "too long", InvalidInputError),
        ("UNAVAILABLE", "the queue is full", UnavailableError),
        ("UNAVAILABLE", "the engine process ended while it worked", EngineDiedError),
    ],
)
def test_an_engines_error_keeps_its_kind(status: str, text: str, kind: type[Exception]) -> None:
    from turbotriton.backend.tritonserver.door import final_error

    error = final_error(TokenDelta(1, finish_reason=FinishReason.ERROR, error=text, error_status=status))
    assert (type(error), str(error)) == (kind, text)


def test_preprocessing_pads_rows_and_answers_special_queries(connection: FakeConnection, tmp_path: Path) -> None:
    door = load(tmp_path, "preprocessing_door")
    query = np.array([[b"<BOS>"], [b"one two"], [b""]], dtype=np.object_)
    (response,) = door.execute([Request({"QUERY": query})])
    ids = TOKENIZER.encode("one two")
    rows, eos = response.outputs["INPUT_ID"], TOKENIZER.eos_token_id
    assert rows.tolist() == [[0] + [eos] * (len(ids) - 1), ids, [eos] * len(ids)]
    assert response.outputs["REQUEST_INPUT_LEN"].tolist() == [[1], [len(ids)], [1]]


def test_postprocessing_reads_from_the_offset_and_skips_ids_that_are_no_token(connection: FakeConnection, tmp_path: Path) -> None:
    door = load(tmp_path, "postprocessing_door")
    ids = TOKENIZER.encode("one two")

    def decode(tokens: list[int], offset: int, skip: int = 1) -> Any:
        inputs = {
            "TOKENS_BATCH": np.array([[tokens]], dtype=np.uint32),
            "sequence_length": np.array([[offset]], dtype=np.uint32),
            "skip_special_tokens": np.array([[skip]], dtype=np.int32),
        }
        (response,) = door.execute([Request(inputs)])
        output = response.outputs["OUTPUT"]
        assert output.shape == (1,)
        return output[0].decode()

    assert [decode(ids[:i], 0) + decode(ids, i) for i in range(len(ids) + 1)] == ["one two"] * (len(ids) + 1)
    assert decode([*ids, 2], 0, skip=0) == "one two<|im_end|>"
    assert decode([*ids, 4_000_000_000], 0) == "one two"
    assert decode([], 0) == ""


def test_tokens_that_waited_together_become_text_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the text costs decides how many streams a door carries."""
    from turbotriton.backend.tritonserver.text_door import IncrementalDetokenizer

    pushes: list[int] = []
    push = IncrementalDetokenizer.push
    monkeypatch.setattr(IncrementalDetokenizer, "push", lambda self, ids: (pushes.append(len(ids)), push(self, ids))[1])
    ids = TOKENIZER.encode("one two three four five six seven")
    sender = bench.send(stream=np.array([True]))
    sender.gate.clear()  # the first response is on its way while the others come in
    for token_id in ids:
        bench.engine.answer([token_id], None)
    bench.engine.answer([], FinishReason.LENGTH)
    sender.gate.set()
    sender.wait()
    texts = [response.outputs["text_output"].tolist()[0].decode() for response in sender.responses]
    assert "".join(texts) == TOKENIZER.decode(ids)
    assert sum(pushes) == len(ids)
    assert len(pushes) <= 4  # the first, what waited behind it, the last without a token
