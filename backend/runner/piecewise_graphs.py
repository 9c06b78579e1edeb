"""Steps with prompts in them, of up to a few thousand tokens: what lies between two attentions as a CUDA graph, attention launched.

    slot and position of each token, padded to a bucket ──> │ embed, norm, q k v, rotary, store │ attention
                                                            │ o, gate up, down, norm, q k v, rotary, store │ attention   ... once a layer
                                                            │ o, gate up, down │ ──> x and residual of the bucket

Attention is chosen by how many rows there are and how long their contexts are; the rest knows tokens only. Launched one by one, the
kernels of a step keep a host longer than an H200 needs for 400 tokens of the 8B, or 2000 of a 1.8B. Padding stores no key, is no row of
attention, and its results are not read.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from turbotriton.backend.model.decoder import Decoder
from turbotriton.backend.ops.operands import AttentionBatch, KvPages, QkvBeforeRotary, SplitSums, Unadded
from turbotriton.backend.scheduling.plan import ScheduledRow

from .batch import SlotState, StepInputs
from .decode_graphs import two_layers
from .kv_cache import KvCache

__all__ = ["PiecewiseGraphs", "piecewise_sizes"]

logger = logging.getLogger(__name__)

SIZE_STEP = 128  # rows of a tile of matrix products: padding to them costs little
MAX_SIZE = 2048  # tokens of steps beside decodes (scheduler.PREFILL_BESIDE_DECODES); of more the device is the slower one

Attend = Callable[[torch.Tensor, KvPages, KvPages], object]


def piecewise_sizes(max_tokens: int) -> tuple[int, ...]:
    """Rising; steps have at most `max_tokens`."""
    return tuple(range(SIZE_STEP, min(-(-max_tokens // SIZE_STEP) * SIZE_STEP, MAX_SIZE) + 1, SIZE_STEP))


@dataclass(slots=True)
class _Captured:
    """Of one size. The tensors lie in memory that other sizes' graphs use as well: each is read before the next step begins."""

    padded: tuple[torch.Tensor, AttentionBatch] | None = None
    pieces: list[torch.cuda.CUDAGraph] = field(default_factory=list)  # one more than there are layers
    queries: list[torch.Tensor] = field(default_factory=list)  # what each piece but the last leaves to attention
    result: tuple[Unadded, torch.Tensor] | None = None


class PiecewiseGraphs:
    """Captures at construction, largest size first; call it under `inference_mode` on the device's stream."""

    def __init__(self, decoder: Decoder, slots: SlotState, kv: KvCache, max_tokens: int, device: torch.device) -> None:
        self._decoder, self._slots, self._kv = decoder, slots, kv
        self._sizes = piecewise_sizes(max_tokens)
        config, dtype = decoder.config, decoder.weights.embeddings.dtype
        self._attended = torch.zeros((self._sizes[-1], config.num_heads, config.head_dim), dtype=dtype, device=device)
        padding = torch.tensor([[0], [-1]], device=device)
        self._tokens = {size: padding.repeat(1, size) for size in self._sizes}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._captured: dict[int, _Captured] = {}
        self._capture(device)

    @property
    def max_tokens(self) -> int:
        return self._sizes[-1]

    def hidden_states(self, rows: Sequence[ScheduledRow]) -> tuple[StepInputs, Unadded, torch.Tensor] | None:
        """A step's inputs; x and residual, [num_tokens or more, hidden], until the next call. None: more tokens than a graph has."""
        num_tokens = sum(row.num_tokens for row in rows)
        if num_tokens > self.max_tokens:
            return None
        size = -(-num_tokens // SIZE_STEP) * SIZE_STEP
        return self._run(size, num_tokens, rows)

    def _run(self, size: int, num_tokens: int, rows: Sequence[ScheduledRow]) -> tuple[StepInputs, Unadded, torch.Tensor]:
        captured = self._captured[size]
        assert captured.padded is not None
        assert captured.result is not None
        inputs = self._slots.rows_among(rows, self._tokens[size], captured.padded)
        attend = self._attention_of(inputs.batch, num_tokens)
        first, *others = captured.pieces
        first.replay()
        for q, k, v, piece in zip(captured.queries, self._kv.k, self._kv.v, others, strict=True):
            attend(q, k, v)
            piece.replay()
        return inputs, *captured.result

    def _attention_of(self, batch: AttentionBatch, num_tokens: int) -> Attend:
        attention, rule = self._decoder.ops.attention, self._decoder.attention_rule
        attended = self._attended[:num_tokens]
        return lambda q, k, v: attention(q[:num_tokens], k, v, batch, *rule, attended)

    def _forward(
        self,
        size: int,
        decoder: Decoder,
        kv: KvCache,
        attend: Attend,
        keep: Callable[[tuple[torch.Tensor, AttentionBatch]], None],
    ) -> tuple[Unadded, torch.Tensor]:
        """All pieces, with `attend` in the place of attention; what it returns is not looked at. keep: is told the tokens' inputs."""

        def attention(
            q: torch.Tensor | QkvBeforeRotary, k_cache: KvPages, v_cache: KvPages, *_others: Any, **_named: Any
        ) -> torch.Tensor:
            assert isinstance(q, torch.Tensor), "QkvBeforeRotary is for steps of decodes alone"
            attend(q, k_cache, v_cache)
            return self._attended[:size]

        padded = self._slots.padded_inputs(*self._tokens[size].unbind())
        keep(padded)
        cut = Decoder(decoder.config, decoder.weights, replace(decoder.ops, attention=attention))
        return cut.hidden_states(*padded, kv.k, kv.v)

    def _capture(self, device: torch.device) -> None:
        begun, free = time.monotonic(), torch.cuda.mem_get_info(device)[0]
        few_layers = two_layers(self._decoder, self._kv)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for size in self._sizes:  # compiles and loads what the pieces launch
                self._forward(size, *few_layers, lambda q, k, v: q, lambda padded: None)
            torch.cuda.synchronize(device)
            gc.collect()  # a graph that is freed would break a capture
            torch.cuda.empty_cache()
            for size in reversed(self._sizes):
                self._captured[size] = self._captured_of(size)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        taken = (free - torch.cuda.mem_get_info(device)[0]) / 2**20
        num_pieces = sum(len(captured.pieces) for captured in self._captured.values())
        logger.info("%d CUDA graphs of pieces of steps in %.1f s, %.0f MiB", num_pieces, time.monotonic() - begun, taken)

    def _captured_of(self, size: int) -> _Captured:
        """Where attention stands one capture ends and the next begins."""
        captured = _Captured()

        def begin() -> None:
            captured.pieces.append(torch.cuda.CUDAGraph())
            captured.pieces[-1].capture_begin(pool=self._pool)

        def cut(q: torch.Tensor, _k: KvPages, _v: KvPages) -> None:
            captured.pieces[-1].capture_end()
            captured.queries.append(_lent(q))
            begin()

        def keep(padded: tuple[torch.Tensor, AttentionBatch]) -> None:
            captured.padded = padded

        begin()
        try:
            x, residual = self._forward(size, self._decoder, self._kv, cut, keep)
        finally:
            captured.pieces[-1].capture_end()
        captured.result = replace(x, parts=_lent(x.parts)) if isinstance(x, SplitSums) else _lent(x), _lent(residual)
        return captured

    def close(self) -> None:
        self._captured.clear()


class _Memory:
    """Some tensor's memory, as the CUDA array interface tells of it, and no hold on it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = tensor.view(_AS_INTEGERS[tensor.element_size()]).__cuda_array_interface__


_AS_INTEGERS = {2: torch.int16, 4: torch.int32}


def _lent(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, for whoever knows when it may be read: the allocator may give it to what is captured next."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
