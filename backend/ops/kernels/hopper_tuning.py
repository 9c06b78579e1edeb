"""Tile choice of the kernels that are for Hopper alone, and what they take: pure functions of shapes, as in tuning.py."""

from dataclasses import dataclass, replace

from .tuning import MAX_PARTS, MIN_DOT_ROWS, ceil_div, clamp, narrow_splits, next_power_of_2

__all__ = [
    "HopperGateUpConfig",
    "HopperNarrowConfig",
    "HopperRowConfig",
    "HopperTiles",
    "hopper_gate_up_config",
    "hopper_narrow_config",
    "hopper_row_config",
    "hopper_row_w4a16_blocks",
    "hopper_w4a16_config",
    "hopper_w4a16_parts",
    "hopper_w4a16_tiles",
    "hopper_w8a8_config",
    "hopper_w8a8_parts",
    "hopper_w8a8_tiles",
    "is_for_hopper_gate_up",
    "rows_of_hopper_tile",
    "takes_hopper_gate_up",
    "takes_hopper_narrow",
    "takes_hopper_prefill",
    "takes_hopper_row",
    "takes_hopper_row_w4a16",
    "takes_hopper_w4a16",
    "takes_hopper_w8a8",
]

#: Of `hopper_prefill_attention`, whose program has a multiprocessor to itself; 3 to 6 are within 2 % of each other.
HOPPER_PREFILL_STAGES = 6
#: Dense layers with a gate have a kernel of their own again from so many rows on, where the chip is Hopper's: one of the token counts that
#: a runner warms up with. It joins SiLU to cuBLAS's speed. A third row block takes as long for a few rows as for 128: 320 rows take 133 us,
#: cuBLAS and SiLU 120; at 384 both take 135, and 448 rows 182 and 288 (8B, H200: docs/perf-log.md).
MIN_HOPPER_GATE_UP_ROWS, HOPPER_GATE_UP_GAP = 256, range(257, 353)
#: Up to so many rows `hopper_narrow_linear` has the layers of `narrow_linear` that leave parts or have a gate. Steps of 8 to 32 rows are
#: 2 to 3 % (8B) and 5 to 6 % (1.8B) shorter with it, of 64 rows 1.3 and half a percent, of 96 2.5 % longer (H200: docs/perf-log.md).
MAX_HOPPER_NARROW_ROWS = 64
#: And gated ones that fill the device with tiles of 128 columns up to so many: gate and up of 72 and 128 rows take 63 and 65 us, cuBLAS and
#: SiLU 66 and 73; from 129 to 192 rows as long as these (8B, H200: docs/perf-log.md).
MAX_HOPPER_NARROW_GATED_ROWS = 128
#: So many rows of 4 bit weights and more are `hopper_w4a16_linear`'s on sm_90: a layer's four products take 78 us of 64 rows where the
#: plain kernel has 99; of 32 rows 64 before their parts are read, and 65 (8B, H200: docs/perf-log.md).
MIN_HOPPER_W4A16_ROWS = 33
#: Rows of all parts of a tile that are left to who reads their sum: output and down projections of up to 64 rows, q, k and v of up to 128.
MAX_HOPPER_W4A16_PART_ROWS = 256
#: Rows of int8 that are `hopper_w8a8_linear`'s on sm_90: a layer's four products with two norms and 8 bit rows take 77 us of 64 and 89 of
#: 128 where the plain kernel has 95 and 121, those of 32 some 73 and 88 (8B, H200: docs/perf-log.md). More than 512 were not timed.
MIN_HOPPER_W8A8_ROWS, MAX_HOPPER_W8A8_ROWS = 17, 512
#: From so many on two row blocks share tiles of 256 outputs, where those of 128 outputs would have all rows.
MIN_WIDE_HOPPER_W8A8_ROWS = 193
#: Parts of a tile that are left to who reads the sum. What reads 256 rows takes 1.5 us more for each part: output and down projections of
#: up to 192 rows are faster by few parts than by more or by equal shares, of 256 rows slower (8B, H200: docs/perf-log.md).
MAX_HOPPER_W8A8_PARTS = 3


@dataclass(frozen=True, slots=True)
class HopperGateUpConfig:
    num_stages: int  # steps of 64 inputs that a program has room for
    group_m: int  # row blocks that go by together


@dataclass(frozen=True, slots=True)
class HopperRowConfig:
    num_stages: int  # steps of 16 outputs by 1024 inputs that a program has room for, 32 KiB each
    num_warps: int


class _RowTile:
    """Rows of x that a program pads its own to: a power of two, 96, 160 or 192."""

    block_m: int

    @property
    def low(self) -> int:
        """The largest power of two in block_m."""
        return 1 << self.block_m.bit_length() - 1

    @property
    def high(self) -> int:
        """The rows beside them, another power of two, or none."""
        return self.block_m - self.low


@dataclass(frozen=True, slots=True)
class HopperNarrowConfig(_RowTile):
    block_m: int
    num_splits: int  # programs that share a tile's inputs
    num_stages: int  # steps of 64 inputs that a program has room for
    together: int = 2  # steps that are asked for at once
    groups: int = 1  # of four warps, each with 64 columns of a tile


@dataclass(frozen=True, slots=True)
class HopperTiles(_RowTile):
    """Of the kernels that share their tiles (hopper_shares.py)."""

    block_m: int
    strips: int  # of 16 outputs a warp, of eight
    num_stages: int
    num_programs: int  # at most
    halves: int = 1  # of 64 inputs, of a step over 4 bit weights
    whole: bool = False  # programs have as many whole tiles; otherwise equal shares of all tiles' turns

    @property
    def block_n(self) -> int:
        return 128 * self.strips


def hopper_gate_up_config(num_rows: int, k: int) -> HopperGateUpConfig:
    """Four stages and the tile of y fill the shared memory. A group's rows of x are 4 MiB where all would be more than 16."""
    row_blocks = ceil_div(num_rows, 128)
    return HopperGateUpConfig(num_stages=4, group_m=row_blocks if row_blocks * k <= 65536 else clamp(16384 // k, 1, 16))


def hopper_narrow_config(num_rows: int, n: int, num_sms: int, *, gated: bool) -> HopperNarrowConfig:
    """n: columns of y, of which a program has 64, or 128 of a gated layer of more than 64 rows. A layer with more programs than there are
    multiprocessors has two on each."""
    if gated and num_rows > 64:
        block_m = 96 if num_rows <= 96 else 128
        return HopperNarrowConfig(block_m, 1, (209 << 10) // (128 * (block_m + 256)), together=1, groups=2)
    block_m = clamp(next_power_of_2(num_rows), MIN_DOT_ROWS, 128)
    tiles = ceil_div(n, 64)
    num_splits = 1 if gated else narrow_splits(tiles, block_m, num_sms)
    shared_bytes = (208 if tiles * num_splits <= num_sms else 104) << 10
    return HopperNarrowConfig(block_m, num_splits, min(shared_bytes // (128 * (block_m + (128 if gated else 64))), 12))


def takes_hopper_narrow(num_rows: int, k: int, n: int, element_bytes: int, num_sms: int, *, gated: bool, is_hopper: bool) -> bool:
    """What `hopper_narrow_linear` is written for, and faster at: 16 bits, rows of x and W at multiples of 16 bytes. n: columns of y."""
    most = MAX_HOPPER_NARROW_GATED_ROWS if gated and _fill(ceil_div(n, 128), num_sms) else MAX_HOPPER_NARROW_ROWS
    return is_hopper and element_bytes == 2 and 0 < num_rows <= most and k % 8 == 0


def hopper_row_config(k: int) -> HopperRowConfig:
    """A multiprocessor has one such program, and the next starts when it ends: with three stages, where two fit, all of a step takes
    15 to 20 % longer (H200: docs/perf-log.md)."""
    return HopperRowConfig(num_stages=5, num_warps=8 if k <= 2048 else 16)


def takes_hopper_row(num_rows: int, k: int, n: int, element_bytes: int, *, is_hopper: bool) -> bool:
    """What `hopper_row_linear` is written for: one row of 16 bits, whose x leaves the ring its room."""
    return is_hopper and num_rows == 1 and element_bytes == 2 and k % 16 == 0 and k <= 16384 and n % 2 == 0


def hopper_row_w4a16_blocks(k: int) -> int:
    """Blocks of 64 inputs that a warp takes in a step, of the eighth of all inputs that it has."""
    return 8 if k % 4096 == 0 else 4


def takes_hopper_row_w4a16(num_rows: int, k: int, n: int, group_size: int, *, is_hopper: bool) -> bool:
    """What `hopper_row_w4a16` is written for: one row, groups of 128, eighths of the inputs that are whole steps."""
    return is_hopper and num_rows == 1 and group_size == 128 and k % 2048 == 0 and k <= 16384 and n % 32 == 0


def takes_hopper_gate_up(k: int, inter: int, element_bytes: int, *, is_hopper: bool) -> bool:
    """What `hopper_gate_up` is written for: 16 bit, rows of x, W and y at multiples of 16 bytes."""
    return is_hopper and element_bytes == 2 and k % 8 == 0 and inter % 8 == 0


def is_for_hopper_gate_up(num_rows: int) -> bool:
    """Numbers of rows at which `hopper_gate_up` is faster than cuBLAS and SiLU."""
    return num_rows >= MIN_HOPPER_GATE_UP_ROWS and num_rows not in HOPPER_GATE_UP_GAP


def takes_hopper_prefill(
    group_size: int, head_dim: int, block_size: int, element_bytes: int, sliding_window: int, compute_capability: int
) -> bool:
    """What `hopper_prefill_attention` is written for: blocks of 64 keys, 16 bit, no window. It takes a sixth more work a second than the
    plain kernel (H200: docs/perf-log.md). compute_capability: 10 * major + minor."""
    is_dense = block_size == 64 and head_dim in (64, 128) and element_bytes == 2
    return group_size <= 64 and is_dense and sliding_window == 0 and compute_capability == 90


def takes_hopper_w4a16(num_rows: int, n: int, k: int, group_size: int, *, is_hopper: bool) -> bool:
    """What `hopper_w4a16_linear` is written for and faster at: tiles of 128 outputs, turns of 128 inputs that are two groups or in one."""
    is_aligned = n % 128 == 0 and k % 128 == 0 and (group_size == 64 or group_size % 128 == 0)
    return is_hopper and is_aligned and num_rows >= MIN_HOPPER_W4A16_ROWS


def hopper_w4a16_config(num_rows: int, n: int, num_sms: int) -> HopperTiles:
    """n must be a multiple of 128. Whole tiles of 256 outputs, which read x half as often, for up to 128 rows, where they keep most of the
    multiprocessors busy, else tiles of 128."""
    block_m = rows_of_hopper_tile(num_rows)
    is_wide = n % 256 == 0 and block_m <= 128 and _fill(n // 256, num_sms)
    tiles = hopper_w4a16_tiles(block_m, 2 if is_wide else 1, num_sms)
    columns = n // tiles.block_n  # alone say whether tiles are whole, so a few numbers of rows show all forms
    return _in_step(tiles, columns, columns * ceil_div(num_rows, block_m), num_sms)


def hopper_w4a16_parts(num_rows: int, n: int, k: int, num_sms: int) -> int:
    """Programs that share a tile's inputs and leave their parts to what reads the sum, at least four turns each; 1 where that would have to
    read too much, or too few multiprocessors would be busy."""
    num_parts = min(num_sms // (n // 128), k // 512, 4)
    is_little = num_rows <= 128 and rows_of_hopper_tile(num_rows) * num_parts <= MAX_HOPPER_W4A16_PART_ROWS
    return num_parts if num_parts > 1 and is_little and _fill(n // 128 * num_parts, num_sms) else 1


def hopper_w4a16_tiles(block_m: int, strips: int, num_sms: int) -> HopperTiles:
    """The most stages and programs for such tiles. 64 inputs take 128 bytes a row of x and, of 128 outputs, 4.5 KiB of words and params;
    18 KiB stay for what else the kernel needs. Three steps of 128 inputs find room with up to 192 rows."""
    halves = 2 if block_m <= 192 else 1
    return replace(_hopper_tiles(block_m, strips, halves * (128 * block_m + 4608 * strips), num_sms), halves=halves)


def takes_hopper_w8a8(num_rows: int, n: int, k: int, *, is_hopper: bool) -> bool:
    """What `hopper_w8a8_linear` is written for: whole tiles of 128 outputs and steps of 128 inputs."""
    return is_hopper and MIN_HOPPER_W8A8_ROWS <= num_rows <= MAX_HOPPER_W8A8_ROWS and n % 128 == 0 and k % 128 == 0


def hopper_w8a8_config(num_rows: int, n: int, num_sms: int) -> HopperTiles:
    """n must be a multiple of 128. Tiles of 128 outputs by all rows up to 192, which read W once; of 193 to 256 rows 256 by
    128 where n allows, whose row blocks read W together, else as few row blocks as can be. No more rows in them than must be."""
    is_wide = MIN_WIDE_HOPPER_W8A8_ROWS <= num_rows <= 256 and n % 256 == 0
    row_blocks = ceil_div(num_rows, 128 if is_wide else 256)
    tiles = hopper_w8a8_tiles(rows_of_hopper_tile(ceil_div(num_rows, row_blocks)), num_sms, 2 if is_wide else 1)
    num_tiles = n // tiles.block_n * row_blocks
    return _in_step(tiles, num_tiles, num_tiles, num_sms)


def hopper_w8a8_parts(num_rows: int, n: int, k: int, num_sms: int) -> int:
    """Programs that share a tile's inputs and leave their parts to what reads the sum, at least four turns each; 1 where as many as there
    may be would keep too few multiprocessors busy, and of more than 256 rows."""
    config = hopper_w8a8_config(num_rows, n, num_sms)
    num_tiles = n // config.block_n * ceil_div(num_rows, config.block_m)
    most = 2 if num_rows <= 128 or num_rows >= MIN_WIDE_HOPPER_W8A8_ROWS else MAX_HOPPER_W8A8_PARTS
    # A third part must be 16 turns long to pay for its reading; few programs in parts are slower than shares of 256 rows, not of fewer.
    num_parts = min(num_sms // num_tiles, max(k // 2048, 2), k // 512, most) if num_rows <= 256 else 1
    least = 2 * num_sms // (3 if num_rows >= MIN_WIDE_HOPPER_W8A8_ROWS else 5)
    return num_parts if num_parts > 1 and num_tiles * num_parts >= least else 1


def hopper_w8a8_tiles(block_m: int, num_sms: int, strips: int = 1) -> HopperTiles:
    """The most stages and programs for such tiles: a step of 128 inputs takes 128 bytes of each row and output."""
    return _hopper_tiles(block_m, strips, 128 * (block_m + 128 * strips), num_sms)


def _fill(num_tiles: int, num_sms: int) -> bool:
    """Whether whole tiles, or parts, as many for each program, keep two thirds of the multiprocessors busy."""
    return 3 * num_tiles >= 2 * ceil_div(num_tiles, num_sms) * num_sms


def _in_step(config: HopperTiles, whole_tiles: int, num_tiles: int, num_sms: int) -> HopperTiles:
    """With as many programs as give each as many of whole_tiles, or each of num_tiles as many programs, where that fills the device: they
    are at the same inputs at the same time. Else as it is."""
    if _fill(whole_tiles, num_sms):
        return replace(config, num_programs=ceil_div(whole_tiles, ceil_div(whole_tiles, num_sms)), whole=True)
    num_programs = config.num_programs // num_tiles * num_tiles  # none where there are more tiles than programs
    return replace(config, num_programs=num_programs) if num_programs and _fill(num_programs, num_sms) else config


def rows_of_hopper_tile(num_rows: int) -> int:
    """What num_rows are padded to, up to 256."""
    if 128 < num_rows <= 192:
        return ceil_div(num_rows, 32) * 32
    return clamp(next_power_of_2(num_rows), MIN_DOT_ROWS, 256)


def _hopper_tiles(block_m: int, strips: int, stage_bytes: int, num_sms: int) -> HopperTiles:
    num_stages = min((209 << 10) // stage_bytes, 8)
    return HopperTiles(block_m, strips, num_stages, min(num_sms, MAX_PARTS // (2 * 128 * strips * block_m)))
