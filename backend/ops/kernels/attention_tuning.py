"""Tile choice of attention: pure functions of shapes and the device's size and kind, as in tuning.py.

A tile never depends on context lengths. Attention of decodes compiles for seven sizes of batches, by programs a multiprocessor: all when a
model is loaded, none on the request path.
"""

from dataclasses import dataclass

from turbotriton.contract.errors import ConfigError

from .tuning import MAX_HEAD_DIM, MIN_DOT_ROWS, ceil_div, clamp, next_power_of_2

__all__ = [
    "DecodeAttentionConfig",
    "PrefillAttentionConfig",
    "QuantizedDecodeAttentionConfig",
    "decode_attention_config",
    "prefill_attention_config",
    "quantized_decode_attention_config",
]

# One K or V tile. Two warps with three stages read faster than four with five at every batch (H200: docs/perf-log.md): a program holds
# one tile each of K and V, but many programs fit on a multiprocessor and hide each other's waits.
KV_TILE_BYTES = 16384
NUM_STAGES = 3
# tl.dot of fp32 runs without tensor cores, from registers: longer tiles spilled (376 bytes a thread at head_dim 128, 32 keys).
FP32_BLOCK_N = 16
FP32_NUM_STAGES = 3
# Prefill's block table takes a stage too: two tiles each of K and V, 96 KiB of shared memory with q at most, where a program may have
# 99 KiB. Chips of data centres have 227 KiB, and two tiles more brought a quarter (H200).
PREFILL_NUM_STAGES = 3
PREFILL_NUM_STAGES_LARGE_SHARED = 5
# Even one tile is worth a program of its own where a batch has few: 640 keys of one sequence took 7.2 us against 13.2 with 256.
MIN_SPLIT_TOKENS = 64
MAX_SPLITS = 256


@dataclass(frozen=True, slots=True)
class DecodeAttentionConfig:
    block_g: int  # query heads of one kv head, padded
    block_n: int  # keys a tile
    block_d: int  # head_dim, padded
    num_splits: int
    min_split_tokens: int  # a multiple of block_n
    num_warps: int
    num_stages: int
    is_early: bool = False  # asks for its first tile before it waits for the kernel before it


@dataclass(frozen=True, slots=True)
class QuantizedDecodeAttentionConfig:
    block_g: int  # query heads of one kv head, padded
    block_n: int  # keys a tile, a multiple of 16
    block_half: int  # head_dim / 2, padded
    num_splits: int
    min_split_tokens: int  # a multiple of block_n
    num_warps: int
    max_registers: int = 0  # a thread; 0: as many as it wants


@dataclass(frozen=True, slots=True)
class PrefillAttentionConfig:
    block_m: int  # rows of a tile: queries times the query heads of one kv head
    block_n: int  # keys a tile
    block_d: int  # head_dim, padded
    num_warps: int
    num_stages: int


def decode_attention_config(
    batch: int, num_kv_heads: int, group_size: int, head_dim: int, element_bytes: int, max_context: int, num_sms: int
) -> DecodeAttentionConfig:
    """Tiles from the model's shape; splits so that batch * num_kv_heads * num_splits fills the device.

    max_context: keys that the block tables can name. Lengths stay on the device, so the grid is made for the longest; programs
    of splits that a shorter row does not use end at once.
    """
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ConfigError(
            f"head_dim {head_dim} is outside [1, {MAX_HEAD_DIM}], what the attention kernel takes: run on the reference ops"
        )
    block_d = max(16, next_power_of_2(head_dim))
    block_g = max(MIN_DOT_ROWS, next_power_of_2(group_size))
    is_fp32 = element_bytes == 4
    block_n = FP32_BLOCK_N if is_fp32 else clamp(KV_TILE_BYTES // (block_d * element_bytes), 16, 128)
    num_stages = FP32_NUM_STAGES if is_fp32 else NUM_STAGES
    num_warps = 4 if is_fp32 or block_d > 128 else 2
    # Measured on an H200 with 1 to 256 rows of 8 kv heads, equal and as ragged as those of a server (docs/perf-log.md). Many programs, by
    # how many there are for a multiprocessor: over four, not split, since they come longest first and the short ones fill the gaps; up to
    # four, two stages, so that all of them run at once; up to three, more warps each. Fewer: large tiles, or splits that fill the device.
    # Few: in as many splits as it has places for, and little shared memory, which leaves room for the kernels after this one to come in
    # and load their first weights. From a third of a program a multiprocessor to one: they have long been there when q comes, and ask for
    # keys meanwhile (a step of 16 rows of the 8B 4.90 to 4.84 ms); with more nothing was gained.
    num_programs = max(batch * num_kv_heads, 1)
    wanted, min_split_tokens = 1, MIN_SPLIT_TOKENS
    is_early = False
    if num_programs > 3 * num_sms:
        if num_programs <= 4 * num_sms and not is_fp32:
            num_stages = 2
    elif num_programs > 2 * num_sms:
        wanted, min_split_tokens = 4, 1536
        if not is_fp32:
            num_warps, num_stages = 4, 2
    elif 2 * num_programs > 3 * num_sms:
        if not is_fp32 and block_d <= 128:
            block_n, num_warps = min(2 * block_n, 128), 4
    elif num_programs > num_sms:
        wanted, min_split_tokens = 8, 512
        if not is_fp32:
            num_stages = 2
    elif 3 * num_programs > num_sms:
        wanted, min_split_tokens, is_early = 8, 448, True
    else:
        wanted = ceil_div(4 * num_sms, num_programs)
        if not is_fp32:
            num_warps, num_stages = 4, 2
    num_splits = clamp(wanted, 1, min(MAX_SPLITS, max(ceil_div(max_context, MIN_SPLIT_TOKENS), 1)))
    min_split_tokens = ceil_div(min_split_tokens, block_n) * block_n
    return DecodeAttentionConfig(block_g, block_n, block_d, num_splits, min_split_tokens, num_warps, num_stages, is_early)


def quantized_decode_attention_config(
    batch: int, num_kv_heads: int, group_size: int, head_dim: int, element_bytes: int, max_context: int, num_sms: int, bits: int
) -> QuantizedDecodeAttentionConfig:
    """A warp a program: it holds in registers what others hold in shared memory, and many programs on a multiprocessor hide each other's
    waits. As many splits as leave all programs in one wave, 16 on a multiprocessor, and tiles as long as the registers of so many allow
    (H200: 64 x 8192 keys of 8 and 4 bits 255 and 141 us in four splits, 300 and 328 in two). element_bytes: of q.
    """
    if not 8 <= head_dim <= MAX_HEAD_DIM or head_dim % 8:
        raise ConfigError(
            f"head_dim {head_dim} is no multiple of 8 up to {MAX_HEAD_DIM}, what attention over 8 and 4 bit keys takes: use quant_policy 0"
        )
    block_half = max(64 if bits == 4 else 32, next_power_of_2(head_dim // 2))
    block_g = max(4, next_power_of_2(group_size))
    wanted = 16 * num_sms // max(batch * num_kv_heads, 1)
    num_splits = clamp(wanted, 1, min(MAX_SPLITS, max(ceil_div(max_context, MIN_SPLIT_TOKENS), 1)))
    is_usual = element_bytes == 2 and head_dim == 128 and block_g <= 8
    block_n = 32 if is_usual and bits == 4 else 16
    max_registers = (128 if block_g == 4 else 168) if is_usual and bits == 4 else 0
    num_warps = 8 if element_bytes == 4 else max(1, block_g // 16)
    return QuantizedDecodeAttentionConfig(block_g, block_n, block_half, num_splits, MIN_SPLIT_TOKENS, num_warps, max_registers)


def prefill_attention_config(
    group_size: int, head_dim: int, element_bytes: int, compute_capability: int
) -> PrefillAttentionConfig:
    """From sm_90 on: 64 rows on four warps, what Hopper's matrix instruction wants, and several programs on a multiprocessor (128 rows
    on eight were a tenth slower). Before: fragments of every operand live in registers, and 64 keys spilled (64 bytes a thread at
    head_dim 128). Past head_dim 128 eight warps share 64 rows; four spilled on every chip. Tiles and stages measured on an H200 only.

    compute_capability: 10 * major + minor.
    """
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ConfigError(
            f"head_dim {head_dim} is outside [1, {MAX_HEAD_DIM}], what the attention kernel takes: run on the reference ops"
        )
    block_d = max(16, next_power_of_2(head_dim))
    num_stages = PREFILL_NUM_STAGES
    if element_bytes == 4:
        block_m, block_n, num_warps = 32, FP32_BLOCK_N, 4 if block_d <= 128 else 8
    elif block_d > 128:
        block_m, block_n, num_warps = 64, 32, 8
    elif compute_capability >= 90:
        block_m, block_n, num_warps = 64, 64, 4
        if compute_capability < 120:  # consumer Blackwell has 99 KiB
            num_stages = PREFILL_NUM_STAGES_LARGE_SHARED
    else:
        block_m, block_n, num_warps = 64, 32, 4
    return PrefillAttentionConfig(max(block_m, next_power_of_2(group_size)), block_n, block_d, num_warps, num_stages)
