"""Steps that make triton compile every kernel variant that requests can need, so that none is compiled while one waits.

What chooses a variant (ops/kernels/tuning.py): how many tokens a linear layer sees (one to four each have their own, then powers of two
and what lies between two kernels' spans), how many rows are sampled, how the draw is made, and for decodes their number and whether
the longest context is worth splitting. Decodes alone may replay graphs that were captured before; beside a chunk, or a token that gives
none, their attention is launched.
The keys that the steps write lie in blocks that nobody holds yet: whoever is given them writes before it reads.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from turbotriton.backend.scheduling.plan import JoinedRequest, ScheduledRow, StepPlan
from turbotriton.contract.wire import SamplingParams

__all__ = ["DECODE_COUNTS", "TOKEN_COUNTS", "warm_up_plans"]

#: Rows of a matrix product: some of every span that has a kernel of its own, of ours or of others.
TOKEN_COUNTS = (1, 2, 3, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 1024)
#: Decodes of a step, four to an octave: attention's tiles and splits change with their number, by a third or more at a time, at numbers
#: that depend on the heads and the device (ops/kernels/attention_tuning.py).
DECODE_COUNTS = (*range(1, 8), *((4 + step) << octave for octave in range(1, 9) for step in range(4)))
#: Of a decode: one that is never split, and one that is wherever splitting pays. Longer ones only take longer.
CONTEXTS = (2, 1024)
GREEDY = SamplingParams(temperature=0.0)


def _draws() -> Iterator[SamplingParams]:
    """Every way to draw that runs kernels of its own: what shapes logits, each with the widest filter and without a draw."""
    penalties: tuple[dict[str, Any], ...] = ({}, {"repetition_penalty": 1.1})
    entries: tuple[dict[str, Any], ...] = ({}, {"logit_bias": ((3, 1.0),)}, {"bad_sequences": ((3,),)})
    for penalty, entry in itertools.product(penalties, entries):
        yield SamplingParams(temperature=0.0, **penalty, **entry)
        yield SamplingParams(temperature=0.7, top_p=0.9, **penalty, **entry)
    yield SamplingParams(temperature=0.0, num_logprobs=2)


def warm_up_plans(
    decode_sizes: Sequence[int], session_len: int, block_size: int, num_blocks: int
) -> Iterator[tuple[StepPlan, ...]]:
    """Each group of plans is run in its order and leaves every slot free. decode_sizes: rising, the last is the number of slots."""
    max_batch_size = decode_sizes[-1]
    steps = itertools.count(-1, -1)
    longest = min(session_len, num_blocks * block_size)

    def joined(slot: int, num_tokens: int, way: SamplingParams) -> JoinedRequest:
        needed = -(-(num_tokens + 1) // block_size)
        blocks = tuple(range(num_blocks - min(needed, num_blocks), num_blocks))
        return JoinedRequest(slot, (1,) * num_tokens, num_tokens, blocks, way, 0, 0, 1e4)

    def group(requests: Sequence[JoinedRequest], *steps_of_rows: Sequence[ScheduledRow]) -> tuple[StepPlan, ...]:
        first, *others = (tuple(rows) for rows in steps_of_rows)
        plans = [StepPlan(next(steps), joined=tuple(requests), rows=first)]
        plans += [StepPlan(next(steps), rows=rows) for rows in others]
        return (*plans, StepPlan(next(steps), left=tuple(request.slot for request in requests)))

    def whole(requests: Sequence[JoinedRequest], *, samples: bool = True) -> list[ScheduledRow]:
        return [ScheduledRow(request.slot, 0, len(request.token_ids), samples) for request in requests]

    yield group([joined(0, 2, GREEDY)], [ScheduledRow(0, 0, 1, False)])  # a chunk that the budget cut to one token
    most = max_batch_size * max(longest - 1, 1)
    for num_tokens in sorted({min(count, most) for count in TOKEN_COUNTS[1:]}):
        num_chunks = -(-num_tokens // max(longest - 1, 1))  # prompts may be shorter than what several of them bring to a step
        lengths = [num_tokens // num_chunks + (slot < num_tokens % num_chunks) for slot in range(num_chunks)]
        some = [joined(slot, length, GREEDY) for slot, length in enumerate(lengths)]
        yield group(some, whole(some, samples=num_chunks > 1))  # one that samples would replay a graph of more tokens
    for way in _draws():
        yield group(some := [joined(0, 2, way)], whole(some))
    everyone = [joined(slot, 2, GREEDY) for slot in range(max_batch_size)]  # once: a join is a dozen launches
    sampled = [whole(everyone[:size]) for size in (*(size for size in TOKEN_COUNTS[1:] if size < max_batch_size), max_batch_size)]
    starts = sorted({min(context, longest) - 1 for context in CONTEXTS})  # nothing was computed there: the keys are zeros
    sizes = sorted({*decode_sizes, *(size for size in DECODE_COUNTS if size < max_batch_size)})
    decodes = [
        [*(ScheduledRow(slot, start, 1, True) for slot in range(size)), *whole(everyone[size : size + 1])]
        for size, start in itertools.product(sizes, starts)
    ]  # the last, in all slots, may replay a graph; beside a token that gives none it does not
    decodes += [[ScheduledRow(slot, start, 1, slot > 0) for slot in range(max_batch_size)] for start in starts]
    yield group(everyone, *sampled, *decodes)
