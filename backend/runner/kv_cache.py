"""The paged KV cache: one pool of blocks for all layers, its format, and how many blocks it gets.

    format   a layer's keys or values (ops/operands.py)          bytes of a token and head in one of them
    dense    tensor, compute dtype                                head_dim * itemsize
    int8     QuantizedPages, 8 bit, (scale, zero) a token         head_dim + 2 itemsize
    int4     QuantizedPages, 4 bit, (scale, zero) a token         head_dim / 2 + 2 itemsize; keys 4, for each half of a head
    fp8      QuantizedPages, float8 e4m3, a scale a token         head_dim + 2 itemsize
    static   StaticInt8Pages, scales from files                   head_dim

quant_policy chooses: 0 dense, 8 int8, 16 fp8 (ours), 4 int4, or static where the workspace has `layers.i.past_kv_scale.r.weight` files
(what quant_policy 4 meant in LMDeploy v0.3). A block id names the same block in every layer. Which sequence holds which block is the
scheduler's business. The pool starts as zeros: masked positions are multiplied by zero weights, and zero times NaN would be NaN.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from turbotriton.backend.ops.operands import KvPages, QuantizedPages, StaticInt8Pages
from turbotriton.contract.errors import ConfigError, WorkspaceError
from turbotriton.contract.ini import EngineConfig, ModelConfig
from turbotriton.contract.layout import kv_scale_file

__all__ = ["KvCache", "KvScales", "allocate_kv_cache", "kv_block_bytes", "num_kv_blocks", "read_kv_scales"]

logger = logging.getLogger(__name__)

FP8_POLICY = 16


@dataclass(frozen=True, slots=True)
class KvCache:
    """One KvPages a layer; all of one format."""

    k: tuple[KvPages, ...]
    v: tuple[KvPages, ...]
    num_blocks: int


@dataclass(frozen=True, slots=True)
class KvScales:
    """Static scales of all layers, fp32 [num_layers, num_kv_heads] each."""

    k_scale: torch.Tensor
    k_zero: torch.Tensor
    v_scale: torch.Tensor
    v_zero: torch.Tensor


def allocate_kv_cache(
    model: ModelConfig,
    engine: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    scales: KvScales | None = None,
    offsets: torch.Tensor | None = None,
) -> KvCache:
    """`scales`: of the files, for quant_policy 4; without them `offsets`: key_offsets.py's, or None for 0.

    Raises ConfigError when the pool would not hold one sequence of session_len.
    """
    is_fp8 = engine.quant_policy == FP8_POLICY
    bits = 8 if scales is not None or is_fp8 else engine.quant_policy
    block_bytes = kv_block_bytes(model, engine, dtype, bits, with_params=scales is None)
    num_blocks = num_kv_blocks(engine, free_memory_bytes(device), block_bytes, cap=device.type == "cpu")
    shape = (model.num_layers, num_blocks, model.num_kv_heads, engine.cache_block_seq_len)

    def pool(num_parts: int, offsets: Iterable[torch.Tensor | None]) -> list[KvPages]:
        if not bits:
            return list(torch.zeros((*shape, model.head_dim), device=device, dtype=dtype))
        data = torch.zeros((*shape, model.head_dim * bits // 8), device=device, dtype=torch.uint8)
        params = torch.zeros((*shape, 2 * num_parts), device=device, dtype=dtype)
        return [QuantizedPages(d, p, bits, offset, is_fp8) for d, p, offset in zip(data, params, offsets, strict=False)]

    def static_pool(scale: torch.Tensor, zero: torch.Tensor) -> list[KvPages]:
        data = torch.zeros((*shape, model.head_dim), device=device, dtype=torch.uint8)
        return [StaticInt8Pages(*parts) for parts in zip(data, scale.to(device), zero.to(device), strict=True)]

    kind = (
        "static int8" if scales is not None else "fp8" if is_fp8 else f"int{bits}" if bits else str(dtype).removeprefix("torch.")
    )
    logger.info("KV cache: %d blocks of %d tokens in %s on %s", num_blocks, engine.cache_block_seq_len, kind, device)
    if scales is not None:
        k, v = static_pool(scales.k_scale, scales.k_zero), static_pool(scales.v_scale, scales.v_zero)
    else:
        k, v = pool(2 if bits == 4 else 1, repeat(None) if offsets is None else offsets), pool(1, repeat(None))
    return KvCache(tuple(k), tuple(v), num_blocks)


def kv_block_bytes(model: ModelConfig, engine: EngineConfig, dtype: torch.dtype, bits: int, *, with_params: bool = True) -> int:
    """Bytes of one block over all layers, keys and values. `bits` 0: dense."""
    if bits == 4 and model.head_dim % 2:
        raise ConfigError(f"quant_policy is 4, but head_dim is {model.head_dim}, an odd number; use quant_policy 8 or 0")
    values = 2 * (model.head_dim * bits // 8 if bits else model.head_dim * dtype.itemsize)
    params = 0 if not (bits and with_params) else (6 if bits == 4 else 4) * dtype.itemsize
    return model.num_layers * model.num_kv_heads * engine.cache_block_seq_len * (values + params)


def num_kv_blocks(engine: EngineConfig, free_bytes: int, block_bytes: int, *, cap: bool) -> int:
    """cache_max_entry_count >= 1 is the count itself; below 1 it is a share of `free_bytes`.

    `cap`: a share never takes more than max_batch_size sequences of session_len can use (host memory has other users).
    """
    block_size = engine.cache_block_seq_len
    blocks_a_sequence = -(-engine.session_len // block_size)
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


def read_kv_scales(model: ModelConfig, folder: Path) -> KvScales | None:
    """The past_kv_scale files of every layer and rank, None where there is none. Raises WorkspaceError.

    A file is fp32: (k_scale, k_zero, v_scale, v_zero), or (k_scale, v_scale) with zeros of 0; it holds for the rank's kv heads.
    """
    if not any(folder.glob("layers.*.past_kv_scale.*.weight")):
        return None
    rows = [[_read_scale_file(folder / kv_scale_file(i, rank)) for rank in range(model.tp)] for i in range(model.num_layers)]
    values = torch.tensor(rows, dtype=torch.float32)  # [num_layers, tp, 4]
    a_head = values.repeat_interleave(model.num_kv_heads // model.tp, dim=1)
    return KvScales(*(column.contiguous() for column in a_head.unbind(dim=2)))


def _read_scale_file(path: Path) -> list[float]:
    remedy = "write them all with 'turbotriton lite kv_qparams', or delete them all"
    if not path.is_file():
        raise WorkspaceError(f"{path}: is missing, but other layers have scales; {remedy}")
    size = path.stat().st_size
    if size not in (8, 16):
        raise WorkspaceError(f"{path}: has {size} bytes, expected 16 (or 8, symmetric); {remedy}")
    values = [float(value) for value in np.fromfile(path, dtype="<f4")]
    k_scale, k_zero, v_scale, v_zero = values if size == 16 else (values[0], 0.0, values[1], 0.0)
    if not (np.isfinite(values).all() and k_scale > 0 and v_scale > 0):
        raise WorkspaceError(f"{path}: holds {values}; scales must be positive and finite; {remedy}")
    return [k_scale, k_zero, v_scale, v_zero]


def free_memory_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or what Linux says a new process can use without swapping."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has left in torch's allocator counts as free
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("cannot tell the free memory from /proc/meminfo; set cache_max_entry_count to a number of blocks")
