"""Tile choice for the kernels: pure functions of shapes and the device's size and kind. No measurement at run time, no state.
attention_tuning.py has those of attention, hopper_tuning.py those that are for Hopper alone.

A tile never depends on the tokens of a prefill or on context lengths, so a kernel compiles once a model and dtype: when a model is loaded,
never on the request path.
"""

from dataclasses import dataclass

from turbotriton.contract.errors import ConfigError

__all__ = [
    "FixedOrderLinearConfig",
    "GreedySampleConfig",
    "QuantizeRowsConfig",
    "RmsNormConfig",
    "RotaryConfig",
    "SampleConfig",
    "SiluAndMulConfig",
    "SkinnyLinearConfig",
    "W8A8LinearConfig",
    "ceil_div",
    "fixed_order_linear_config",
    "greedy_sample_config",
    "narrow_linear_config",
    "narrow_splits",
    "next_power_of_2",
    "num_product_parts",
    "quantize_rows_config",
    "rms_norm_config",
    "rotary_config",
    "sample_config",
    "silu_and_mul_config",
    "skinny_linear_config",
    "w4a16_linear_config",
    "w4a16_splits",
    "w8a8_linear_config",
]

MAX_HIDDEN = 32768  # one row in the registers of 16 warps: 64 fp32 values a thread
MAX_HEAD_DIM = 256
# A linear layer after a norm holds all of x in fp32 registers: 64 a thread in 16 warps.
MAX_SKINNY_NORM_ELEMENTS = 16384

# tl.dot needs 16 rows; a GQA group is padded up to it.
MIN_DOT_ROWS = 16


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
class SiluAndMulConfig:
    block_m: int  # rows a program
    block_n: int  # columns of y a program
    num_warps: int


@dataclass(frozen=True, slots=True)
class SkinnyLinearConfig:
    block_m: int  # rows of x, padded
    block_n: int  # outputs a program
    block_k: int  # inputs at once; all of them after a norm
    num_warps: int
    programs_per_sm: int = 0  # after a norm: programs that take tile after tile


@dataclass(frozen=True, slots=True)
class GreedySampleConfig:
    block_v: int  # logits a program
    num_warps: int


@dataclass(frozen=True, slots=True)
class SampleConfig:
    block_v: int  # logits a program
    max_copied: int  # weights of a row that are searched as a copy
    num_warps: int


@dataclass(frozen=True, slots=True)
class QuantizeRowsConfig:
    block_n: int  # columns, padded
    num_warps: int


@dataclass(frozen=True, slots=True)
class W8A8LinearConfig:
    block_m: int  # rows a program
    block_n: int  # columns of y
    block_k: int  # inputs a step
    num_splits: int  # programs that share a tile's inputs
    group_m: int  # row blocks that go by together
    descriptors: bool  # tiles are fetched by the copy engine
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class W4A16LinearConfig:
    block_m: int  # rows of x a program, padded
    block_k: int  # inputs a step; it divides a group
    num_splits: int  # programs that share a tile's inputs
    num_warps: int
    num_stages: int
    ahead: int = (
        0  # steps whose weights are in registers or under way, the first before the wait; inputs are to be so many steps' or more
    )
    scale_after: bool = False  # scales come after the product, in fp32
    descriptors: bool = False  # x is fetched by the copy engine (sm_90 on; rows at multiples of 16 bytes)

    @property
    def block_n(self) -> int:
        return 16 * self.num_warps


@dataclass(frozen=True, slots=True)
class NarrowLinearConfig:
    block_m: int  # rows of x a program, padded
    block_n: int  # outputs a program
    block_k: int  # inputs a step
    num_splits: int  # programs that share a tile's inputs
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class FixedOrderLinearConfig:
    block_m: int  # rows of x a program
    block_n: int  # outputs a program
    block_k: int  # inputs a step
    chunk: int  # inputs whose sum is added to the others': a multiple of block_k
    num_warps: int
    num_stages: int


#: More rows than these are `narrow_linear`'s where it fits: `skinny_linear` takes 8B's step of two rows 5.7 ms, of three 10.4 (H200).
MAX_ROWS_BEFORE_NARROW = 1
#: Dense layers of a batch of decodes with at most so many rows have a kernel of their own. With a gate, it saves the launch of SiLU; with
#: at least as many inputs as outputs, or with very many outputs, it reads faster than cuBLAS; others start early (H200: docs/perf-log.md).
MAX_NARROW_GATED_ROWS = 128
MAX_NARROW_ROWS_OF_ANY = 48
MIN_NARROW_SHARED_BYTES = 200 << 10  # of a chip in a data centre: the largest tiles take more than half of it
MAX_NARROW_ROWS = 64
MANY_OUTPUTS = 65536
#: Dense layers of at most so many rows that nothing else takes, and whose norm adds up parts, are products of parts of the inputs.
MAX_SPLIT_PRODUCT_ROWS = 256
#: Decodes of at most so many rows turn q and k in their attention's launch; with more nothing was gained (H200: docs/perf-log.md).
MAX_TURNING_ROWS = 64
MAX_QUANTIZED_ROW = 65536
#: Heads of a rotary program, at least: 8,192 tokens of the 8B take 55.6 us by 16, 57.5 by 32 and 62.2 by 8. Over 8 bit pages, whose
#: programs have more to do for a head, 109 by 16 and 69 by 8, which are the 8B's kv heads (H200: docs/perf-log.md).
ROTARY_LEAST_HEADS, QUANTIZED_ROTARY_LEAST_HEADS = 16, 4
#: e4m3 with at most so many rows has our kernel, beyond them cuBLAS's: a layer of 64 rows takes 88 us against 103, of 256 rows 155 against
#: 121 (H200: docs/perf-log.md).
MAX_OWN_FP8_ROWS = 64
#: e4m3 sums of cuBLAS stay in the matrix unit's own accumulators, as ours do.
FP8_FAST_ACCUMULATION = True
MAX_PARTS = 9 << 20  # fp32 numbers of split sums, what split_sum.workspace has
#: More rows than these: the weights are dequantised for one linear layer at a time, and torch multiplies. It is as fast from 2,048 rows on;
#: 1,024 is the last number of tokens that a runner warms up with.
MAX_W4A16_ROWS = 1023


def next_power_of_2(value: int) -> int:
    """Smallest power of two >= value, at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def rms_norm_config(hidden: int) -> RmsNormConfig:
    """A tile of about 4096 elements, 16 a thread: two 16-byte loads of 2-byte elements in flight from each of x and residual."""
    if not 1 <= hidden <= MAX_HIDDEN:
        raise ConfigError(
            f"hidden size {hidden} is outside [1, {MAX_HIDDEN}], what the rms_norm kernel takes: run on the reference ops"
        )
    block_n = next_power_of_2(hidden)
    block_m = clamp(4096 // block_n, 1, 16)
    return RmsNormConfig(block_m, block_n, num_warps=clamp(block_m * block_n // 512, 1, 16))


def rotary_config(
    num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, *, least_heads: int = ROTARY_LEAST_HEADS
) -> RotaryConfig:
    """All kv heads of a token in one program where 4096 elements allow it; q heads in several programs of that size, at least
    `least_heads` of them in each."""
    if not 2 <= rotary_dim <= head_dim <= MAX_HEAD_DIM or rotary_dim % 2:
        raise ConfigError(
            f"rotary_dim {rotary_dim} with head_dim {head_dim}: need an even rotary_dim <= head_dim <= {MAX_HEAD_DIM}; "
            "run on the reference ops"
        )
    heads_that_fit = 4096 // next_power_of_2(head_dim)
    block_h = min(max(next_power_of_2(num_kv_heads), min(least_heads, next_power_of_2(num_heads))), heads_that_fit)
    rest = head_dim - rotary_dim
    num_warps = clamp(block_h * next_power_of_2(head_dim) // 512, 1, 8)
    return RotaryConfig(block_h, next_power_of_2(rotary_dim // 2), next_power_of_2(rest) if rest else 0, num_warps)


def silu_and_mul_config(inter: int) -> SiluAndMulConfig:
    """1024 elements, 8 a thread: one 16-byte load of 2-byte elements from each half. Common sizes of `inter` are multiples of it."""
    block_n = clamp(next_power_of_2(inter), 1, 1024)
    return SiluAndMulConfig(1024 // block_n, block_n, num_warps=4)


def skinny_linear_config(
    num_rows: int, k: int, element_bytes: int, *, whole_rows: bool, gated: bool = False
) -> SkinnyLinearConfig:
    """Products are held in fp32 registers, block_m * block_n * block_k of them (twice that if gated): 64 a thread, or 32 where weights
    are fp32 and take registers of their own."""
    block_m = next_power_of_2(num_rows)
    if not whole_rows:
        block_n, block_k = (2, 2048) if k <= 2048 else (4, 512) if k <= 4096 else (2, 1024)
        return SkinnyLinearConfig(block_m, block_n, clamp(next_power_of_2(k), 16, block_k // block_m), num_warps=4)
    block_k = next_power_of_2(k)
    num_warps = clamp(block_m * block_k // 1024, 4, 16)
    products = num_warps * 32 * (32 if element_bytes == 4 else 64) // (2 if gated else 1)
    block_n = clamp(products // (block_m * block_k), 1, 4)
    return SkinnyLinearConfig(block_m, block_n, block_k, num_warps, programs_per_sm=16 // num_warps)


def narrow_linear_config(
    num_rows: int, n: int, k: int, element_bytes: int, num_sms: int, *, gated: bool = False
) -> NarrowLinearConfig:
    """Splits so that programs of 64 outputs fill the device: once from 33 rows on, whose tiles of x take a multiprocessor's shared
    memory, else twice. Very many outputs go by 128 there, which read x half as often. Measured on an H200."""
    block_m = clamp(next_power_of_2(num_rows), MIN_DOT_ROWS, 128)
    if element_bytes == 4:
        return NarrowLinearConfig(MIN_DOT_ROWS, 32, 32, 1, num_warps=4, num_stages=2)
    if gated:
        if block_m >= 32 and 4 * ceil_div(n, 128) > 3 * num_sms:  # wider tiles read x half as often
            block_k, num_stages = (128, 3) if block_m == 32 else (64, 4)
            return NarrowLinearConfig(block_m, 128, block_k, 1, num_warps=8, num_stages=num_stages)
        block_k, num_stages = (128, 4) if block_m < 64 else (64, 6)
        return NarrowLinearConfig(block_m, 64, block_k, 1, num_warps=4, num_stages=num_stages)
    if block_m >= 64 and n > MANY_OUTPUTS:
        return NarrowLinearConfig(block_m, 128, 64, 1, num_warps=8, num_stages=6)
    tiles = ceil_div(n, 64) * ceil_div(num_rows, block_m)
    num_splits = narrow_splits(tiles, block_m, num_sms)
    block_k, num_stages = (64, 8) if block_m >= 64 else (128, 3 if n > k else 4)
    return NarrowLinearConfig(block_m, 64, block_k, num_splits, num_warps=4, num_stages=num_stages)


def narrow_splits(tiles: int, block_m: int, num_sms: int) -> int:
    """Programs of 64 outputs that share a tile's inputs: they fill the device twice, from 33 rows on once, where what more parts cost is
    more than a second program on a multiprocessor brings (H200: docs/perf-log.md)."""
    places = (1 if block_m >= 64 else 2) * num_sms
    return clamp(next_power_of_2(places // tiles + 1) // 2, 1, 4)


def num_product_parts(num_rows: int, n: int, k: int) -> int:
    """Of a product [num_rows, k] x [k, n] for `split_product`; 1: as it is. What was best of 2, 4 and 8 parts at 80 to 256 rows of four
    layers (H200, cuBLAS of CUDA 13: docs/perf-log.md)."""
    wanted = min(8192 // n, k // 1024, 4)
    return 1 << wanted.bit_length() - 1 if wanted > 1 and num_rows <= MAX_SPLIT_PRODUCT_ROWS and k % 32 == 0 else 1


def fixed_order_linear_config(k: int, element_bytes: int) -> FixedOrderLinearConfig:
    """Of the layer alone, never of the batch: 4 to 8 chunks, so that small layers fill a device. Not measured yet."""
    if element_bytes == 4:
        return FixedOrderLinearConfig(32, 32, 32, max(512, ceil_div(k, 8 * 32) * 32), num_warps=4, num_stages=2)
    return FixedOrderLinearConfig(64, 128, 64, max(512, ceil_div(k, 8 * 64) * 64), num_warps=8, num_stages=4)


def greedy_sample_config(vocab_size: int) -> GreedySampleConfig:
    """Tiles of 4096 logits: 23 programs for one row of 92544, so that a batch of one is not left to a single program."""
    return GreedySampleConfig(clamp(next_power_of_2(vocab_size), 16, 4096), num_warps=4)


def sample_config(num_rows: int, vocab_size: int) -> SampleConfig:
    """Tiles of 4096 logits, 16 a thread: their 64 bit weights have to stay in registers. Copies of 32 MiB in all, 8192 weights at least."""
    block_v = clamp(next_power_of_2(vocab_size), 16, 4096)
    return SampleConfig(block_v, clamp((8 << 20) // max(num_rows, 1), 8192, 65536), num_warps=clamp(block_v // 512, 1, 8))


def w4a16_linear_config(
    num_rows: int, n: int, k: int, group_size: int, num_sms: int, *, has_descriptors: bool
) -> W4A16LinearConfig:
    """n must be a multiple of 64, group_size one of 64. Measured on an H200. Few rows: instructions bound the time, so scales come after
    the product, and weights come ahead into registers, in programs of 16 warps together on a multiprocessor. From 64 rows on x comes by
    the copy engine; layers whose tiles do not fill the device by themselves are split, their weights ahead too."""
    block_m = clamp(next_power_of_2(num_rows), MIN_DOT_ROWS, 128)
    is_few = block_m < 64
    block_k = 128 if group_size % 128 == 0 and is_few else 64
    num_warps = 8 if n % 128 == 0 else 4
    row_blocks = ceil_div(num_rows, block_m)
    comes_ahead = k % (2 * block_k) == 0 and (is_few or (has_descriptors and n // 128 * row_blocks < num_sms))
    if comes_ahead:
        ahead = 4 if block_m == MIN_DOT_ROWS and k % (4 * block_k) == 0 else 2
        is_small = ahead == 4 or block_m == 64
        num_warps = 4 if is_small else num_warps
        tiles = n // (16 * num_warps) * row_blocks
        num_splits = w4a16_splits(tiles, (4 if is_small else 2) * num_sms, k, 2 * block_k)
        return W4A16LinearConfig(block_m, block_k, num_splits, num_warps, 3, ahead, is_few, not is_few)
    tiles = n // (16 * num_warps) * row_blocks
    num_splits = w4a16_splits(tiles, (3 if is_few else 2 if block_m == 64 else 1) * num_sms, k, block_k)
    num_stages = 6 if block_m == 64 else 4
    return W4A16LinearConfig(block_m, block_k, num_splits, num_warps, num_stages, 0, is_few, has_descriptors and not is_few)


def w4a16_splits(tiles: int, places: int, k: int, block_k: int) -> int:
    """Splits of each tile's inputs that come nearest to a program a place, two steps each at least."""
    return clamp((places + tiles // 2) // tiles, 1, clamp(k // (2 * block_k), 1, 16))


def quantize_rows_config(n: int) -> QuantizeRowsConfig:
    """A whole row a program, at most 128 elements a thread. 8 to 64 elements a thread are equally fast (H200: docs/perf-log.md)."""
    if not 1 <= n <= MAX_QUANTIZED_ROW:
        raise ConfigError(f"{n} columns are outside [1, {MAX_QUANTIZED_ROW}], what the kernel of 8 bit rows takes")
    block_n = next_power_of_2(n)
    return QuantizeRowsConfig(block_n, num_warps=clamp(block_n // 1024, 1, 16))


def w8a8_linear_config(num_rows: int, n: int, k: int, num_sms: int, *, has_descriptors: bool) -> W8A8LinearConfig:
    """Tiles that keep the matrix units busy from 512 rows on; below, splits until every multiprocessor has a program, since the
    weight's bytes and what each tile reads from the L2 cache bound the time. Timed on an H200, not swept."""
    block_m = clamp(next_power_of_2(num_rows), MIN_DOT_ROWS, 128)
    if num_rows > 512 and has_descriptors:
        return W8A8LinearConfig(128, 256, 128, 1, 8, True, num_warps=8, num_stages=4)
    block_n = 128
    tiles = ceil_div(n, block_n) * ceil_div(num_rows, block_m)
    most = min(k // 1024, MAX_PARTS // (tiles * block_m * block_n)) if tiles < num_sms else 1
    num_splits = clamp(ceil_div(num_sms, tiles) if 3 * tiles > 2 * num_sms else num_sms // tiles, 1, clamp(most, 1, 8))
    num_warps = 8 if block_m == 128 else 4
    num_stages = 4 if has_descriptors else 3  # before sm_90: 99 KiB of shared memory, and operands take registers
    return W8A8LinearConfig(block_m, block_n, 128, num_splits, 8, has_descriptors, num_warps, num_stages)
