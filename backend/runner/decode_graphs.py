"""Decode steps as CUDA graphs: one captured forward for each batch bucket, from slots and positions to logits.

    slots, positions [n]  ──padded to the bucket──>  graph of that bucket  ──>  logits [n, vocab_size]

Replaying costs the host one launch, and one copy where the rows are not those of the step before, each a token further; the layers would
cost some two hundred launches. All graphs share one pool of memory. A graph's logits stay until it is replayed, which the stream does after
all that reads them.

Padding has position -1: it sees no key, stores none, and its logits are not looked at.
"""

import dataclasses
import logging
import time

import numpy as np
import numpy.typing as npt
import torch

from turbotriton.backend.model.decoder import Decoder
from turbotriton.backend.model.transfer import copy_into

from .batch import SlotState
from .kv_cache import KvCache

__all__ = ["DecodeGraphs", "batch_buckets", "decode_forward", "padding_rows", "two_layers"]

logger = logging.getLogger(__name__)

I64 = npt.NDArray[np.int64]


def batch_buckets(max_batch_size: int) -> tuple[int, ...]:
    """1, 2, 4, then steps of 8 up to 32, of 16 up to 256, of 128 beyond; the last is max_batch_size itself."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 257, 16), *range(384, max_batch_size + 1, 128)]
    return (*(size for size in sizes if size < max_batch_size), max_batch_size)


def decode_forward(decoder: Decoder, slots: SlotState, kv: KvCache, inputs: torch.Tensor) -> torch.Tensor:
    """inputs: [2, num_rows], int64, slots and positions -> logits [num_rows, vocab_size]. This is what a graph captures."""
    token_ids, batch = slots.decode_inputs(decoder.ops.stage_decode, *inputs.unbind())
    x, residual = decoder.hidden_states(token_ids, batch, kv.k, kv.v)
    return decoder.logits(x, residual)


def two_layers(decoder: Decoder, kv: KvCache) -> tuple[Decoder, KvCache]:
    """Views of the first two. They run every kernel that all do: the first has no residual, the others are alike."""
    weights = dataclasses.replace(decoder.weights, layers=decoder.weights.layers[:2])
    return Decoder(decoder.config, weights, decoder.ops), KvCache(kv.k[:2], kv.v[:2], kv.num_blocks)


class DecodeGraphs:
    """Captures at construction, largest bucket first; call it under `inference_mode` on the device's stream."""

    def __init__(self, decoder: Decoder, slots: SlotState, kv: KvCache, max_batch_size: int, device: torch.device) -> None:
        self._decoder, self._slots, self._kv = decoder, slots, kv
        self._buckets = batch_buckets(max_batch_size)
        self._held = {size: padding_rows(size) for size in self._buckets}  # what _inputs hold
        self._inputs = {size: torch.from_numpy(rows).to(device, copy=True) for size, rows in self._held.items()}
        self._last = self._buckets[0], 0  # the bucket that ran, and its rows
        self._logits: dict[int, torch.Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._capture(device)

    def _capture(self, device: torch.device) -> None:
        begun, free = time.monotonic(), torch.cuda.mem_get_info(device)[0]
        pool = None
        few_layers, few_kv = two_layers(self._decoder, self._kv)
        for size in reversed(self._buckets):  # compiles and loads all kernels, before captures that drop torch's free memory
            decode_forward(few_layers, self._slots, few_kv, self._inputs[size])
        torch.cuda.synchronize(device)
        for size in reversed(self._buckets):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._logits[size] = self._forward(size)
            pool = graph.pool()
            self._graphs[size] = graph
        torch.cuda.synchronize(device)
        taken = (free - torch.cuda.mem_get_info(device)[0]) / 2**20
        logger.info("%d CUDA graphs of decode steps in %.1f s, %.0f MiB", len(self._graphs), time.monotonic() - begun, taken)

    def _run(self, size: int) -> torch.Tensor:
        self._graphs[size].replay()
        return self._logits[size]

    def _forward(self, size: int) -> torch.Tensor:
        return decode_forward(self._decoder, self._slots, self._kv, self._inputs[size])

    def logits(self, slots: I64, positions: I64) -> torch.Tensor:
        """slots, positions of the rows' last tokens, at most max_batch_size -> [num_rows, vocab_size], valid until the next call."""
        num_rows = slots.size
        bucket = next(size for size in self._buckets if size >= num_rows)
        wanted = padding_rows(bucket)
        wanted[:, :num_rows] = slots, positions
        if not np.array_equal(wanted, self._held[bucket]):  # rows that go on have been moved by `append`
            copy_into(self._inputs[bucket], wanted)
            self._held[bucket] = wanted
        self._last = bucket, num_rows
        return self._run(bucket)[:num_rows]

    def append(self, drawn: torch.Tensor) -> None:
        """Once after `logits`: writes the drawn tokens of its rows behind them. drawn: [num_rows], int64, on the device."""
        bucket, num_rows = self._last
        self._slots.advance(self._decoder.ops.advance_decode, self._inputs[bucket], drawn)
        self._held[bucket][1, :num_rows] += 1

    def close(self) -> None:
        self._graphs.clear()
        self._logits.clear()


def padding_rows(size: int) -> I64:
    """Slots and positions [2, size] of padding alone."""
    return np.array([[0], [-1]], np.int64).repeat(size, axis=1)
