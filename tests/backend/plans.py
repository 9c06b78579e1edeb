"""A plan-maker for tests of the runner alone: chunked prefill, decode, joining in waves, preemption by recompute.

Simple on purpose: blocks are handed out in order, the newest request is preempted when the pool is empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from turbotriton.backend.scheduling.plan import JoinedRequest, NewBlocks, ScheduledRow, StepPlan
from turbotriton.contract.wire import SamplingParams


@dataclass
class _Request:
    index: int
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    seed: int
    slot: int = -1
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)


@dataclass
class GenerateOutput:
    token_ids: list[list[int]]
    logprobs: list[list]
    num_preemptions: int
    num_steps: int


def generate(
    runner,
    model,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    *,
    num_new: int,
    chunk: int = 16,
    seeds: Sequence[int] | None = None,
    num_slots: int = 8,
) -> GenerateOutput:
    """Runs all prompts to exactly `num_new` tokens each, at most `chunk` prompt tokens of a request a step."""
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    requests = [
        _Request(i, list(p), len(p), s, seeds[i] if seeds else i) for i, (p, s) in enumerate(zip(prompts, params, strict=True))
    ]
    waiting, running = list(requests), []
    free_blocks, free_slots = list(range(runner.num_blocks)), list(range(num_slots))
    left: list[int] = []
    num_preemptions = step = 0

    def release(request: _Request) -> None:
        running.remove(request)
        left.append(request.slot)
        free_slots.append(request.slot)
        free_blocks.extend(request.blocks)
        request.blocks, request.num_computed, request.slot = [], 0, -1

    while waiting or running:
        joined, rows, new_blocks, planned = [], [], [], []
        for request in list(running):
            if request not in running:
                continue
            num_tokens = min(chunk, len(request.tokens) - request.num_computed)
            need = -(-(request.num_computed + num_tokens) // runner.block_size) - len(request.blocks)
            while need > len(free_blocks) and request in running:
                assert len(running) > 1, "the pool is too small for one request"
                waiting.insert(0, running[-1])
                release(running[-1])
                num_preemptions += 1
            if request not in running:
                continue
            extra = [free_blocks.pop(0) for _ in range(need)]
            if extra:
                new_blocks.append(NewBlocks(request.slot, tuple(extra)))
                request.blocks += extra
            planned.append(request)
        while waiting and free_slots and len(free_blocks) > -(-min(chunk, len(waiting[0].tokens)) // runner.block_size):
            request = waiting.pop(0)
            request.slot = free_slots.pop(0)
            request.blocks = [free_blocks.pop(0) for _ in range(-(-min(chunk, len(request.tokens)) // runner.block_size))]
            joined.append(
                JoinedRequest(
                    slot=request.slot,
                    token_ids=tuple(request.tokens),
                    num_prompt_tokens=request.num_prompt,
                    block_ids=tuple(request.blocks),
                    sampling=request.sampling,
                    seed=request.seed,
                    sample_index=0,
                    rope_theta=model.rope.theta_for(request.num_prompt + num_new),
                )
            )
            running.append(request)
            planned.append(request)
        for request in planned:
            num_tokens = min(chunk, len(request.tokens) - request.num_computed)
            rows.append(
                ScheduledRow(
                    request.slot, request.num_computed, num_tokens, request.num_computed + num_tokens == len(request.tokens)
                )
            )
        plan = StepPlan(step, tuple(left), tuple(joined), tuple(new_blocks), tuple(rows))
        left.clear()
        result = runner.execute(plan)
        assert len(result.token_ids) == sum(row.samples for row in rows)
        drawn = iter(zip(result.token_ids, result.logprobs, strict=True))
        for request, row in zip(planned, rows, strict=True):
            request.num_computed += row.num_tokens
            if row.samples:
                token, logprobs = next(drawn)
                request.tokens.append(token)
                request.logprobs.append(logprobs)
                if len(request.tokens) - request.num_prompt == num_new:
                    release(request)
        step += 1
    if left:
        runner.execute(StepPlan(step, tuple(left)))
    return GenerateOutput([r.tokens[r.num_prompt :] for r in requests], [r.logprobs for r in requests], num_preemptions, step)


def greedy(num_new: int) -> SamplingParams:
    return replace(SamplingParams(), temperature=0.0, max_new_tokens=num_new)
