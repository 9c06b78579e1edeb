"""What is sent between door and engine arrives unchanged; what is no request is refused."""

import socket

import pytest

from turbotriton.backend.engine.client import EngineClient
from turbotriton.backend.engine.ipc import decode_deltas, decode_request, encode_deltas, encode_request
from turbotriton.contract.errors import InvalidInputError
from turbotriton.contract.wire import FinishReason, GenerateRequest, RequestTimings, SamplingParams, TokenDelta, TokenLogprobs


def test_request_and_deltas_survive_the_frame() -> None:
    sampling = SamplingParams(max_new_tokens=3, stop_sequences=((1, 2), (3,)), stop_token_ids=(4,), seed=2**64 - 1)
    request = GenerateRequest(7, (1, 2, 3), sampling, priority=2, deadline_ms=50)
    assert decode_request(encode_request(request)) == request
    deltas = [
        TokenDelta(1, (5, 6), (TokenLogprobs(-0.5, ((5, -0.5),)), TokenLogprobs(-1.0))),
        TokenDelta(2, (), finish_reason=FinishReason.ERROR, error="away", error_status="UNAVAILABLE"),
        TokenDelta(3, (9,), finish_reason=FinishReason.STOP, stop_token_matched=True, num_prompt_tokens=4,
                   num_cached_tokens=2, timings=RequestTimings(0.1, None, 0.2)),
    ]  # fmt: skip
    assert decode_deltas(encode_deltas(deltas)) == deltas


@pytest.mark.parametrize("damage", [{"unknown": 1}, {"prompt_ids": b"123"}, {"sampling": {}}, {"sampling": None}])
def test_damaged_request_is_refused(damage: dict[str, object]) -> None:
    fields = encode_request(GenerateRequest(7, (1,), SamplingParams()))
    with pytest.raises(InvalidInputError):
        decode_request({**fields, **damage})


def test_an_engine_that_closes_before_it_greets_is_as_one_that_does_not_listen() -> None:
    """A killed process takes connections until the kernel has taken it apart; the launcher then starts another."""
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(OSError, match="before it greeted"):
        EngineClient(ours)


def test_deltas_of_several_tokens_and_none_keep_their_borders() -> None:
    deltas = [
        TokenDelta(3, (1, 2, 3)),
        TokenDelta(4),
        TokenDelta(5, (9,), finish_reason=FinishReason.STOP),
        TokenDelta(6, (7, 8)),
    ]
    assert decode_deltas(encode_deltas(deltas)) == deltas
