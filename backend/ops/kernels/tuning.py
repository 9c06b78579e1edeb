"""Tile choice for every kernel: pure functions of shapes and the device's size. No measurement at run time, no state.

A tile never depends on num_tokens or on context lengths, so a kernel compiles once a model and dtype (twice for attention: one
split, several splits) and never on the request path. Only the number of splits follows the batch, as an ordinary argument.
"""

from dataclasses import dataclass

from turbotriton.contract.errors import ConfigError

__all__ = [
    "DecodeAttentionConfig",
    "RmsNormConfig",
    "RotaryConfig",
    "ceil_div",
    "decode_attention_config",
    "next_power_of_2",
    "rms_norm_config",
    "rotary_config",
]

MAX_HIDDEN = 32768  # one row in the registers of 16 warps: 64 fp32 values a thread
MAX_HEAD_DIM = 256

# tl.dot needs 16 rows; a GQA group is padded up to it.
MIN_DOT_ROWS = 16
# One K or V tile. The block table's load takes two pipeline stages, so five stages hold two tiles each of K and V: 72 KiB of
# shared memory, under the 99 KiB that the smallest supported chips give a program.
KV_TILE_BYTES = 16384
NUM_STAGES = 5
# tl.dot of fp32 runs without tensor cores, from registers: longer tiles spilled (376 bytes a thread at head_dim 128, 32 keys).
FP32_BLOCK_N = 16
FP32_NUM_STAGES = 3
# A split shorter than this costs more in the reduction than it wins in parallelism.
MIN_SPLIT_TOKENS = 256
MAX_SPLITS = 256
PROGRAMS_PER_SM = 4


@dataclass(frozen=True, slots=True)
class RmsNormConfig:
    block_m: int  # rows a program
    block_n: int  # hidden, padded
    num_warps: int


@dataclass(frozen=True, slots=True)
class RotaryConfig:
    block_h: int  # heads a program
    block_half: int  # rotary_dim / 2, padded
    block_rest: int  # head_dim - rotary_dim, padded; 0 when the whole head turns
    num_warps: int


@dataclass(frozen=True, slots=True)
class DecodeAttentionConfig:
    block_g: int  # query heads of one kv head, padded
    block_n: int  # keys a tile
    block_d: int  # head_dim, padded
    num_splits: int
    min_split_tokens: int  # a multiple of block_n
    num_warps: int
    num_stages: int


def next_power_of_2(value: int) -> int:
    """Smallest power of two >= value, at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def rms_norm_config(hidden: int) -> RmsNormConfig:
    """A tile of about 4096 elements, 16 a thread: two 16-byte loads of 2-byte elements in flight from each of x and residual."""
    if not 1 <= hidden <= MAX_HIDDEN:
        raise ConfigError(
            f"hidden size {hidden} is outside [1, {MAX_HIDDEN}], what the rms_norm kernel takes: run on the reference ops"
        )
    block_n = next_power_of_2(hidden)
    block_m = _clamp(4096 // block_n, 1, 16)
    return RmsNormConfig(block_m, block_n, num_warps=_clamp(block_m * block_n // 512, 1, 16))


def rotary_config(num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int) -> RotaryConfig:
    """All kv heads of a token in one program where 4096 elements allow it; q heads in several programs of that size."""
    if not 2 <= rotary_dim <= head_dim <= MAX_HEAD_DIM or rotary_dim % 2:
        raise ConfigError(
            f"rotary_dim {rotary_dim} with head_dim {head_dim}: need an even rotary_dim <= head_dim <= {MAX_HEAD_DIM}; "
            "run on the reference ops"
        )
    heads_that_fit = 4096 // next_power_of_2(head_dim)
    block_h = _clamp(next_power_of_2(num_kv_heads), min(4, next_power_of_2(num_heads)), heads_that_fit)
    rest = head_dim - rotary_dim
    num_warps = _clamp(block_h * next_power_of_2(head_dim) // 512, 1, 8)
    return RotaryConfig(block_h, next_power_of_2(rotary_dim // 2), next_power_of_2(rest) if rest else 0, num_warps)


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
    block_n = FP32_BLOCK_N if is_fp32 else _clamp(KV_TILE_BYTES // (block_d * element_bytes), 16, 128)
    wanted = ceil_div(PROGRAMS_PER_SM * num_sms, max(batch * num_kv_heads, 1))
    num_splits = _clamp(wanted, 1, min(MAX_SPLITS, max(ceil_div(max_context, MIN_SPLIT_TOKENS), 1)))
    num_stages = FP32_NUM_STAGES if is_fp32 else NUM_STAGES
    return DecodeAttentionConfig(block_g, block_n, block_d, num_splits, MIN_SPLIT_TOKENS, num_warps=4, num_stages=num_stages)
