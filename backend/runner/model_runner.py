"""Executes step plans: the device side of the engine. It knows slots and blocks, not requests, queues or time.

    launch(plan):  leave -> join -> add blocks -> decoder over all rows' tokens -> logits of the sampled rows -> draw -> append
    collect():     waits for the drawn ids of that step

On CUDA nothing in `launch` waits for the device: the drawn ids stay there as the next step's input, and a step may be launched before
the one before it is collected. Steps of decodes alone, and of one short chunk, replay a graph, others of up to 2048 tokens one between
two attentions (decode_graphs.py, prompt_graphs.py, piecewise_graphs.py).

Invariants
- A slot's state advances only here: the plan never repeats what the runner can know (ids drawn, positions).
- Rows of a plan touch different slots; blocks that a row writes belong to no other row.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from turbotriton.backend.model.decoder import Decoder, ModelWeights
from turbotriton.backend.model.logprobs import raw_logprobs
from turbotriton.backend.model.sampler import SamplerState
from turbotriton.backend.model.token_masks import masked_logits
from turbotriton.backend.model.transfer import to_device, to_host
from turbotriton.backend.ops.operands import Unadded
from turbotriton.backend.ops.table import DETERMINISTIC_REFERENCE, REFERENCE, ops_for
from turbotriton.backend.scheduling.plan import ScheduledRow, StepPlan, StepResult, token_budget
from turbotriton.contract.errors import ConfigError
from turbotriton.contract.ini import EngineConfig, ModelConfig
from turbotriton.contract.wire import TokenLogprobs

from .batch import SlotState, StepInputs
from .decode_graphs import DecodeGraphs, batch_buckets, decode_forward, padding_rows, two_layers
from .key_offsets import key_offsets
from .kv_cache import allocate_kv_cache, read_kv_scales
from .library_kernels import load_library_kernels
from .piecewise_graphs import PiecewiseGraphs, attended_of, forward_in_pieces, piecewise_sizes
from .prompt_graphs import PromptGraphs
from .quick_imports import quick_imports
from .warm_up import warm_up_plans
from .weights import DTYPES, load_weights

__all__ = ["ModelRunner", "most_tokens", "resolve_compute_dtype", "resolve_device"]

logger = logging.getLogger(__name__)

I64 = npt.NDArray[np.int64]
NO_ROWS: I64 = np.zeros(0, np.int64)
SCORED_TOKENS = 128  # prompt tokens whose logits are held at once

#: Below this many weight elements a CPU step runs on one thread. Its ops take microseconds, and threads that wait for each other
#: on cores shared with a server cost far more than they bring: 8 against 103 ms a step of a 5 M model on two busy cores.
ONE_THREAD_ELEMENTS = 100_000_000


class _Forward(NamedTuple):
    """Slots of the sampled rows, where their drawn tokens will stand, their logits (None: no row is sampled), what waits for the
    log-probabilities of prompt tokens, and what writes the drawn tokens if it is not `SlotState.append`."""

    slots: I64
    positions: I64
    logits: torch.Tensor | None
    prompt_logprobs: Callable[[], dict[int, tuple[TokenLogprobs, ...]]] = dict
    append: Callable[[torch.Tensor], None] | None = None


class ModelRunner:
    """Loads the weights of `weights_dir` and holds the device's state until `close()`.

    `reference_ops`: plain torch on any device, where a GPU would have the kernels.
    `weights`: instead of those in `weights_dir`.
    `before_kv_cache`: called when the weights are there, before the cache takes its share of what memory is free then.
    `prepare`: on a GPU, capture graphs and compile what requests will need.
    On a CPU a small model sets torch to one thread, in the whole process (ONE_THREAD_ELEMENTS).
    Raises WorkspaceError (files), ConfigError (device, KV cache size).
    """

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        weights_dir: Path,
        *,
        reference_ops: bool = False,
        weights: ModelWeights | None = None,
        prepare: bool = True,
        before_kv_cache: Callable[[], None] = lambda: None,
    ) -> None:
        device = resolve_device(engine.device)
        self.device = str(device)
        self.compute_dtype = resolve_compute_dtype(engine.compute_dtype, model.float_type, device)
        self.block_size = engine.cache_block_seq_len
        dtype = DTYPES[self.compute_dtype]
        if engine.deterministic and device.type == "cuda" and engine.quant_policy and not reference_ops:
            raise ConfigError(
                f"deterministic is 1 and quant_policy {engine.quant_policy}: kernels over quantised keys depend on the batch; "
                "set one of them to 0"
            )
        if device.type == "cuda" and dtype is torch.float32:
            torch.set_float32_matmul_precision("highest")  # fp32 means fp32: no TF32
        with torch.inference_mode():
            plain = torch.device("cpu") if reference_ops else device
            with quick_imports():
                ops = ops_for(plain, deterministic=engine.deterministic)
            if plain.type == "cuda" and prepare:
                from turbotriton.backend.ops.kernels.compiled import read_triton

                threading.Thread(target=read_triton, name="read-triton", daemon=True).start()  # while weights are read
            if weights is None:
                for_kernels = ops not in (REFERENCE, DETERMINISTIC_REFERENCE)
                weights = load_weights(model, weights_dir, device, dtype, for_kernels=for_kernels)
            self._decoder = Decoder(model, weights, ops)
            self._slots = SlotState(model, engine, device)
            self._scored_prompts: dict[int, tuple[tuple[int, ...], int]] = {}  # slot -> prompt, how many of the most likely
            self._sampler = SamplerState(engine.max_batch_size, model.vocab_size, model.eos_token_ids, device)
            before_kv_cache()
            scales = read_kv_scales(model, weights_dir) if engine.quant_policy == 4 else None
            is_int4 = engine.quant_policy == 4 and scales is None
            offsets = key_offsets(self._decoder, engine.session_len, device, dtype) if is_int4 else None
            self._kv = allocate_kv_cache(model, engine, device, dtype, scales, offsets)
            self._graphs: DecodeGraphs | None = None
            self._prompt_graphs: PromptGraphs | None = None
            self._piecewise_graphs: PiecewiseGraphs | None = None
            max_tokens = most_tokens(engine, self.device)
            if device.type == "cuda" and engine.cuda_graphs and not reference_ops and prepare:
                self._graphs = DecodeGraphs(self._decoder, self._slots, self._kv, engine.max_batch_size, device)
                if isinstance(self._kv.k[0], torch.Tensor):
                    self._prompt_graphs = PromptGraphs(self._decoder, self._slots, self._kv, engine.session_len, device)
                self._piecewise_graphs = PiecewiseGraphs(self._decoder, self._slots, self._kv, max_tokens, device)
        self.num_blocks = self._kv.num_blocks
        if device.type == "cuda" and prepare:
            self.warm_up(engine)
            if not engine.deterministic:  # its products are all by a kernel of ours
                with torch.inference_mode():
                    captured = 0 if self._piecewise_graphs is None else self._piecewise_graphs.max_tokens
                    load_library_kernels(self._decoder, device, dtype, max_tokens, engine.max_batch_size, captured)
        if device.type == "cpu" and weights.num_elements < ONE_THREAD_ELEMENTS:
            torch.set_num_threads(1)  # of the whole process
        logger.info("%s: ready on %s in %s", model.model_name, self.device, self.compute_dtype)

    def execute(self, plan: StepPlan) -> StepResult:
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Starts a step; what it returns waits for its result."""
        for slot in plan.left:
            self._sampler.leave(slot)
            self._scored_prompts.pop(slot, None)
        for request in plan.joined:
            if request.sampling.prompt_logprobs is not None:
                prompt = request.token_ids[: request.num_prompt_tokens]
                self._scored_prompts[request.slot] = prompt, request.sampling.prompt_logprobs
            self._slots.join(request)
            self._sampler.join(
                request.slot,
                request.sampling,
                request.token_ids,
                request.num_prompt_tokens,
                request.seed,
                request.sample_index,
            )
        self._slots.add_blocks(plan.new_blocks)
        slots, positions, logits, prompt_logprobs, append = self._forward(plan)
        if logits is None:
            return lambda: StepResult(prompt_logprobs=prompt_logprobs())
        allowed = logits
        if plan.masks is not None:
            allowed = masked_logits(logits, [int((slots == slot).argmax()) for slot in plan.masks.slots], plan.masks.wait())
        drawn = self._decoder.ops.sample(allowed, self._sampler.batch(slots, positions))
        if append is None:
            self._slots.append(slots, positions, drawn)
        else:
            append(drawn)
        note = self._sampler.append(slots, drawn)
        logprobs = raw_logprobs(logits, drawn, self._sampler.num_logprobs(slots))
        wait = to_host(drawn)

        def collect() -> StepResult:
            token_ids = wait().tolist()
            note(token_ids)
            return StepResult(tuple(token_ids), logprobs(), prompt_logprobs())

        return collect

    def _forward(self, plan: StepPlan) -> "_Forward":
        rows = plan.rows
        scored = self._scored_tokens(rows)
        if self._graphs is not None and rows and not scored and all(row.num_tokens == 1 and row.samples for row in rows):
            slots, starts = np.array([(row.slot, row.start) for row in rows], np.int64).T
            return _Forward(slots, starts + 1, self._graphs.logits(slots, starts), append=self._graphs.append)
        if (
            self._prompt_graphs is not None
            and not scored
            and len(rows) == 1
            and rows[0].samples
            and 1 < rows[0].num_tokens <= self._prompt_graphs.max_tokens
        ):
            (row,) = rows
            at = np.array([row.slot], np.int64), np.array([row.start + row.num_tokens], np.int64)
            return _Forward(*at, self._prompt_graphs.logits(row.slot, row.start, row.num_tokens))
        if not rows:
            return _Forward(NO_ROWS, NO_ROWS, None)
        inputs, x, residual = self._hidden_states(rows)
        found = {index: self._scores(x, residual, int(inputs.row_begins[index]), *asked) for index, asked in scored.items()}
        slots, positions = inputs.sampled_slots, inputs.sampled_positions
        logits = None
        if slots.size:
            logits = self._decoder.logits(x[inputs.sampled_tokens], residual[inputs.sampled_tokens])
        return _Forward(slots, positions, logits, lambda: {index: collect() for index, collect in found.items()})

    def _hidden_states(self, rows: Sequence[ScheduledRow]) -> tuple[StepInputs, Unadded, torch.Tensor]:
        if self._piecewise_graphs is not None and (found := self._piecewise_graphs.hidden_states(rows)) is not None:
            return found
        inputs = self._slots.step_inputs(rows)
        return inputs, *self._decoder.hidden_states(inputs.token_ids, inputs.batch, self._kv.k, self._kv.v)

    def _scored_tokens(self, rows: Sequence[ScheduledRow]) -> dict[int, tuple[tuple[int, ...], int]]:
        """By index of a row whose request asked for them: the prompt tokens that follow the row's, and how many of the most likely."""
        scored = {}
        for index, row in enumerate(rows) if self._scored_prompts else ():
            prompt, num_top = self._scored_prompts.get(row.slot, ((), 0))
            if row.start + 1 < len(prompt):
                scored[index] = prompt[row.start + 1 : row.start + 1 + row.num_tokens], num_top
        return scored

    def _scores(
        self, x: Unadded, residual: torch.Tensor, begin: int, token_ids: tuple[int, ...], num_top: int
    ) -> Callable[[], tuple[TokenLogprobs, ...]]:
        """Log-probabilities of `token_ids`, each after the row of x that stands before it, from `begin` on."""
        parts = []
        for start in range(0, len(token_ids), SCORED_TOKENS):
            some = token_ids[start : start + SCORED_TOKENS]
            rows = slice(begin + start, begin + start + len(some))
            logits = self._decoder.logits(x[rows], residual[rows])
            parts.append(raw_logprobs(logits, to_device(np.array(some, np.int64), logits.device), [num_top] * len(some)))
        return lambda: tuple(entry for part in parts for entry in part() if entry is not None)

    @torch.inference_mode()
    def run_uncaptured(self, num_rows: int) -> None:
        """A decode step as a graph of so many rows would capture it, all of it padding, and what comes after the draw."""
        inputs = to_device(padding_rows(num_rows), torch.device(self.device))
        decode_forward(self._decoder, self._slots, self._kv, inputs)
        self._slots.advance(self._decoder.ops.advance_decode, inputs, torch.zeros_like(inputs[0]))

    @torch.inference_mode()
    def run_pieces_uncaptured(self, max_tokens: int) -> None:
        """Steps as `PiecewiseGraphs` would capture them, all of them padding."""
        device = torch.device(self.device)
        sizes = piecewise_sizes(self._decoder, max_tokens)
        attended = attended_of(self._decoder, sizes[-1], device)
        for size in sizes:
            tokens = to_device(padding_rows(size), device)
            forward_in_pieces(self._decoder, self._slots, self._kv, tokens, attended, lambda q, k, v: None)

    def warm_up(self, engine: EngineConfig) -> None:
        """Runs each kernel variant that no graph has run, while nobody holds a block: what is not in triton's cache is compiled."""
        begun = time.monotonic()
        sizes = batch_buckets(engine.max_batch_size)
        kept = self._decoder, self._kv, self._piecewise_graphs
        self._decoder, self._kv = two_layers(self._decoder, self._kv)  # the others would run the same kernels again
        self._piecewise_graphs = None
        try:
            for plan in itertools.chain(*warm_up_plans(sizes, engine.session_len, self.block_size, self.num_blocks)):
                self.execute(plan)
        finally:
            self._decoder, self._kv, self._piecewise_graphs = kept
        logger.info("steps that compile the rest of the kernels: %.1f s", time.monotonic() - begun)

    def close(self) -> None:
        """Drops the weights and the cache; the runner cannot be used after it."""
        on_cuda = self.device.startswith("cuda")
        for graphs in (self._graphs, self._prompt_graphs, self._piecewise_graphs):
            if graphs is not None:
                graphs.close()
        del self._decoder, self._slots, self._sampler, self._kv, self._graphs, self._prompt_graphs, self._piecewise_graphs, graphs
        if on_cuda:
            torch.cuda.empty_cache()


def most_tokens(engine: EngineConfig, device: str) -> int:
    """Of a step: its budget, or all tokens of all slots."""
    return min(token_budget(engine.num_tokens_per_iter, device), engine.max_batch_size * engine.session_len)


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {name!r}, but {torch.cuda.device_count()} CUDA devices are visible; set device = cpu or auto"
        )
    return device


def resolve_compute_dtype(asked: str, float_type: str, device: torch.device) -> str:
    if asked != "auto":
        return asked
    return float_type if device.type == "cuda" else "fp32"
