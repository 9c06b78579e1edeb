"""Steps with prompts in them, of up to 2048 tokens: what lies between two attentions as a CUDA graph, attention launched.

    slot and position of each token, padded to a size ──> │ embed, norm, q k v, rotary, store │ attention
                                                          │ o, gate up, down, norm, q k v, rotary, store │ attention   ... once a layer
                                                          │ o, gate up, down │ ──> x and residual of the size

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
from turbotriton.backend.model.transfer import copy_into, new_stream, to_device
from turbotriton.backend.ops.operands import AttentionBatch, KvPages, QkvBeforeRotary, SplitSums, Unadded, W4A16Tiles
from turbotriton.backend.scheduling.plan import ScheduledRow

from .batch import SlotState, StepInputs, StepLayout, layout_of
from .decode_graphs import padding_rows, two_layers
from .kv_cache import KvCache

__all__ = ["PiecewiseGraphs", "attended_of", "forward_in_pieces", "piecewise_sizes"]

logger = logging.getLogger(__name__)

SIZE_STEP = 128  # rows of a tile of matrix products: padding to them costs little
SMALL_SIZES = (16, 32, 64)
MAX_SIZE = 2048  # of more tokens the device takes longer than a host that launches every kernel, unless the model is tiny
MAX_W4A16_SIZE = 896  # products of 1024 rows widen 4 bit weights, and a graph would hold the memory of the widest for good

Attend = Callable[[torch.Tensor, KvPages, KvPages], object]
Padded = tuple[torch.Tensor, AttentionBatch]  # what `SlotState.padded_inputs` gives


def piecewise_sizes(decoder: Decoder, max_tokens: int) -> tuple[int, ...]:
    """Rising; the last reaches `max_tokens`, the most that a step has, or is the largest that is captured."""
    most = MAX_W4A16_SIZE if isinstance(decoder.weights.layers[0].gate_up, W4A16Tiles) else MAX_SIZE
    sizes = (*SMALL_SIZES, *range(SIZE_STEP, most + 1, SIZE_STEP))
    return tuple(size for before, size in zip((0, *sizes), sizes, strict=False) if before < max_tokens)


def attended_of(decoder: Decoder, size: int, device: torch.device) -> torch.Tensor:
    """Room for attention's result. Zeros: rows of padding are read before any step has written them."""
    shape = size, decoder.config.num_heads, decoder.config.head_dim
    return torch.zeros(shape, dtype=decoder.weights.embeddings.dtype, device=device)


def forward_in_pieces(
    decoder: Decoder, slots: SlotState, kv: KvCache, tokens: torch.Tensor, attended: torch.Tensor, attend: Attend
) -> tuple[Padded, tuple[Unadded, torch.Tensor]]:
    """What the pieces compute, in their order; where attention stands `attend` is called and then `attended` read.

    tokens: [2, size], int64      attended: [size or more, num_heads, head_dim]
    Returns (what was made of the tokens, (x, residual)).
    """
    size = tokens.shape[1]

    def attention(
        q: torch.Tensor | QkvBeforeRotary, k_cache: KvPages, v_cache: KvPages, *_others: Any, **_named: Any
    ) -> torch.Tensor:
        assert isinstance(q, torch.Tensor), "QkvBeforeRotary is for steps of decodes alone"
        attend(q, k_cache, v_cache)
        return attended[:size]

    padded = slots.padded_inputs(*tokens.unbind())
    cut = Decoder(decoder.config, decoder.weights, replace(decoder.ops, attention=attention))
    return padded, cut.hidden_states(*padded, kv.k, kv.v)


@dataclass(slots=True)
class _Captured:
    """Of one size. `queries` and `result` are lent memory that later pieces and other sizes use as well: each is read before the next
    piece, or step, begins."""

    padded: Padded | None = None
    pieces: list[torch.cuda.CUDAGraph] = field(default_factory=list)  # one more than there are layers
    queries: list[torch.Tensor] = field(default_factory=list)  # what each piece but the last leaves to attention
    result: tuple[Unadded, torch.Tensor] | None = None


class PiecewiseGraphs:
    """Captures at construction, largest size first; call it under `inference_mode` on the device's stream."""

    def __init__(self, decoder: Decoder, slots: SlotState, kv: KvCache, max_tokens: int, device: torch.device) -> None:
        self._decoder, self._slots, self._kv = decoder, slots, kv
        self._sizes = piecewise_sizes(decoder, max_tokens)
        self._attended = attended_of(decoder, self._sizes[-1], device)
        self._tokens = {size: to_device(padding_rows(size), device) for size in self._sizes}
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
        size = next(size for size in self._sizes if size >= num_tokens)
        layout = layout_of(rows)
        tokens = padding_rows(size)
        tokens[:, :num_tokens] = layout.tokens
        copy_into(self._tokens[size], tokens)
        return self._run(size, layout)

    def _run(self, size: int, layout: StepLayout) -> tuple[StepInputs, Unadded, torch.Tensor]:
        captured = self._captured[size]
        assert captured.padded is not None
        assert captured.result is not None
        first, *others = captured.pieces
        first.replay()
        inputs = self._slots.rows_of(layout, *captured.padded)
        attend = self._attention_of(inputs.batch, layout)
        for q, k, v, piece in zip(captured.queries, self._kv.k, self._kv.v, others, strict=True):
            attend(q, k, v)
            piece.replay()
        return inputs, *captured.result

    def _attention_of(self, batch: AttentionBatch, layout: StepLayout) -> Attend:
        attention, rule = self._decoder.ops.attention, self._decoder.attention_rule
        num_tokens = layout.tokens.shape[1]
        attended = self._attended[:num_tokens]
        return lambda q, k, v: attention(q[:num_tokens], k, v, batch, *rule, attended)

    def _forward(self, size: int, decoder: Decoder, kv: KvCache, attend: Attend) -> tuple[Padded, tuple[Unadded, torch.Tensor]]:
        return forward_in_pieces(decoder, self._slots, kv, self._tokens[size], self._attended, attend)

    def _capture(self, device: torch.device) -> None:
        begun, free = time.monotonic(), torch.cuda.mem_get_info(device)[0]
        few_layers = two_layers(self._decoder, self._kv)
        stream = new_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for size in self._sizes:  # compiles and loads what the pieces launch
                self._forward(size, *few_layers, lambda q, k, v: None)
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

        begin()
        try:
            captured.padded, (x, residual) = self._forward(size, self._decoder, self._kv, cut)
        finally:
            captured.pieces[-1].capture_end()
        captured.result = replace(x, parts=_lent(x.parts)) if isinstance(x, SplitSums) else _lent(x), _lent(residual)
        return captured

    def close(self) -> None:
        self._captured.clear()


_AS_INTEGERS = {2: torch.int16, 4: torch.int32}


class _Memory:
    """Some tensor's memory, as the CUDA array interface tells of it, and no hold on it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = tensor.view(_AS_INTEGERS[tensor.element_size()]).__cuda_array_interface__


def _lent(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, for whoever knows when it may be read: the allocator may give it to what is captured next."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
