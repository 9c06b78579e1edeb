"""Deltas to responses: coalescing, order, cancellation, and exactly one last response whatever breaks."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from tests.backend.tritonserver.fake_engine import FakeClient
from tests.backend.tritonserver.fake_pb_utils import InferenceResponse, Sender, Tensor, strings

from turbotriton.contract.errors import InvalidInputError, UnavailableError
from turbotriton.contract.wire import FinishReason, GenerateRequest, SamplingParams, TokenDelta


class Recorder:
    """An answer of one response a call; `takes`: the token ids that each call got."""

    def __init__(self) -> None:
        self.takes: list[list[int]] = []
        self.raises: Exception | None = None
        self.num_responses = 1

    def take(self, deltas: Sequence[TokenDelta]) -> tuple[list[Any], bool]:
        self.takes.append([token_id for delta in deltas for token_id in delta.token_ids])
        if self.raises is not None:
            raise self.raises
        responses = [InferenceResponse([Tensor("x", strings("x"))]) for _ in range(self.num_responses)]
        return responses, any(delta.finish_reason is not None for delta in deltas)


class Client:
    """One request: its sender, its answer, its mailbox, opened."""

    def __init__(self, responder: Any, engine: FakeClient, num_samples: int = 1) -> None:
        from turbotriton.backend.tritonserver.responder import Mailbox

        self.responder = responder
        self.sender, self.answer = Sender(), Recorder()
        self.ids = [engine.next_request_id() for _ in range(num_samples)]
        self.mailbox = Mailbox(self.sender, self.answer, engine, self.ids)
        responder.open(self.mailbox)

    def put(self, *token_ids: int, finish: FinishReason | None = None) -> None:
        self.responder.put(self.mailbox, TokenDelta(self.ids[0], token_ids, finish_reason=finish))

    def finish(self, *token_ids: int) -> Sender:
        self.put(*token_ids, finish=FinishReason.LENGTH)
        return self.sender.wait()


@pytest.fixture
def engine() -> FakeClient:
    return FakeClient()


@pytest.fixture
def responder() -> Iterator[Any]:
    from turbotriton.backend.tritonserver.responder import Responder

    responder = Responder()
    yield responder
    responder.close(timeout_s=0.5)


@pytest.fixture
def client(responder: Any, engine: FakeClient) -> Client:
    return Client(responder, engine)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_all_that_waits_goes_out_in_one_response(client: Client) -> None:
    client.sender.gate.clear()
    client.put(1)
    assert client.sender.is_sending.wait(10)
    for token_id in (2, 3, 4):
        client.put(token_id)
    client.put(5, finish=FinishReason.LENGTH)
    client.sender.gate.set()
    client.sender.wait()
    assert client.answer.takes == [[1], [2, 3, 4, 5]]
    assert [flags for _, flags in client.sender.sent] == [0, 1]


def test_only_the_last_of_several_responses_is_final(client: Client) -> None:
    client.answer.num_responses = 3
    assert [flags for _, flags in client.finish(1).sent] == [0, 0, 1]


def test_an_answer_without_a_last_response_ends_with_a_bare_final(client: Client) -> None:
    client.answer.num_responses = 0
    assert client.finish(1).sent == [(None, 1)]


def test_a_first_delta_overtakes_later_ones(responder: Any, engine: FakeClient) -> None:
    from turbotriton.backend.tritonserver.responder import NUM_SENDERS

    order: list[str] = []
    started = Client(responder, engine)
    started.put(1)
    wait_until(lambda: started.mailbox.has_sent)
    stuck = [Client(responder, engine) for _ in range(NUM_SENDERS)]
    for other in stuck:
        other.sender.gate.clear()
        other.put(1)
    assert all(other.sender.is_sending.wait(10) for other in stuck)
    new = Client(responder, engine)
    for name, one in (("started", started), ("new", new)):
        take = one.answer.take
        one.answer.take = lambda deltas, name=name, take=take: order.append(name) or take(deltas)
        one.put(2, finish=FinishReason.LENGTH)
    stuck[0].sender.gate.set()
    started.sender.wait()
    new.sender.wait()
    assert order == ["new", "started"]
    for other in stuck:
        other.sender.gate.set()
        other.finish()


def test_a_client_that_has_gone_is_cancelled_once_in_all_its_samples(responder: Any, engine: FakeClient) -> None:
    client = Client(responder, engine, num_samples=3)
    client.sender.is_client_gone = True
    wait_until(lambda: len(engine.cancelled) == 3)
    time.sleep(0.15)  # three more rounds
    assert engine.cancelled == client.ids
    client.finish()


def test_an_ended_request_is_polled_no_more(client: Client, responder: Any) -> None:
    wait_until(lambda: client.sender.num_polls > 0)
    client.finish()
    polls = client.sender.num_polls  # the sender itself fails a poll after FINAL
    time.sleep(0.15)
    assert client.sender.num_polls == polls
    assert responder.num_open == 0


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InvalidInputError("bad value"), "INVALID_ARG", "INVALID_ARG: bad value"),
        (UnavailableError("queue full"), "UNAVAILABLE", "UNAVAILABLE: queue full"),
        (ValueError("a mistake of ours"), "INTERNAL", "INTERNAL: the door failed: a mistake of ours"),
    ],
)
def test_an_error_is_one_last_response_and_stops_the_engine(
    client: Client, engine: FakeClient, error: Exception, code: str, text: str
) -> None:
    client.answer.raises = error
    client.put(1)
    sender = client.sender.wait()
    assert [flags for _, flags in sender.sent] == [1]
    assert (sender.error.code, str(sender.error)) == (code, text)
    assert engine.cancelled == client.ids


def test_deltas_after_the_end_are_dropped(client: Client) -> None:
    client.answer.raises = InvalidInputError("bad value")
    client.put(1)
    client.sender.wait()
    client.put(2, finish=FinishReason.CANCELLED)
    time.sleep(0.05)
    assert client.answer.takes == [[1]]


def test_a_response_that_cannot_be_sent_stops_the_engine_and_ends_with_the_last_delta(client: Client, engine: FakeClient) -> None:
    client.sender.fails = True
    client.put(1)
    assert engine.has_cancelled.wait(10), "or the engine would generate for nobody"
    client.sender.fails = False
    sender = client.finish(2)
    assert client.answer.takes == [[1], [2]], "the answer sees the end: a session must become idle"
    assert sender.sent == [(None, 1)]
    assert client.responder.num_open == 0


def test_a_sender_that_always_fails_harms_nobody_else(responder: Any, engine: FakeClient) -> None:
    from turbotriton.backend.tritonserver.responder import NUM_SENDERS

    for _ in range(NUM_SENDERS + 1):  # each could take a sender thread with it
        broken = Client(responder, engine)
        broken.sender.fails = True
        broken.put(1)
        broken.put(2, finish=FinishReason.CANCELLED)
    wait_until(lambda: responder.num_open == 0)
    assert Client(responder, engine).finish(1).responses


def test_an_engine_that_is_gone_answers_through_the_mailbox(client: Client, engine: FakeClient, responder: Any) -> None:
    engine.is_alive = False
    seen: list[TokenDelta] = []
    take = client.answer.take
    client.answer.take = lambda deltas: seen.extend(deltas) or take(deltas)
    responder.submit(client.mailbox, GenerateRequest(client.ids[0], (1,), SamplingParams()))
    client.sender.wait()
    assert [(delta.finish_reason, delta.error_status) for delta in seen] == [(FinishReason.ERROR, "UNAVAILABLE")]


def test_close_sends_what_waits_and_ends_the_threads(engine: FakeClient) -> None:
    from turbotriton.backend.tritonserver.responder import Responder

    responder = Responder()
    clients = [Client(responder, engine) for _ in range(8)]
    for client in clients:
        client.put(1, finish=FinishReason.CANCELLED)
    responder.close(timeout_s=60)
    assert all(client.sender.is_final.is_set() for client in clients)
    assert not any(thread.is_alive() for thread in responder._threads)
