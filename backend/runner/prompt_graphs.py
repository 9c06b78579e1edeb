"""A short chunk of one prompt, alone in its step, as CUDA graphs: one captured forward for each number of tokens up to a power of two.

    slot, start, number of tokens  ──chunk padded to its bucket──>  graph of that bucket  ──>  logits [1, vocab_size]

This is the step of a first token when nothing else runs: some two hundred launches took the host longer than the device works.
Padding lies behind the chunk: it stores no key, no query of the chunk sees it, and its results are not looked at.
"""

import logging
import time

import numpy as np
import torch

from turbotriton.backend.model.decoder import Decoder
from turbotriton.backend.model.transfer import copy_into

from .batch import SlotState
from .decode_graphs import two_layers
from .kv_cache import KvCache

__all__ = ["PromptGraphs"]

logger = logging.getLogger(__name__)

BUCKETS = (16, 32, 64, 128, 256, 512)


class PromptGraphs:
    """Captures at construction; call it under `inference_mode` on the device's stream. The KV cache must be dense."""

    def __init__(self, decoder: Decoder, slots: SlotState, kv: KvCache, session_len: int, device: torch.device) -> None:
        begun = time.monotonic()
        self._decoder, self._slots, self._kv = decoder, slots, kv
        self._inputs = torch.zeros(3, dtype=torch.int64, device=device)
        self._logits: dict[int, torch.Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = None
        few_layers = two_layers(decoder, kv)
        sizes = [size for size in reversed(BUCKETS) if size <= session_len]
        for size in sizes:  # compiles and loads what the buckets need
            self._forward(size, *few_layers)
        torch.cuda.synchronize(device)
        for size in sizes:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._logits[size] = self._forward(size, decoder, kv)
            pool = graph.pool()
            self._graphs[size] = graph
        torch.cuda.synchronize(device)
        logger.info("%d CUDA graphs of short prompts in %.1f s", len(self._graphs), time.monotonic() - begun)

    @property
    def max_tokens(self) -> int:
        return max(self._graphs, default=0)

    def _forward(self, size: int, decoder: Decoder, kv: KvCache) -> torch.Tensor:
        token_ids, batch, last = self._slots.chunk_inputs(self._inputs, size)
        x, residual = decoder.hidden_states(token_ids, batch, kv.k, kv.v)
        return decoder.logits(x[last], residual[last])

    def logits(self, slot: int, start: int, num_tokens: int) -> torch.Tensor:
        """Of the chunk's last token, at most `max_tokens` after its first: [1, vocab_size], valid until the next call."""
        bucket = min(size for size in self._graphs if size >= num_tokens)
        copy_into(self._inputs, np.array((slot, start, num_tokens), np.int64))
        self._graphs[bucket].replay()
        return self._logits[bucket]

    def close(self) -> None:
        self._graphs.clear()
        self._logits.clear()
