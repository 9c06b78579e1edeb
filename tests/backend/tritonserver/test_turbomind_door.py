"""The `turbomind` door on a fake engine: what it reads of a request, what it submits, what a session has afterwards."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.backend.tritonserver.fake_engine import FakeConnection
from tests.backend.tritonserver.fake_pb_utils import Request, Sender

from turbotriton.contract.wire import FinishReason


def one(value: Any, dtype: Any) -> Any:
    return np.array([[value]], dtype=dtype)


def request(ids: list[int], count: int = 4, **inputs: Any) -> Request:
    """START, END, STOP and the numbers as plain Python values."""
    dtypes = {"START": "i4", "END": "i4", "STOP": "i4", "step": "i4", "CORRID": "u8", "random_seed": "u8"}
    dtypes |= {"runtime_top_k": "u4", "runtime_top_p": "f4", "temperature": "f4", "repetition_penalty": "f4", "beam_width": "u4"}
    given = {name: value if isinstance(value, np.ndarray) else one(value, dtypes[name]) for name, value in inputs.items()}
    required = {
        "input_ids": np.array([ids], dtype=np.uint32),
        "input_lengths": one(len(ids), np.uint32),
        "request_output_len": one(count, np.uint32),
    }
    return Request(required | given)


class Bench:
    """The door, opened on a fake engine of session_len 64 and vocabulary 512."""

    def __init__(self, door: Any, connection: FakeConnection) -> None:
        self.door, self.connection = door, connection
        self.engine = connection.current

    def send(self, sent: Request) -> Sender:
        self.door.execute([sent])
        return sent.sender

    def ids(self, sender: Sender) -> list[int]:
        """Of the newest response."""
        response = sender.responses[-1]
        assert response.error is None, response.error
        ids = response.outputs["output_ids"]
        assert (ids.dtype, ids.shape[:2]) == (np.uint32, (1, 1))
        assert response.outputs["sequence_length"].tolist() == [[ids.size]]
        return [int(token_id) for token_id in ids.ravel()]

    def turn(self, ids: list[int], made: list[int], **inputs: Any) -> list[int]:
        """A whole turn in which the engine makes `made`."""
        sender = self.send(request(ids, **inputs))
        self.engine.answer(made)
        return self.ids(sender.wait())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    from turbotriton.backend.tritonserver import door as base
    from turbotriton.backend.tritonserver import turbomind_door

    connection = FakeConnection()
    monkeypatch.setattr(turbomind_door, "EngineConnection", lambda weights, pid: connection)
    monkeypatch.setattr(base, "_prepare_stub", lambda: 1)
    (tmp_path / "1" / "weights").mkdir(parents=True)
    door = turbomind_door.TritonPythonModel()
    door.initialize({"model_repository": str(tmp_path), "model_version": "1"})
    yield Bench(door, connection)
    door._responder.close(timeout_s=0.1)


def refused(bench: Bench, match: str, **inputs: Any) -> None:
    error = bench.send(request([5], **inputs)).wait().error
    assert match in str(error)
    assert error.code == "INVALID_ARG"
    assert not bench.engine.requests


def test_only_the_required_inputs_make_a_session_of_one_turn(bench: Bench) -> None:
    assert bench.turn([5, 6], [7, 8]) == [5, 6, 7, 8]
    assert len(bench.door.sessions) == 0
    assert bench.engine.requests[0].sampling.is_greedy, "k and p absent is k = 1"


def test_the_ids_are_cut_to_input_lengths(bench: Bench) -> None:
    bench.send(request([5, 6, 7], input_lengths=one(2, np.uint32)))
    assert bench.engine.requests[0].prompt_ids == (5, 6)
    bench.engine.answer()


def test_responses_are_cumulative(bench: Bench) -> None:
    sender = bench.send(request([5]))
    for length, token_id in enumerate((6, 7), start=1):
        bench.engine.answer([token_id], finish=None)
        while len(sender.responses) < length:
            time.sleep(0.001)
    bench.engine.answer([8])
    sender.wait()
    assert [response.outputs["sequence_length"].item() for response in sender.responses] == [2, 3, 4]
    assert bench.ids(sender) == [5, 6, 7, 8]


def test_a_later_turn_submits_history_and_input(bench: Bench) -> None:
    assert bench.turn([5, 6], [2], START=1, END=0, CORRID=2**63, random_seed=9) == [5, 6, 2]
    assert bench.turn([7], [8], START=0, END=0, CORRID=2**63, step=2, random_seed=1) == [5, 6, 7, 8]
    assert [sent.prompt_ids for sent in bench.engine.requests] == [(5, 6), (5, 6, 7)]
    assert [sent.sampling.seed for sent in bench.engine.requests] == [9, 9]


@pytest.mark.parametrize(("count", "wanted"), [(0, 0), (1, 1), (62, 62), (63, 62), (2**32 - 1, 62)])
def test_new_tokens_are_clamped_to_session_len(bench: Bench, count: int, wanted: int) -> None:
    bench.send(request([5, 6], count))
    assert bench.engine.requests[0].sampling.max_new_tokens == wanted
    bench.engine.answer()


def test_stop_interrupts_and_the_interrupted_turn_ends_normally(bench: Bench) -> None:
    running = bench.send(request([5], START=1, END=0, CORRID=3))
    stop = bench.send(request([], 0, START=0, END=0, STOP=1, CORRID=3))
    assert bench.ids(stop.wait()) == [5]
    assert bench.engine.cancelled == [bench.engine.requests[0].request_id]
    bench.engine.answer([6], finish=FinishReason.CANCELLED)
    assert bench.ids(running.wait()) == [5, 6]
    assert bench.turn([7], [8], START=0, END=0, CORRID=3) == [5, 6, 7, 8]


def test_end_without_new_tokens_asks_nothing_of_the_engine(bench: Bench) -> None:
    bench.turn([5], [6], START=1, END=0)
    assert bench.ids(bench.send(request([1], 0, START=0, END=1, step=2)).wait()) == [5, 6]
    assert len(bench.engine.requests) == 1
    assert "failure:  1 " in str(bench.send(request([1], START=0)).wait().error)


def test_an_engine_failure_is_code_5_and_keeps_the_history(bench: Bench) -> None:
    bench.turn([5], [6], START=1, END=0)
    sender = bench.send(request([7], START=0, END=0))
    bench.engine.answer([8], finish=FinishReason.ERROR, error="no such luck", error_status="INTERNAL")
    assert str(sender.wait().error) == "TurboMind execute failure:  5 (no such luck)"
    assert bench.turn([9], [10], START=0, END=0) == [5, 6, 9, 10]


def test_an_engine_that_is_away_is_unavailable_and_the_session_outlives_it(bench: Bench) -> None:
    bench.turn([5], [6], START=1, END=0)
    bench.engine.is_alive = False
    error = bench.send(request([7], START=0, END=0)).wait().error
    assert (error.code, str(error)[:13]) == ("UNAVAILABLE", "UNAVAILABLE: ")
    bench.engine.is_alive = True
    assert bench.turn([7], [8], START=0, END=0) == [5, 6, 7, 8]


def test_wrong_sampling_changes_no_session(bench: Bench) -> None:
    bench.turn([5], [6], START=1, END=0)
    for start in (0, 1):
        assert "temperature is -1.0" in str(bench.send(request([7], START=start, END=0, temperature=-1.0)).wait().error)
    assert bench.turn([7], [8], START=0, END=0) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("top_k", "top_p", "wanted"),
    [
        (None, None, (1, 1.0)),
        (0, 0.0, (1, 1.0)),
        (None, 0.5, (0, 0.5)),
        (0, 0.5, (0, 0.5)),
        (40, None, (40, 1.0)),
        (40, 0.0, (40, 1.0)),
        (40, -3.0, (40, 1.0)),
        (40, 7.0, (40, 1.0)),
        (5000, 0.5, (1024, 0.5)),
    ],
)
def test_top_k_and_top_p_are_read_as_turbomind_does(bench: Bench, top_k: Any, top_p: Any, wanted: tuple[int, float]) -> None:
    given = {name: value for name, value in (("runtime_top_k", top_k), ("runtime_top_p", top_p)) if value is not None}
    bench.send(request([5], **given))
    sampling = bench.engine.requests[0].sampling
    assert (sampling.top_k, sampling.top_p) == wanted
    bench.engine.answer()


def words(*rows: list[int]) -> Any:
    return np.array([rows], dtype=np.int32)


def test_words_are_cut_at_their_offsets(bench: Bench) -> None:
    stops, bans = words([5, 6, 7, 8], [1, 4, -1, -1]), words([9], [1])
    bench.send(request([5], stop_words_list=stops, bad_words_list=bans))
    sampling = bench.engine.requests[0].sampling
    assert (sampling.stop_sequences, sampling.bad_sequences) == (((5,), (6, 7, 8)), ((9,),))
    bench.engine.answer()


def test_32_columns_of_words_are_read_and_padding_alone_is_none(bench: Bench) -> None:
    full = words(list(range(3, 35)), list(range(1, 33)))
    bench.send(request([5], stop_words_list=full, bad_words_list=words([0, 0], [-1, -1])))
    sampling = bench.engine.requests[0].sampling
    assert sampling.stop_sequences == tuple((i,) for i in range(3, 35))
    assert sampling.bad_sequences == ()
    bench.engine.answer()


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (words([5] * 33, [1] * 33), "shape [1, 2, 33]"),
        (np.zeros((1, 1, 2), np.int32), "shape [1, 1, 2]"),
        (np.zeros((2, 2), np.int32), "shape [2, 2]"),
        (words([5, 6], [0, 2]), "end offset 0 after 0"),
        (words([5, 6], [2, 1]), "end offset 1 after 2"),
        (words([5, 6], [3, -1]), "end offset 3 after 0, of 2"),
        (words([5, 6], [-2, 2]), "end offset -2"),
        (words([5, -6], [2, -1]), "id -6"),
    ],
)
@pytest.mark.parametrize("name", ["stop_words_list", "bad_words_list"])
def test_malformed_words_are_refused(bench: Bench, name: str, array: Any, match: str) -> None:
    refused(bench, match, **{name: array})


def test_values_out_of_range_are_refused(bench: Bench) -> None:
    for name, value in (("START", 2), ("END", -1), ("STOP", 3), ("beam_width", 2), ("beam_width", 0)):
        refused(bench, f"{name} is {value}", **{name: value})
    for name in ("temperature", "runtime_top_p", "repetition_penalty"):
        refused(bench, f"{name} is nan", **{name: float("nan")})
    refused(bench, "repetition_penalty is 0.0", repetition_penalty=0.0)
    refused(bench, "input_lengths is 2", input_lengths=one(2, np.uint32))
    refused(bench, "input_embeddings", input_embeddings=np.ones((1, 4), np.int8))


@pytest.mark.parametrize("name", ["input_ids", "input_lengths", "request_output_len"])
def test_a_missing_tensor_is_named(bench: Bench, name: str) -> None:
    sent = request([5])
    sent.inputs = {key: value for key, value in sent.inputs.items() if key != name}
    assert f"{name} missing" in str(bench.send(sent).wait().error)


def test_ready_while_the_engine_is(bench: Bench) -> None:
    assert bench.door.is_ready()
    bench.engine.is_alive = False
    assert not bench.door.is_ready()


def test_the_engine_is_let_go_at_the_end(bench: Bench) -> None:
    bench.door.finalize()
    assert bench.connection.is_closed
