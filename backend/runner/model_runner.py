"""Executes step plans: the device side of the engine. It knows slots and blocks, not requests, queues or time.

    execute(plan):  leave -> join -> add blocks -> decoder over all rows' tokens -> logits of the sampled rows -> draw -> append

Invariants
- A slot's state advances only here: the plan never repeats what the runner can know (ids drawn, positions).
- Rows of a plan touch different slots; blocks that a row writes belong to no other row.
"""

import logging
from pathlib import Path

import torch

from turbotriton.backend.model.decoder import Decoder
from turbotriton.backend.model.sampler import SamplerState, raw_logprobs
from turbotriton.backend.ops.table import REFERENCE, ops_for
from turbotriton.backend.scheduling.plan import StepPlan, StepResult
from turbotriton.contract.errors import ConfigError
from turbotriton.contract.ini import EngineConfig, ModelConfig

from .batch import SlotState
from .kv_cache import allocate_kv_cache, read_kv_scales
from .weights import DTYPES, load_weights

__all__ = ["ModelRunner", "resolve_compute_dtype", "resolve_device"]

logger = logging.getLogger(__name__)

#: Below this many weight elements a CPU step runs on one thread. Its ops take microseconds, and threads that wait for each other
#: on cores shared with a server cost far more than they bring: 8 against 103 ms a step of a 5 M model on two busy cores.
ONE_THREAD_ELEMENTS = 100_000_000


class ModelRunner:
    """Loads the weights of `weights_dir` and holds the device's state until `close()`.

    `reference_ops`: plain torch on any device, where a GPU would have the kernels.
    On a CPU a small model sets torch to one thread, in the whole process (ONE_THREAD_ELEMENTS).
    Raises WorkspaceError (files), ConfigError (device, KV cache size).
    """

    def __init__(self, model: ModelConfig, engine: EngineConfig, weights_dir: Path, *, reference_ops: bool = False) -> None:
        device = resolve_device(engine.device)
        self.device = str(device)
        self.compute_dtype = resolve_compute_dtype(engine.compute_dtype, model.float_type, device)
        self.block_size = engine.cache_block_seq_len
        dtype = DTYPES[self.compute_dtype]
        if device.type == "cuda" and dtype is torch.float32:
            torch.set_float32_matmul_precision("highest")  # fp32 means fp32: no TF32
        with torch.inference_mode():
            weights = load_weights(model, weights_dir, device, dtype)
            self._decoder = Decoder(model, weights, REFERENCE if reference_ops else ops_for(device))
            self._slots = SlotState(model, engine, device)
            self._sampler = SamplerState(engine.max_batch_size, model.vocab_size, model.eos_token_ids, device)
            scales = read_kv_scales(model, weights_dir) if engine.quant_policy == 4 else None
            self._kv = allocate_kv_cache(model, engine, device, dtype, scales)
        self.num_blocks = self._kv.num_blocks
        if device.type == "cpu" and weights.num_elements < ONE_THREAD_ELEMENTS:
            torch.set_num_threads(1)  # of the whole process
        logger.info("%s: ready on %s in %s", model.model_name, self.device, self.compute_dtype)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        for slot in plan.left:
            self._sampler.leave(slot)
        for request in plan.joined:
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
        return self._run_rows(plan) if plan.rows else StepResult()

    def _run_rows(self, plan: StepPlan) -> StepResult:
        inputs = self._slots.step_inputs(plan.rows)
        x, residual = self._decoder.hidden_states(inputs.token_ids, inputs.batch, self._kv.k, self._kv.v)
        slots, positions = inputs.sampled_slots, inputs.sampled_positions
        if slots.size == 0:
            return StepResult()
        logits = self._decoder.logits(x[inputs.sampled_tokens], residual[inputs.sampled_tokens])
        drawn = self._decoder.ops.sample(logits, self._sampler.batch(slots, positions))
        self._slots.append(slots, positions, drawn)
        token_ids = drawn.tolist()
        self._sampler.append(slots, token_ids)
        counts = [self._sampler.slots[slot].params.num_logprobs for slot in slots.tolist()]
        return StepResult(tuple(token_ids), raw_logprobs(logits, token_ids, counts))

    def close(self) -> None:
        """Drops the weights and the cache; the runner cannot be used after it."""
        on_cuda = self.device.startswith("cuda")
        del self._decoder, self._slots, self._sampler, self._kv
        if on_cuda:
            torch.cuda.empty_cache()


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
