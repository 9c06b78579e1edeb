"""One engine: scheduler and model runner, stepped from one thread. It knows owners of requests, not how they are reached.

    add / cancel  ->  step: schedule -> launch -> collect -> update  ->  deltas by owner

On a GPU a step is launched before the one before it is collected, so the host plans and hands on while the device computes:

    host     | schedule n | launch n | collect, update n - 1 | schedule n + 1 | launch n + 1 | collect, update n | ...
    device        ... step n - 1 ... | ........... step n ........... | ........... step n + 1 ...

All methods must be called from the same thread (`loop.py` sees to that).
"""

import dataclasses
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from turbotriton.backend.scheduling.block_manager import BlockManager
from turbotriton.backend.scheduling.plan import StepPlan, StepResult, token_budget
from turbotriton.backend.scheduling.request import Request, RequestState
from turbotriton.backend.scheduling.scheduler import PREFILL_BESIDE_DECODES, OwnedDelta, Scheduler
from turbotriton.contract.errors import InvalidInputError, TurbotritonError
from turbotriton.contract.ini import EngineConfig, ModelConfig
from turbotriton.contract.wire import EngineInfo, EngineStats, GenerateRequest, TokenDelta

if TYPE_CHECKING:  # doors import this module and need no llguidance
    from .guided import Grammars, MaskFiller, Matcher

__all__ = ["DeltasByOwner", "Engine", "Runner", "load_engine"]

logger = logging.getLogger(__name__)

MAX_OBSERVATIONS = 4096  # between two snapshots; the oldest are dropped

MAX_COMPILE_S = 10.0  # a grammar; the compiler's limits end it long before

DeltasByOwner = dict[object, list[TokenDelta]]


class Runner(Protocol):
    """What the engine needs of `backend.runner.model_runner.ModelRunner`."""

    num_blocks: int
    block_size: int
    device: str
    compute_dtype: str

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Starts a step; what it returns waits for its result. Launched steps are collected in order."""

    def close(self) -> None: ...


def prefill_beside_decodes(model: ModelConfig, *, in_pieces: bool) -> int:
    """PREFILL_BESIDE_DECODES, which keep an H200 longer than its host if a model has 1.75 G elements or more, or 7 G where no graph holds
    the pieces of such a step, as over 4 bit weights; of a model of half as many twice as many, of a third three times, and so on."""
    heads = model.num_heads + model.num_kv_heads
    elements = model.num_layers * model.hidden_size * (2 * heads * model.head_dim + 3 * model.inter_size)
    enough = 1_750_000_000 if in_pieces and model.weight_type != "int4" else 7_000_000_000
    return PREFILL_BESIDE_DECODES * max(1, enough // elements)


class Guides(NamedTuple):
    """What guided requests need."""

    grammars: "Grammars"
    filler: "MaskFiller"


class _Held(NamedTuple):
    """A request whose grammar is being compiled."""

    request: Request
    opened: "Future[Matcher]"
    until: float  # on the engine's clock


class Engine:
    """`overlap`: launch a step before the one before it is collected; None: where the runner has a GPU. `guides`: None refuses guided
    requests."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        runner: Runner,
        clock: Callable[[], float] = time.monotonic,
        overlap: bool | None = None,
        guides: Guides | None = None,
    ) -> None:
        self._overlap = runner.device.startswith("cuda") if overlap is None else overlap
        self._in_flight: tuple[StepPlan, Callable[[], StepResult]] | None = None
        self._clock = clock
        self._guides = guides
        self._held: list[_Held] = []
        self._model = model
        self._config = config
        self._runner = runner
        self._scheduler = Scheduler(
            model,
            config,
            BlockManager(runner.num_blocks, runner.block_size, enable_prefix_caching=config.enable_prefix_caching),
            token_budget(config.num_tokens_per_iter, runner.device),
            clock,
            lambda: secrets.randbits(64),
            prefill_beside_decodes(model, in_pieces=config.cuda_graphs and runner.device.startswith("cuda")),
        )
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished: Counter[str] = Counter()
        self._ttft: deque[float] = deque(maxlen=MAX_OBSERVATIONS)
        self._inter_token: deque[float] = deque(maxlen=MAX_OBSERVATIONS)
        self._e2e: deque[float] = deque(maxlen=MAX_OBSERVATIONS)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._in_flight is not None

    def info(self, pid: int) -> EngineInfo:
        model, config, runner = self._model, self._config, self._runner
        return EngineInfo(
            pid=pid,
            model_name=model.model_name,
            vocab_size=model.vocab_size,
            session_len=config.session_len,
            eos_token_ids=model.eos_token_ids,
            bos_token_id=model.bos_token_id,
            max_batch_size=config.max_batch_size,
            block_size=runner.block_size,
            num_blocks=runner.num_blocks,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            device=runner.device,
            compute_dtype=runner.compute_dtype,
        )

    def add(self, owner: object, request: GenerateRequest) -> None:
        """Raises InvalidInputError or UnavailableError; the request is then not known to the engine."""
        guided = request.sampling.guided
        if guided is None:
            self._scheduler.add(owner, request)
            return
        if self._guides is None:
            raise InvalidInputError(
                "guided is given, but there is no tokenizer.json beside these weights: convert the model again"
            )
        held = self._scheduler.add(owner, request)
        self._held.append(_Held(held, self._guides.grammars.open(guided), self._clock() + MAX_COMPILE_S))

    def on_grammar(self, wake: Callable[[], None]) -> None:
        """`wake` is called, from another thread, when `collect_grammars` has something to do."""
        if self._guides is not None:
            self._guides.grammars.wake = wake

    def collect_grammars(self) -> DeltasByOwner:
        """Requests whose grammar is compiled take their place in the queue; those whose grammar is none end."""
        if not self._held:
            return {}
        ended = self._scheduler.expire()  # they may be all there is, and no step is made for them
        waiting, self._held = self._held, []
        for held in waiting:
            if held.request.state is RequestState.FINISHED:
                continue
            try:
                if held.opened.done():
                    self._scheduler.release(held.request, held.opened.result())
                elif self._clock() > held.until:
                    raise InvalidInputError(f"guided: the grammar took over {MAX_COMPILE_S:.0f} s to compile; simplify it")
                else:
                    self._held.append(held)
            except TurbotritonError as error:
                ended.append(self._scheduler.refuse(held.request, error))
        return self._account(ended)

    def cancel(self, owner: object, request_id: int) -> DeltasByOwner:
        owned = self._scheduler.cancel(owner, request_id)
        return self._account([] if owned is None else [owned])

    def cancel_owner(self, owner: object) -> DeltasByOwner:
        """Cancels all that `owner` has submitted: it is gone."""
        return self._account(self._scheduler.cancel_all(owner))

    def cancel_named(self, name: str) -> DeltasByOwner:
        return self._account(self._scheduler.cancel_named(name))

    def refuse_all(self, error: TurbotritonError) -> DeltasByOwner:
        """Ends every request with `error`."""
        return self._account(self._scheduler.refuse_all(error))

    def step(self) -> DeltasByOwner:
        """One step of the model, if anything can run; with overlap, the deltas are those of the step before it.

        Exceptions of the runner pass through: the engine cannot go on.
        """
        deltas = self._scheduler.expire()
        if self._scheduler.needs_every_token:
            deltas += self._take_in()
        plan = self._scheduler.schedule()
        matchers = self._scheduler.matchers_of(plan)
        if matchers and self._guides is not None:
            plan = dataclasses.replace(plan, masks=self._guides.filler.start(matchers))
        launched = plan, self._runner.launch(plan)
        deltas += self._take_in()
        self._in_flight = launched
        if not (self._overlap and plan.rows):
            deltas += self._take_in()
        return self._account(deltas)

    def _take_in(self) -> list[OwnedDelta]:
        """Waits for the step in flight, if there is one, and updates the requests by it."""
        if self._in_flight is None:
            return []
        plan, collect = self._in_flight
        self._in_flight = None
        return self._scheduler.update(plan, collect())

    def _account(self, owned_deltas: list[OwnedDelta]) -> DeltasByOwner:
        by_owner: DeltasByOwner = {}
        for request, delta in owned_deltas:
            by_owner.setdefault(request.owner, []).append(delta)
            if delta.token_ids:
                self._generation_tokens += len(delta.token_ids)
                if request.inter_token_s is not None:
                    self._inter_token.append(request.inter_token_s)
                elif request.first_token_time is not None:
                    self._ttft.append(request.first_token_time - request.arrival_time)
            if delta.finish_reason is not None:
                self._finished[delta.finish_reason.value] += 1
                if request.first_scheduled_time is not None:
                    self._prompt_tokens += request.num_prompt_tokens
                if delta.timings is not None:
                    self._e2e.append(delta.timings.e2e_s)
        return by_owner

    def stats(self) -> EngineStats:
        """A snapshot; the observations since the last one are taken out."""
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        observations = [tuple(values) for values in (self._ttft, self._inter_token, self._e2e)]
        for values in (self._ttft, self._inter_token, self._e2e):
            values.clear()
        return EngineStats(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=blocks.num_free_blocks,
            num_used_blocks=blocks.num_blocks - blocks.num_free_blocks,
            num_total_blocks=blocks.num_blocks,
            block_size=blocks.block_size,
            prompt_tokens_total=self._prompt_tokens,
            cached_tokens_total=scheduler.num_cached_tokens,
            computed_tokens_total=scheduler.num_computed_tokens,
            generation_tokens_total=self._generation_tokens,
            preemptions_total=scheduler.num_preemptions,
            requests_total=dict(self._finished),
            ttft_s=observations[0],
            inter_token_s=observations[1],
            e2e_s=observations[2],
        )

    def close(self) -> None:
        self._runner.close()
        if self._guides is not None:
            self._guides.grammars.close()
            self._guides.filler.close()


def load_engine(weights_dir: Path, override: Callable[[str], str | None] = lambda name: None) -> Engine:
    """Reads config.ini in `weights_dir`, loads the weights and allocates the KV cache. `override`: see WorkspaceConfig.

    Raises WorkspaceError, ConfigError.
    """
    from turbotriton.backend.runner.precompile import Precompilation
    from turbotriton.backend.runner.quick_imports import quick_imports
    from turbotriton.contract.ini import read_workspace_config

    workspace = read_workspace_config(weights_dir / "config.ini").with_model_options(override)
    model, config = workspace.model_config(), workspace.engine_config(override)
    is_reference = override("backend") == "pytorch"
    precompilation = Precompilation() if is_reference else Precompilation.start(model, config, weights_dir, override)
    try:
        with quick_imports():
            from turbotriton.backend.runner.model_runner import ModelRunner

            from .guided import Grammars, MaskFiller, find_tokenizer
        tokenizer = find_tokenizer(weights_dir)
        guides = None
        if tokenizer is not None:
            guides = Guides(Grammars(tokenizer, model.vocab_size, model.eos_token_ids), MaskFiller(model.vocab_size))
        runner = ModelRunner(model, config, weights_dir, reference_ops=is_reference, before_kv_cache=precompilation.wait)
    except BaseException:
        precompilation.end()
        raise
    return Engine(model, config, runner, guides=guides)
