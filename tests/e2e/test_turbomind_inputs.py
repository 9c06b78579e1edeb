"""Every input of the `turbomind` door changes what comes, is refused, or has no effect by LMDeploy's contract: a table, and its test."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .metrics import wait_idle
from .raw_grpc import Input, RawServer, infer_request, outputs_of
from .server import TritonServer

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
IDS = (40, 41, 42, 43)
EOS = 2


def one(name: str, datatype: str, value: Any) -> Input:
    return Input(name, datatype, [1, 1], [value])


def ids_of(*ids: int) -> Input:
    return Input("input_ids", "UINT32", [1, len(ids)], ids)


class Door:
    """Turns of 10 tokens in a session of their own, greedy unless an input says otherwise; the end of the answer is banned."""

    def __init__(self, raw: RawServer) -> None:
        self.raw = raw

    def _request(self, changed: tuple[Input, ...]) -> Any:
        whole = [
            ids_of(*IDS),
            one("input_lengths", "UINT32", len(IDS)),
            one("request_output_len", "UINT32", 10),
            one("CORRID", "UINT64", 500),
            Input("bad_words_list", "INT32", [1, 2, 1], [EOS, 1]),
        ]
        names = {item.name for item in changed}
        return infer_request("turbomind", [item for item in whole if item.name not in names] + list(changed))

    def ask(self, *changed: Input) -> list[int]:
        """The whole sequence that the last response has."""
        sequence: list[int] = []
        for response in self.raw.stream(self._request(changed)):
            assert not response.error_message, response.error_message
            outputs = outputs_of(response.infer_response)
            if outputs:
                sequence = outputs["output_ids"].values[: outputs["sequence_length"].values[0]]
        return sequence

    def refused(self, *changed: Input) -> str:
        return self.raw.refusal(self._request(changed))


@pytest.fixture(scope="module")
def door(demo_server: TritonServer) -> Iterator[Door]:
    with RawServer(demo_server.grpc_url) as raw:
        yield Door(raw)
    wait_idle(demo_server)


def hot(seed: int = 5, temperature: float = 30.0) -> tuple[Input, ...]:
    off = (one("runtime_top_k", "UINT32", 0), one("runtime_top_p", "FP32", 1.0))
    return (*off, one("random_seed", "UINT64", seed), one("temperature", "FP32", temperature))


def but(inputs: tuple[Input, ...], changed: Input) -> tuple[Input, ...]:
    return (*(item for item in inputs if item.name != changed.name), changed)


def _input_ids(door: Door) -> None:
    assert door.ask(ids_of(60, 61, 62, 63))[:4] == [60, 61, 62, 63]


def _input_lengths(door: Door) -> None:
    found = door.ask(one("input_lengths", "UINT32", 2))
    assert (found[:2], len(found)) == (list(IDS[:2]), 12)


def _request_output_len(door: Door) -> None:
    assert [len(door.ask(one("request_output_len", "UINT32", n))) for n in (0, 1, 7)] == [4, 5, 11]


def _step(door: Door) -> None:
    session = one("CORRID", "UINT64", 501)
    kept = door.ask(session, one("END", "INT32", 0))
    goes_on = (session, one("START", "INT32", 0), one("step", "INT32", 6))
    assert door.ask(*goes_on)[:10] == kept[:6] + list(IDS)


def _start(door: Door) -> None:
    assert "failure:  1 " in door.refused(one("START", "INT32", 0), one("CORRID", "UINT64", 502))


def _end(door: Door) -> None:
    session = one("CORRID", "UINT64", 503)
    for end, is_known in ((0, True), (1, False)):
        door.ask(session, one("END", "INT32", end))
        again = (session, one("START", "INT32", 0))
        if is_known:
            assert len(door.ask(*again)) == 28
        else:
            assert "failure:  1 " in door.refused(*again)


def _stop(door: Door) -> None:
    session = one("CORRID", "UINT64", 504)
    door.ask(session, one("END", "INT32", 0))
    stop = (session, one("START", "INT32", 0), one("STOP", "INT32", 1), one("END", "INT32", 0))
    assert "failure:  4 " in door.refused(*stop), "nothing runs that could be stopped"


def _session_id(door: Door) -> None:
    door.ask(one("CORRID", "UINT64", 505), one("END", "INT32", 0))
    assert "failure:  1 " in door.refused(one("CORRID", "UINT64", 506), one("START", "INT32", 0))


def _random_seed(door: Door) -> None:
    assert door.ask(*hot(5)) == door.ask(*hot(5)) != door.ask(*hot(6))


def _makes_greedy(changed: Input) -> Callable[[Door], None]:
    """A hot draw of which the input leaves the likeliest token alone."""

    def check(door: Door) -> None:
        assert door.ask(*hot()) != door.ask() == door.ask(*but(hot(), changed))

    return check


def _temperature(door: Door) -> None:
    assert door.ask(*hot(temperature=30.0)) != door.ask(*hot(temperature=0.001)) == door.ask()


def _changes(changed: Input) -> Callable[[Door], None]:
    def check(door: Door) -> None:
        assert door.ask(changed) != door.ask()

    return check


def _bad_words(door: Door) -> None:
    banned = door.ask()[5]
    assert banned not in door.ask(Input("bad_words_list", "INT32", [1, 2, 2], [EOS, banned, 1, 2]))[4:]


def _stop_words(door: Door) -> None:
    whole = door.ask()
    assert door.ask(Input("stop_words_list", "INT32", [1, 2, 2], [*whole[6:8], 2, -1])) == whole[:8]


def _refuses(changed: Input) -> Callable[[Door], None]:
    def check(door: Door) -> None:
        assert changed.name in door.refused(changed)

    return check


def _without_effect(changed: Input) -> Callable[[Door], None]:
    """LMDeploy's engine reads it over too; its clients send it."""

    def check(door: Door) -> None:
        assert door.ask(changed) == door.ask()
        assert door.ask(*hot(), changed) == door.ask(*hot())

    return check


INPUTS: dict[str, Callable[[Door], None]] = {
    "input_ids": _input_ids,
    "input_lengths": _input_lengths,
    "request_output_len": _request_output_len,
    "step": _step,
    "START": _start,
    "END": _end,
    "STOP": _stop,
    "CORRID": _session_id,
    "random_seed": _random_seed,
    "runtime_top_k": _makes_greedy(one("runtime_top_k", "UINT32", 1)),
    "runtime_top_p": _makes_greedy(one("runtime_top_p", "FP32", 1e-6)),
    "temperature": _temperature,
    "repetition_penalty": _changes(one("repetition_penalty", "FP32", 50.0)),
    "bad_words_list": _bad_words,
    "stop_words_list": _stop_words,
    "beam_width": _refuses(one("beam_width", "UINT32", 2)),
    "input_embeddings": _refuses(Input("input_embeddings", "INT8", [1, 4], [1, 2, 3, 4])),
    "input_embedding_ranges": _refuses(Input("input_embedding_ranges", "UINT32", [1, 1, 2], [0, 1])),
} | {
    item.name: _without_effect(item)
    for item in (
        one("session_len", "UINT32", 5),
        one("beam_search_diversity_rate", "FP32", 0.5),
        one("len_penalty", "FP32", 0.5),
        one("is_return_log_probs", "BOOL", True),
        one("start_id", "UINT32", 44),
        one("end_id", "UINT32", 44),
        one("prompt_learning_task_name_ids", "UINT32", 1),
        one("top_p_decay", "FP32", 0.5),
        one("top_p_min", "FP32", 0.5),
        one("top_p_reset_ids", "UINT32", 44),
    )
}


def test_the_table_names_every_input_of_the_door() -> None:
    config = (ROOT / "model_repository" / "turbomind" / "config.pbtxt").read_text()
    inputs = config.split("input [", 1)[1].split("\noutput [", 1)[0]
    assert set(re.findall(r'name: "(\w+)"', inputs)) == set(INPUTS)


@pytest.mark.parametrize("name", list(INPUTS))
def test_input_is_honoured(name: str, door: Door) -> None:
    INPUTS[name](door)
