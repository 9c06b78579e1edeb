"""Which tokens of which requests the next step computes. Pure Python: no torch, no clock of its own, no sockets.

    add ──> WAITING ──admit──> RUNNING ──update──> FINISHED
               ^                  │
               └────preempt───────┘   blocks given back, everything known is computed again (prefix cache permitting)

One step, in `schedule`:
  1. Requests past their deadline end.
  2. Running requests in order of service (`Request.order`): a decode takes one token of the budget, a prefill a chunk. All decodes
     come before all chunks, so a long prompt never delays a running answer by more than one step. Beside decodes a step takes fewer
     tokens than its budget, since those who wait for their next token wait as long as it takes (`_budget_beside`). A request that
     needs a block when none is free makes the last in order give up its blocks; if that is itself, it waits. In the plan the longest
     decodes stand first: attention's programs start in that order, and short ones fill the gaps at its end.
  3. Waiting requests in order, while a slot, budget and blocks for all their known tokens are there. The first that does not fit
     holds back those behind it: nobody starves (with lof, while longer ones come, those that may give less wait; who has begun goes
     before all of them).

Order, within a priority: who came first; of those that came between the same two steps, a burst, whoever has begun and then whoever may
give the most tokens. A burst ends when its longest answer does, so the long ones begin first, and the prompts of the short ones ride along
with their decodes. With `schedule_policy` lof all that wait count as one burst.

Invariants
- A running request holds blocks for at least its known tokens; a waiting or finished one holds none and has no slot.
- Tokens not yet computed: one for a decode, more for a prefill. A row that reaches the last token is sampled, unless the request
  asked for no new token.
- `schedule` may be called again before the last plan's result is known: it then counts on that step's tokens, which the device has
  and this side has not (`num_in_flight`). `update` takes results in the order of the plans. A row whose request ended or lost its
  slot meanwhile is passed over: what it computed lies in blocks that their next holder writes before it reads.
- Every added request ends in exactly one TokenDelta with a finish reason.
"""

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from turbotriton.contract.errors import InvalidInputError, TurbotritonError
from turbotriton.contract.ini import EngineConfig, ModelConfig
from turbotriton.contract.wire import FinishReason, GenerateRequest, TokenDelta

from .admission import check_queue, max_new_tokens_of
from .block_manager import BlockManager, chain_digest
from .plan import JoinedRequest, NewBlocks, ScheduledRow, StepPlan, StepResult
from .request import Request, RequestState, TokenMatcher, finish_reason_of

__all__ = ["PREFILL_BESIDE_DECODES", "OwnedDelta", "Scheduler"]

#: Matrix products of so many rows fill a GPU with whole tiles, where a few rows more would begin a new wave of them.
PREFILL_BESIDE_DECODES = 2048
STARTED = -(1 << 62)  # first of the ranks of requests that have had a slot, which no longer ones hold up
QUEUE_SHARE = 4  # of the prompt tokens that wait, a step beside decodes takes one in so many


class OwnedDelta(NamedTuple):
    request: Request
    delta: TokenDelta


class Scheduler:
    """`token_budget`: most tokens a step. `clock`: monotonic seconds. `draw_seed`: a 64-bit seed for requests without one.
    `beside_decodes`: most tokens of a step where decodes are not the minority, see `_budget_beside`."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        blocks: BlockManager,
        token_budget: int,
        clock: Callable[[], float],
        draw_seed: Callable[[], int],
        beside_decodes: int = PREFILL_BESIDE_DECODES,
    ) -> None:
        self._model = model
        self._config = config
        self.blocks = blocks
        self._token_budget = max(token_budget, 1)
        self._clock = clock
        self._draw_seed = draw_seed
        self._all_one_burst = config.schedule_policy == "lof"
        self._beside_decodes = beside_decodes
        self._waiting: list[tuple[tuple[int, ...], Request]] = []  # heap; finished entries are dropped when met
        self._running: list[Request] = []  # in order of service
        self._requests: dict[tuple[object, int], Request] = {}
        self._free_slots = list(range(config.max_batch_size - 1, -1, -1))
        self._left_slots: list[int] = []  # told to the runner with the next plan
        self._in_flight: deque[list[tuple[Request, int]]] = deque()  # of each plan not taken in: its rows' request and num_joins
        self._num_arrived = 0
        self._num_begun = 0
        self._num_steps = 0
        self._has_deadlines = False
        self._num_guided = 0  # requests of any state
        self._num_held = 0  # of num_waiting: their grammars are being compiled
        self.num_waiting = 0
        self.num_waiting_tokens = 0
        self.num_preemptions = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._running) or self.num_waiting > self._num_held or bool(self._left_slots)

    @property
    def needs_every_token(self) -> bool:
        """A running request's next draw depends on a token in flight: take that step in before the next is scheduled."""
        return any(request.num_in_flight and request.needs_every_token for request in self._running)

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def add(self, owner: object, source: GenerateRequest) -> Request:
        """Queues a request; a guided one is held until `release`, and those behind it pass.

        Raises InvalidInputError when it can never run, UnavailableError when the queue is full.
        """
        if (owner, source.request_id) in self._requests:
            raise InvalidInputError(f"request id {source.request_id} is in use on this connection")
        max_new_tokens = max_new_tokens_of(source, self._model, self._config, self.blocks)
        check_queue(source, self._config, self.num_waiting, self.num_waiting_tokens)
        limit_len = len(source.prompt_ids) + max_new_tokens
        rope_theta = self._model.rope.theta_for(limit_len)
        seed = source.sampling.seed
        request = Request(
            owner=owner,
            source=source,
            seed=self._draw_seed() if seed is None else seed,
            max_new_tokens=max_new_tokens,
            rope_theta=rope_theta,
            chain_root=f"{rope_theta!r} kv{self._config.quant_policy}".encode()[:64],
            arrival=self._num_arrived,
            arrival_time=self._clock(),
            burst=0 if self._all_one_burst else self._num_steps,
            rank=-(self._config.session_len if source.sampling.max_new_tokens is None else max_new_tokens),
            token_ids=list(source.prompt_ids),
        )
        self._num_arrived += 1
        self._has_deadlines |= source.deadline_ms is not None
        self._requests[owner, source.request_id] = request
        self._num_guided += source.sampling.guided is not None
        self._queue(request)
        return request

    def release(self, request: Request, matcher: TokenMatcher) -> None:
        """The held request's grammar is compiled: it takes its place in the queue."""
        self._num_held -= 1
        request.matcher = matcher
        heapq.heappush(self._waiting, (request.order, request))

    def refuse(self, request: Request, error: TurbotritonError) -> OwnedDelta:
        """Ends a held or running request with an error."""
        request, delta = self._finish(request, FinishReason.ERROR)
        return OwnedDelta(request, delta._replace(error=str(error), error_status=error.triton_status))

    def refuse_all(self, error: TurbotritonError) -> list[OwnedDelta]:
        return [self.refuse(request, error) for request in list(self._requests.values())]

    def matchers_of(self, plan: StepPlan) -> list[tuple[int, TokenMatcher]]:
        """(slot, matcher) of each guided row that the plan samples."""
        if not self._num_guided:
            return []
        sampled = {row.slot for row in plan.rows if row.samples}
        return [(r.slot, r.matcher) for r in self._running if r.matcher is not None and r.slot in sampled]

    def cancel(self, owner: object, request_id: int) -> OwnedDelta | None:
        """Ends a request in any state; its blocks are free when this returns. None when it has ended before."""
        request = self._requests.get((owner, request_id))
        return None if request is None else self._finish(request, FinishReason.CANCELLED)

    def cancel_all(self, owner: object) -> list[OwnedDelta]:
        mine = [request for (of, _), request in self._requests.items() if of == owner]
        return [self._finish(request, FinishReason.CANCELLED) for request in mine]

    def cancel_named(self, name: str) -> list[OwnedDelta]:
        named = [request for request in self._requests.values() if name and request.source.name == name]
        return [self._finish(request, FinishReason.CANCELLED) for request in named]

    def expire(self) -> list[OwnedDelta]:
        """Ends requests past their deadline."""
        if not self._has_deadlines:
            return []
        now = self._clock()
        late = [r for r in self._requests.values() if r.deadline <= now]
        self._has_deadlines = any(r.source.deadline_ms is not None for r in self._requests.values())
        return [self._finish(request, FinishReason.DEADLINE) for request in late]

    def _queue(self, request: Request) -> None:
        if request.is_held:
            self._num_held += 1
        else:
            heapq.heappush(self._waiting, (request.order, request))
        self.num_waiting += 1
        self.num_waiting_tokens += len(request.token_ids)

    def _unqueue(self, request: Request) -> None:
        """Off the count; its heap entry goes when it is met, or with the others when ended ones are the most."""
        if len(self._waiting) > 2 * self.num_waiting + 64:
            self._waiting = [
                entry for entry in self._waiting if entry[1].state is RequestState.WAITING and entry[1] is not request
            ]
            heapq.heapify(self._waiting)
        self.num_waiting -= 1
        self.num_waiting_tokens -= len(request.token_ids)

    def _give_up_slot(self, request: Request) -> None:
        self._running.remove(request)
        self._left_slots.append(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1
        self.blocks.release(request.block_ids)
        request.block_ids = []

    def _finish(
        self, request: Request, reason: FinishReason, token_ids: tuple[int, ...] = (), *, stop_token_matched: bool = False
    ) -> OwnedDelta:
        if request.state is RequestState.RUNNING:
            self._give_up_slot(request)
        elif request.state is RequestState.WAITING:
            self._unqueue(request)
            self._num_held -= request.is_held
        request.state = RequestState.FINISHED
        self._num_guided -= request.sampling.guided is not None
        del self._requests[request.owner, request.source.request_id]
        delta = TokenDelta(
            request_id=request.source.request_id,
            token_ids=token_ids,
            finish_reason=reason,
            stop_token_matched=stop_token_matched,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
            timings=request.timings_at(self._clock()),
        )
        return OwnedDelta(request, delta)

    # -- one step -----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next step. Empty rows mean that nothing can run (the plan may still tell of slots that were left)."""
        budget = self._token_budget
        rows: list[ScheduledRow] = []
        joined: list[JoinedRequest] = []
        new_blocks: list[NewBlocks] = []
        missing = [(request, request.num_missing) for request in self._running]
        decodes = [request for request, num_tokens in missing if num_tokens == 1]
        chunks = [request for request, num_tokens in missing if num_tokens > 1]
        picked: list[Request] = []
        for request in decodes:
            if budget and request.state is RequestState.RUNNING and self._ensure_blocks(request, new_blocks):
                picked.append(request)
                budget -= 1
        # a later decode may have preempted an earlier pick
        picked = [request for request in picked if request.state is RequestState.RUNNING]
        picked.sort(key=_num_scheduled, reverse=True)
        rows += [self._row(request, 1) for request in picked]
        if rows and (chunks or self._free_slots):
            budget = min(budget, self._budget_beside(picked, chunks))
        for request in chunks:
            if budget and request.state is RequestState.RUNNING:
                picked.append(request)
                rows.append(self._row(request, budget))
                budget -= rows[-1].num_tokens
        while budget and self._free_slots and (admitted := self._next_admissible()) is not None:
            joined.append(self._join(admitted))
            picked.append(admitted)
            rows.append(self._row(admitted, budget))
            budget -= rows[-1].num_tokens
        self._in_flight.append([(request, request.num_joins) for request in picked])
        left, self._left_slots = tuple(self._left_slots), []
        new_blocks = [added for added in new_blocks if added.slot not in left]
        self._num_steps += 1
        return StepPlan(self._num_steps, left, tuple(joined), tuple(new_blocks), tuple(rows))

    def _budget_beside(self, decodes: list[Request], chunks: list[Request]) -> int:
        """Prompt tokens that a step takes beside `decodes`, at least one; `chunks`: requests whose prompts are being computed.

        Half of `beside_decodes`, decodes included, where the next prompt's answer, begun after the steps that its prompt takes so, ends
        before the longest of the decodes' by what both asked for: the weights are read for that one in any case. Otherwise a later start is
        a later end: while more requests wait for their first token than decode, all; then `beside_decodes`, or a quarter of a long queue.
        Prompts get half of each at least.
        """
        following = chunks[0] if chunks else self._first_waiting()
        if following is None:
            return self._token_budget
        most = self._beside_decodes
        spread = max(most // 2 - len(decodes), most // 4, 1)
        num_steps = following.num_missing // spread
        if 0 < following.num_asked < max(request.num_asked for request in decodes) - num_steps:
            return spread
        if len(decodes) < len(chunks) + self.num_waiting - self._num_held:
            return self._token_budget
        num_waiting_tokens = self.num_waiting_tokens + sum(request.num_missing for request in chunks)
        return max(max(most, num_waiting_tokens // QUEUE_SHARE) - len(decodes), most // 2, 1)

    def _row(self, request: Request, budget: int) -> ScheduledRow:
        start, length = request.num_scheduled_tokens, request.length
        num_tokens = min(length - start, budget)
        samples = start + num_tokens == length and request.max_new_tokens > 0
        request.num_scheduled_tokens += num_tokens
        request.num_in_flight += samples
        return ScheduledRow(request.slot, start, num_tokens, samples)

    def _ensure_blocks(self, request: Request, new_blocks: list[NewBlocks]) -> bool:
        """Gives `request` the block its next token needs, preempting from the end of the order. False: it was preempted itself."""
        if self.blocks.blocks_for(request.length) <= len(request.block_ids):
            return True
        while not self.blocks.num_free_blocks:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        added = self.blocks.allocate(1)
        request.block_ids += added
        new_blocks.append(NewBlocks(request.slot, tuple(added)))
        return True

    def _preempt(self, victim: Request) -> None:
        self._give_up_slot(victim)
        victim.state = RequestState.WAITING
        victim.num_computed_tokens = victim.num_scheduled_tokens = victim.num_in_flight = 0
        victim.digests = []
        self.num_preemptions += 1
        self._queue(victim)

    def _first_waiting(self) -> Request | None:
        """Next in order; what has ended meanwhile is dropped."""
        while self._waiting and self._waiting[0][1].state is not RequestState.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _next_admissible(self) -> Request | None:
        """The first waiting request, if its blocks are there; it is taken off the queue and holds them."""
        request = self._first_waiting()
        if request is None:
            return None
        cached, digests = self.blocks.match_prefix(request.chain_root, request.token_ids) if request.is_scored else ([], [])
        missing = self.blocks.blocks_for(len(request.token_ids)) - len(cached)
        if missing > self.blocks.num_free_blocks - self.blocks.num_free_among(cached):
            return None
        heapq.heappop(self._waiting)
        self._unqueue(request)
        self.blocks.hold(cached)
        request.block_ids = cached + self.blocks.allocate(missing)
        request.digests = digests
        request.num_computed_tokens = request.num_scheduled_tokens = len(cached) * self.blocks.block_size
        return request

    def _join(self, request: Request) -> JoinedRequest:
        request.state = RequestState.RUNNING
        if not request.num_joins:
            request.rank = STARTED + self._num_begun
            self._num_begun += 1
        request.slot = self._free_slots.pop()
        request.num_joins += 1
        at = len(self._running)
        while at and self._running[at - 1].order > request.order:
            at -= 1
        self._running.insert(at, request)
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached_tokens = request.num_computed_tokens
            self.num_cached_tokens += request.num_computed_tokens
        return JoinedRequest(
            slot=request.slot,
            token_ids=tuple(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            block_ids=tuple(request.block_ids),
            sampling=request.sampling,
            seed=request.seed,
            sample_index=request.source.sample_index,
            rope_theta=request.rope_theta,
        )

    def update(self, plan: StepPlan, result: StepResult) -> list[OwnedDelta]:
        """Takes in what the runner drew for `plan`, the oldest that was not taken in."""
        deltas: list[OwnedDelta] = []
        drawn, now = iter(range(len(result.token_ids))), self._clock()
        for index, (row, (request, num_joins)) in enumerate(zip(plan.rows, self._in_flight.popleft(), strict=True)):
            at = next(drawn) if row.samples else -1
            if request.state is not RequestState.RUNNING or request.num_joins != num_joins:
                continue
            request.num_computed_tokens += row.num_tokens
            self.num_computed_tokens += row.num_tokens
            if index in result.prompt_logprobs:  # after a preemption some of them are known
                request.prompt_logprobs += result.prompt_logprobs[index][len(request.prompt_logprobs) - row.start :]
            if self.blocks.enable_prefix_caching:
                self._publish_full_blocks(request)
            if row.samples:
                request.num_in_flight -= 1
                deltas.append(self._append(request, result, at, now))
            elif request.num_computed_tokens == len(request.token_ids):
                owned = self._finish(request, FinishReason.LENGTH)  # asked for no new token
                deltas.append(_with(owned, prompt_logprobs=tuple(request.prompt_logprobs)))
        return deltas

    def _append(self, request: Request, result: StepResult, at: int, now: float) -> OwnedDelta:
        """Number `at` of the drawn tokens, seen at `now`."""
        token_id = result.token_ids[at]
        request.token_ids.append(token_id)
        previous, request.last_token_time = request.last_token_time, now
        if request.first_token_time is None:
            request.first_token_time = now
        request.inter_token_s = None if previous is None else now - previous
        outside = None if request.matcher is None else request.matcher.accept(token_id)
        if outside is not None:
            return self.refuse(request, InvalidInputError(outside))
        reason, stop_token_matched = finish_reason_of(request, self._model.eos_token_ids)
        if reason is None:
            owned = OwnedDelta(request, TokenDelta(request.source.request_id, (token_id,)))
        else:
            owned = self._finish(request, reason, (token_id,), stop_token_matched=stop_token_matched)
        logprobs = result.logprobs[at] if result.logprobs else None
        if logprobs is not None:
            owned = _with(owned, logprobs=(logprobs,))
        if request.prompt_logprobs and request.num_new_tokens == 1:
            owned = _with(owned, prompt_logprobs=tuple(request.prompt_logprobs))
        return owned

    def _publish_full_blocks(self, request: Request) -> None:
        size = self.blocks.block_size
        while (len(request.digests) + 1) * size <= request.num_computed_tokens:
            index = len(request.digests)
            parent = request.digests[-1] if request.digests else request.chain_root
            request.digests.append(chain_digest(parent, request.token_ids[index * size : (index + 1) * size]))
            self.blocks.publish(request.block_ids[index], request.digests[-1])


def _num_scheduled(request: Request) -> int:
    return request.num_scheduled_tokens


def _with(owned: OwnedDelta, **fields: Any) -> OwnedDelta:
    return OwnedDelta(owned.request, owned.delta._replace(**fields))
