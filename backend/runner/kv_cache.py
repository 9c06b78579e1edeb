"""The paged KV cache: one pool of blocks for all layers, and how many blocks it gets.

    k, v: [num_layers, num_blocks, num_kv_heads, block_size, head_dim], compute dtype

A block id names the same block in every layer. Which sequence holds which block is the scheduler's business. The pool starts as
zeros: masked positions are multiplied by zero weights, and zero times an uninitialised NaN would be NaN.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from turbotriton.contract.errors import ConfigError
from turbotriton.contract.ini import EngineConfig, ModelConfig

__all__ = ["KvCache", "allocate_kv_cache", "num_kv_blocks"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KvCache:
    k: torch.Tensor
    v: torch.Tensor

    @property
    def num_blocks(self) -> int:
        return self.k.shape[1]


def allocate_kv_cache(model: ModelConfig, engine: EngineConfig, device: torch.device, dtype: torch.dtype) -> KvCache:
    """Raises ConfigError when the pool would not hold one sequence of session_len."""
    num_blocks = num_kv_blocks(model, engine, free_memory_bytes(device), dtype, cap=device.type == "cpu")
    shape = (model.num_layers, num_blocks, model.num_kv_heads, engine.cache_block_seq_len, model.head_dim)
    logger.info("KV cache: %d blocks of %d tokens on %s", num_blocks, engine.cache_block_seq_len, device)
    return KvCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))


def num_kv_blocks(model: ModelConfig, engine: EngineConfig, free_bytes: int, dtype: torch.dtype, *, cap: bool) -> int:
    """cache_max_entry_count >= 1 is the count itself; below 1 it is a share of `free_bytes`.

    `cap`: a share never takes more than max_batch_size sequences of session_len can use (host memory has other users).
    """
    block_size = engine.cache_block_seq_len
    blocks_a_sequence = -(-engine.session_len // block_size)
    block_bytes = 2 * model.num_layers * model.num_kv_heads * block_size * model.head_dim * dtype.itemsize
    if engine.cache_max_entry_count >= 1:
        num_blocks = int(engine.cache_max_entry_count)
    else:
        num_blocks = int(free_bytes * engine.cache_max_entry_count) // block_bytes
        if cap:
            num_blocks = min(num_blocks, engine.max_batch_size * blocks_a_sequence)
    if num_blocks < blocks_a_sequence:
        raise ConfigError(
            f"the KV cache has {num_blocks} blocks of {block_size} tokens ({block_bytes} bytes each; cache_max_entry_count "
            f"{engine.cache_max_entry_count:g}), fewer than the {blocks_a_sequence} that session_len {engine.session_len} needs; "
            "raise cache_max_entry_count or lower session_len"
        )
    return num_blocks


def free_memory_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or what Linux says a new process can use without swapping."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has left in torch's allocator counts as free
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("cannot tell the free memory from /proc/meminfo; set cache_max_entry_count to a number of blocks")
