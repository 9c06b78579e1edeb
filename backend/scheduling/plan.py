"""What the scheduler tells the model runner to do in one step, and what it gets back. Plain data, no torch.

The plan carries differences: a request *joins* a slot once with all it needs, gains blocks, runs, and *leaves*. Between
those the runner keeps the request's state (token ids, position, block table, sampling state) by slot on the device and advances
it itself, so a decode row costs one small record.

Order inside `ModelRunner.execute(plan)`: leave, join, add blocks, run the rows, sample.
A preempted request leaves its slot and joins again later with `token_ids` = prompt + what it has produced.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from turbotriton.contract.wire import SamplingParams, TokenLogprobs

__all__ = ["JoinedRequest", "NewBlocks", "ScheduledRow", "StepPlan", "StepResult", "TokenMasks", "token_budget"]

DEFAULT_TOKEN_BUDGET = {"cpu": 512, "cuda": 8192}


def token_budget(num_tokens_per_iter: int, device: str) -> int:
    """Most tokens of a step; num_tokens_per_iter: EngineConfig's, 0 for what its kind of device, such as "cuda:1", has by default."""
    return num_tokens_per_iter or DEFAULT_TOKEN_BUDGET[device.split(":")[0]]


class TokenMasks(Protocol):
    """Which tokens the guided rows of a step may draw; filled by another thread while the forward runs."""

    slots: tuple[int, ...]

    def wait(self) -> npt.NDArray[np.int32]:
        """[num_slots, ceil(vocab_size / 32)]: bit i % 32 of word i // 32 says whether token i may come."""


@dataclass(frozen=True, slots=True)
class JoinedRequest:
    slot: int  # in [0, max_batch_size), free until now
    token_ids: tuple[int, ...]  # every token known: prompt, then tokens already produced (after a preemption)
    num_prompt_tokens: int
    block_ids: tuple[int, ...]  # blocks in sequence order; cached prefix blocks first
    sampling: SamplingParams
    seed: int  # resolved: never None
    sample_index: int
    rope_theta: float  # RopeConfig.theta_for(limit length of this request)


@dataclass(frozen=True, slots=True)
class NewBlocks:
    slot: int
    block_ids: tuple[int, ...]  # appended to the slot's block table


class ScheduledRow(NamedTuple):
    """Compute tokens [start, start + num_tokens) of the slot's sequence; KV of [0, start) is in its blocks already.

    Prefill chunk: the ids come from `JoinedRequest.token_ids`. Decode: num_tokens == 1 and the id is the one sampled last.
    `samples`: the row reaches the end of the known tokens, so its last logits are sampled; the token is appended to the slot.
    """

    slot: int
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    step: int
    left: tuple[int, ...] = ()  # slots
    joined: tuple[JoinedRequest, ...] = ()
    new_blocks: tuple[NewBlocks, ...] = ()
    rows: tuple[ScheduledRow, ...] = ()
    masks: TokenMasks | None = None  # None: no guided row is sampled

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepResult:
    """token_ids and logprobs are aligned with the plan's sampling rows, in their order."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = field(default=())  # None where the request asked for none
    #: By index of a row, where its request asked for them: of the prompt tokens at start + 1, start + 2, ...
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
