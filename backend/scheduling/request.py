"""One request as the scheduler sees it, and when it is finished. Mutable; only the scheduler writes it."""

import enum
from dataclasses import dataclass, field
from typing import Protocol

from turbotriton.contract.wire import FinishReason, GenerateRequest, RequestTimings, SamplingParams, TokenLogprobs

__all__ = ["Request", "RequestState", "TokenMatcher", "finish_reason_of"]


class TokenMatcher(Protocol):
    """Where a guided request stands in its grammar."""

    def accept(self, token_id: int) -> str | None:
        """Takes the drawn token; returns why the request cannot go on, or None."""

    @property
    def is_complete(self) -> bool:
        """Nothing can follow."""


class RequestState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """Every field is written by the scheduler alone, after construction.

    token_ids: prompt, then output, as far as they are known here
    num_computed_tokens: tokens whose keys and values are in the blocks, by the steps that were taken in
    num_scheduled_tokens: the same when every step that was scheduled has run
    num_in_flight: tokens that scheduled steps draw and nobody has seen yet
    digests: one for each published or matched full block, in order
    prompt_logprobs: of the prompt tokens from the second on, as far as steps that were taken in have seen them; kept when preempted
    """

    owner: object  # who submitted it: a connection, a test
    source: GenerateRequest
    seed: int
    max_new_tokens: int  # resolved against session_len
    rope_theta: float
    chain_root: bytes
    arrival: int  # order of arrival, unique
    arrival_time: float
    burst: int = 0  # requests that came between the same two steps share one; smaller is sooner
    rank: int = 0  # in a burst; smaller is sooner
    state: RequestState = RequestState.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_in_flight: int = 0
    num_joins: int = 0  # times it was given a slot
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission
    block_ids: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    slot: int = -1
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    inter_token_s: float | None = None  # between the two newest tokens
    matcher: TokenMatcher | None = None  # of a guided request, once its grammar is compiled
    sampling: SamplingParams = field(init=False)
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.sampling = self.source.sampling
        self.num_prompt_tokens = len(self.source.prompt_ids)

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def length(self) -> int:
        """Tokens of the sequence, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_asked(self) -> int:
        """New tokens that it asked for and has not got, those in flight not counted; 0 when it named no number, or none is left."""
        return 0 if self.sampling.max_new_tokens is None else self.max_new_tokens + self.num_prompt_tokens - self.length

    @property
    def num_missing(self) -> int:
        """Tokens that steps can compute now: 1 for a decode, more for a prefill, 0 when its last token is in flight."""
        length = len(self.token_ids) + self.num_in_flight
        is_last_drawn = self.num_in_flight and length - self.num_prompt_tokens >= self.max_new_tokens
        return 0 if is_last_drawn else length - self.num_scheduled_tokens

    @property
    def needs_every_token(self) -> bool:
        """What it may draw depends on its last token, so that token must be known before the next is drawn."""
        if self.matcher is not None:
            return True
        sampling = self.sampling
        sequences = sampling.bad_sequences + (sampling.stop_sequences if sampling.min_new_tokens > 0 else ())
        return bool(sequences) and any(len(ids) > 1 for ids in sequences)

    @property
    def is_scored(self) -> bool:
        """Every prompt token whose probability was asked for has one."""
        return self.sampling.prompt_logprobs is None or len(self.prompt_logprobs) == self.num_prompt_tokens - 1

    @property
    def is_held(self) -> bool:
        """It waits for its grammar, outside the queue's order."""
        return self.source.sampling.guided is not None and self.matcher is None

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Smaller is served sooner and preempted later."""
        return (self.source.priority, self.burst, self.rank, self.arrival)

    @property
    def deadline(self) -> float:
        """On the scheduler's clock; infinity without one."""
        deadline_ms = self.source.deadline_ms
        return float("inf") if deadline_ms is None else self.arrival_time + deadline_ms / 1000

    def timings_at(self, now: float) -> RequestTimings:
        """Of a request that ends now."""
        started = now if self.first_scheduled_time is None else self.first_scheduled_time
        first = self.first_token_time
        return RequestTimings(
            queue_s=started - self.arrival_time,
            time_to_first_token_s=None if first is None else first - self.arrival_time,
            e2e_s=now - self.arrival_time,
        )


def finish_reason_of(request: Request, eos_token_ids: tuple[int, ...]) -> tuple[FinishReason | None, bool]:
    """(why the request ends after its newest token, or None; whether that token is an EOS or stop token that texts leave out)."""
    sampling, new = request.sampling, request.num_new_tokens
    last = request.token_ids[-1]
    if new >= sampling.min_new_tokens:
        if last in sampling.stop_token_ids or (not sampling.ignore_eos and last in eos_token_ids):
            return FinishReason.STOP, True
        for sequence in sampling.stop_sequences:
            if new >= len(sequence) and request.token_ids[-len(sequence) :] == list(sequence):
                return FinishReason.STOP, False
    if request.matcher is not None and request.matcher.is_complete:
        return FinishReason.STOP, False
    if new >= request.max_new_tokens:
        return FinishReason.LENGTH, False
    return None, False
