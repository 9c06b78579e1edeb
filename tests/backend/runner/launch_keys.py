"""Which compiled variants a runner's steps need, found without a GPU: launches of our kernels are noted and not made.

Triton compiles a kernel anew for each combination of constexpr values, of dtypes, of whole numbers that are 1 or multiples of 16, and of
addresses that are multiples of 16. A launch's key here is that combination; what a launch would write stays zeros.
"""

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from turbotriton.backend.model.decoder import Decoder
from turbotriton.backend.ops import kernels
from turbotriton.backend.ops.operands import Unadded
from turbotriton.backend.runner import model_runner, prompt_graphs, weights
from turbotriton.backend.runner.batch import SlotState, StepInputs, StepLayout
from turbotriton.backend.runner.decode_graphs import DecodeGraphs
from turbotriton.backend.runner.kv_cache import KvCache
from turbotriton.backend.runner.piecewise_graphs import PiecewiseGraphs
from turbotriton.backend.runner.prompt_graphs import PromptGraphs

NUM_SMS = 132
ALIGNMENT = 16


class EagerGraphs(DecodeGraphs):
    """The decode steps of the graphs, launched one after the other: what is captured is what is launched."""

    def _capture(self, device: torch.device) -> None:
        for size in self._buckets:
            self._forward(size)

    def _run(self, size: int) -> torch.Tensor:
        return self._forward(size)

    def close(self) -> None:
        pass


class EagerPromptGraphs(PromptGraphs):
    """The same of short prompts."""

    def __init__(self, decoder: Decoder, slots: SlotState, kv: KvCache, session_len: int, device: torch.device) -> None:
        self._decoder, self._slots, self._kv = decoder, slots, kv
        self._inputs = torch.zeros(3, dtype=torch.int64, device=device)
        no_graphs: Any = dict.fromkeys(size for size in prompt_graphs.BUCKETS if size <= session_len)
        self._graphs = no_graphs
        for size in self._graphs:
            self._forward(size, decoder, kv)

    def logits(self, slot: int, start: int, num_tokens: int) -> torch.Tensor:
        return self._forward(min(size for size in self._graphs if size >= num_tokens), self._decoder, self._kv)

    def close(self) -> None:
        pass


class EagerPiecewiseGraphs(PiecewiseGraphs):
    """The same of steps in pieces."""

    def _capture(self, device: torch.device) -> None:
        for size in self._sizes:
            self._forward(size, self._decoder, self._kv, lambda q, k, v: None)

    def _run(self, size: int, layout: StepLayout) -> tuple[StepInputs, Unadded, torch.Tensor]:
        inputs = self._slots.rows_of(layout, *self._slots.padded_inputs(*self._tokens[size].unbind()))
        _padded, result = self._forward(size, self._decoder, self._kv, self._attention_of(inputs.batch, layout))
        return inputs, *result


def _argument_key(value: Any, parameter: Any) -> Any:
    if parameter.is_constexpr:
        return value
    if isinstance(value, torch.Tensor):
        is_free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        return (str(value.dtype), None if is_free else value.data_ptr() % ALIGNMENT == 0)
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value).__name__
    if parameter.do_not_specialize:
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return 1 if value == 1 else ("int", parameter.do_not_specialize_on_alignment or value % ALIGNMENT == 0)


@contextmanager
def noted_launches(monkeypatch: Any, num_sms: int = NUM_SMS) -> Iterator[set[tuple[Any, ...]]]:
    """The runner of a "cpu" device takes the CUDA column; `clear()` what is yielded to start anew."""
    from triton.runtime.jit import JITFunction

    from turbotriton.backend.ops import triton_column
    from turbotriton.backend.ops.deterministic_column import DETERMINISTIC
    from turbotriton.backend.ops.kernels import fast_launch
    from turbotriton.backend.ops.triton_column import TRITON

    keys: set[tuple[Any, ...]] = set()

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False))
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        given |= kwargs
        found = [(p.name, _argument_key(given[p.name], p)) for p in self.params]
        keys.add((self.__name__, *found, *sorted(options.items())))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        patch.setattr(fast_launch, "TAKEN", ())  # every launch goes there
        patch.setattr(torch, "empty", torch.zeros)  # nothing is computed: ids must still be ids
        patch.setattr(torch, "empty_like", torch.zeros_like)
        patch.setattr(triton_column, "is_hopper", lambda device: True)
        patch.setattr(model_runner, "ops_for", lambda device, *, deterministic: DETERMINISTIC if deterministic else TRITON)
        patch.setattr(model_runner, "DecodeGraphs", EagerGraphs)
        patch.setattr(model_runner, "PromptGraphs", EagerPromptGraphs)
        patch.setattr(model_runner, "PiecewiseGraphs", EagerPiecewiseGraphs)
        patch.setattr(weights, "_by_outputs", lambda weight: weight.t().contiguous().t())
        for info in pkgutil.iter_modules(kernels.__path__):
            module = import_module(f"{kernels.__name__}.{info.name}")
            for name, value in (("num_sms", num_sms), ("is_hopper", True), ("_compute_capability", 90)):
                if hasattr(module, name):
                    patch.setattr(module, name, lambda device, value=value: value)
        yield keys
