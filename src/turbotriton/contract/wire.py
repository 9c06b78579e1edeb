"""What travels between a door and the engine: dataclasses only, no encoding (`backend/engine/ipc.py` encodes them).

The engine knows requests, never sessions, texts or chat messages. A request is one sample of one prompt: a door that is
asked for n samples submits n requests that differ in `sample_index` (the prefix cache computes the prompt once).

Invariants
- `request_id` is chosen by the submitting side and unique within its connection.
- Every accepted request gets exactly one `TokenDelta` with `finish_reason` set or `error` set, and it is the last one.
- Token ids in `TokenDelta.token_ids` are deltas, in order, without gaps.
"""

import enum
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import InvalidInputError

__all__ = [
    "EngineInfo",
    "EngineStats",
    "FinishReason",
    "GenerateRequest",
    "RequestTimings",
    "SamplingParams",
    "TokenDelta",
    "TokenLogprobs",
]

MAX_LOGPROBS = 1024
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**64 - 1
MAX_GUIDED_BYTES = 64 * 1024
#: What constrains the output: see `SamplingParams.guided`.
GUIDED_KINDS = ("json_schema", "json_object", "regex", "grammar", "choice")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class FinishReason(enum.Enum):
    """Why a request ended. The value is the text that clients see."""

    STOP = "stop"  # EOS, a stop token id or a stop sequence
    LENGTH = "length"  # max_new_tokens or session_len reached
    CANCELLED = "cancelled"  # the submitting side cancelled
    DEADLINE = "deadline"  # deadline_ms passed
    ERROR = "error"  # see TokenDelta.error


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Defaults are greedy-free: plain sampling from the model's distribution.

    Order per token (LMDeploy's): bad words, temperature, repetition penalty (multiplicative, prompt included), presence and
    frequency penalties (output only), min_new_tokens, top-k, top-p, min-p, draw. `temperature == 0` or `top_k == 1` is greedy.

    Raises InvalidInputError from `__post_init__` when a value is out of range.
    """

    max_new_tokens: int | None = None  # None: what is left of session_len; 0: prefill only
    min_new_tokens: int = 0
    temperature: float = 1.0  # [0, 100]
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1]
    repetition_penalty: float = 1.0  # > 0, 1: off
    presence_penalty: float = 0.0  # [-2, 2]
    frequency_penalty: float = 0.0  # [-2, 2]
    seed: int | None = None  # None: the engine draws one
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # token sequences; strings are matched in the door
    bad_sequences: tuple[tuple[int, ...], ...] = ()  # never completed: the last id is banned after the others
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit before all else)
    ignore_eos: bool = False
    num_logprobs: int | None = None  # None: none; 0: the drawn token's; n: also the n most likely
    prompt_logprobs: int | None = None  # the same of every prompt token after the first; such a prompt is always computed whole
    #: (one of GUIDED_KINDS, its text): JSON schema, "" for json_object, regex, Lark grammar, JSON list of strings. The output follows it.
    guided: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

        def finite(value: float) -> bool:
            return isinstance(value, (int, float)) and math.isfinite(value)

        for name in ("max_new_tokens", "min_new_tokens", "top_k", "seed", "num_logprobs", "prompt_logprobs"):
            may_be_none = name not in ("min_new_tokens", "top_k")
            check(_is_int(getattr(self, name)) or (may_be_none and getattr(self, name) is None), name, "a whole number")
        check(self.max_new_tokens is None or self.max_new_tokens >= 0, "max_new_tokens", "0 or more")
        check(self.min_new_tokens >= 0, "min_new_tokens", "0 or more")
        if self.max_new_tokens is not None:
            check(
                self.min_new_tokens <= self.max_new_tokens,
                "min_new_tokens",
                f"at most max_new_tokens ({self.max_new_tokens})",
            )
        check(finite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "from 0 to 100")
        check(0 <= self.top_k < 2**31, "top_k", "0 (off) or a positive 32-bit count")
        check(finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        check(
            finite(self.repetition_penalty) and 0 < self.repetition_penalty <= 100,
            "repetition_penalty",
            "above 0 and at most 100",
        )
        check(finite(self.presence_penalty) and abs(self.presence_penalty) <= 2, "presence_penalty", "from -2 to 2")
        check(finite(self.frequency_penalty) and abs(self.frequency_penalty) <= 2, "frequency_penalty", "from -2 to 2")
        check(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", "an unsigned 64-bit number")
        for name in ("num_logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            check(count is None or 0 <= count <= MAX_LOGPROBS, name, f"from 0 to {MAX_LOGPROBS}")
        for name in ("stop_sequences", "bad_sequences"):
            check(all(len(seq) > 0 for seq in getattr(self, name)), name, "sequences of at least one token id")
            check(all(_is_int(token_id) for seq in getattr(self, name) for token_id in seq), name, "sequences of whole numbers")
        check(all(_is_int(token_id) for token_id in self.stop_token_ids), "stop_token_ids", "whole numbers")
        check(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
        check(
            all(_is_int(token_id) and finite(bias) and abs(bias) <= 100 for token_id, bias in self.logit_bias),
            "logit_bias",
            "pairs of a token id and a number from -100 to 100",
        )
        if self.guided is not None:
            self._check_guided(self.guided)

    def _check_guided(self, guided: tuple[str, str]) -> None:
        if len(guided) != 2 or guided[0] not in GUIDED_KINDS or not isinstance(guided[1], str):
            raise InvalidInputError(f"guided must be one of {', '.join(GUIDED_KINDS)} and its text")
        size = len(guided[1].encode(errors="surrogatepass"))
        if size > MAX_GUIDED_BYTES:
            raise InvalidInputError(f"guided: the {guided[0]} has {size} bytes; at most {MAX_GUIDED_BYTES} are taken")
        if self.ignore_eos:
            raise InvalidInputError(
                "ignore_eos is true and guided is given; a guided output ends where its grammar ends, drop one"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    request_id: int
    prompt_ids: tuple[int, ...]  # at least one id, each in [0, vocab_size)
    sampling: SamplingParams
    sample_index: int = 0
    priority: int = 0  # lower is admitted sooner; ties as schedule_policy says
    name: str = ""  # the caller's id, for cancel_named across connections; empty: none
    deadline_ms: int | None = None  # from the engine's receipt; then finish_reason DEADLINE


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities of one step in the model's own distribution, before temperature, penalties, bans and filters."""

    token_logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """Seconds on the engine's monotonic clock; sent with the last delta of a request."""

    queue_s: float
    time_to_first_token_s: float | None
    e2e_s: float


class TokenDelta(NamedTuple):  # made for every token: a frozen dataclass takes four times as long
    request_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token id when asked for, else empty
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # when asked for, with the first delta: one a prompt token after the first
    finish_reason: FinishReason | None = None
    stop_token_matched: bool = False  # the last id of token_ids is EOS or a stop id (a text door hides it)
    error: str | None = None  # with finish_reason ERROR: one line
    error_status: str = "INTERNAL"  # the tritonserver status that goes with error
    num_prompt_tokens: int = 0  # set on the last delta
    num_cached_tokens: int = 0  # set on the last delta: prompt tokens found in the prefix cache
    timings: RequestTimings | None = None  # set on the last delta


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a door may rely on after connecting."""

    pid: int
    model_name: str
    vocab_size: int
    session_len: int  # most tokens (prompt + new) in one sequence
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    max_batch_size: int
    block_size: int  # tokens a KV block
    num_blocks: int
    max_queued_requests: int
    max_queued_tokens: int
    device: str
    compute_dtype: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot that the engine sends to each connection a few times a second. Counters grow from the engine's start."""

    num_waiting: int = 0
    num_running: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0  # free or only held by the prefix cache
    num_used_blocks: int = 0  # held by running requests
    num_total_blocks: int = 0
    block_size: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0  # prompt tokens found in the prefix cache
    computed_tokens_total: int = 0  # tokens that went through the model (prefill and decode)
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    requests_total: dict[str, int] = field(default_factory=dict)  # finish reason value -> count
    # observations since the last snapshot, seconds; bounded, the oldest dropped
    ttft_s: tuple[float, ...] = ()
    inter_token_s: tuple[float, ...] = ()
    e2e_s: tuple[float, ...] = ()
