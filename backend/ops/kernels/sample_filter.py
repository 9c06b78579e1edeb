"""The smallest weight that top-k and top-p keep in each row, without a sort: three launches that narrow it down.

    weights >= 2^42, 2^40, .. 1     counted and summed in every tile          the bracket [low, high) of a factor 4 that holds the answer
    16 parts of the bracket         the same; rows of top-p alone             a bracket of a 16th
    what is left                    copied together, searched by one program  the answer

Whoever is last of a row's programs to finish adds up the row and decides. Sums are of whole numbers, so nothing depends on who that is.
Tokens above the bracket are known by their sum alone; those of a row with top-k, fewer than k, are copied with the rest, since top-p
then counts in what top-k has left. A bracket with more weights than there is room for, all but equal ones, is searched where they lie.
"""

import triton
import triton.language as tl

from .launch import wait_for_previous
from .sample_weights import LARGEST_WEIGHT_BITS, PACKED_NUMBERS, draws_randomly, row_largest, searches, tile_weights
from .split_sum import is_last_of

__all__ = ["NUM_BINS", "bins_kernel", "refine_kernel"]

NUM_BINS = tl.constexpr(32)  # places a tile has for its sums; 22 powers of 4, or 16 parts
_NUM_POWERS = tl.constexpr(22)
_NUM_PARTS = tl.constexpr(16)
#: Below 2^18 the whole vocabulary (fewer than 2^19 tokens) weighs less than 1 in 128 of the largest: top_p up to 0.99 ends before.
_LAST_POWER_OF_TOP_P = tl.constexpr(13)


@triton.jit
def _bits_of_power(power):
    """fp32 bits of 2^(42 - 2 power)."""
    return (127 + 42 - 2 * power) << 23


@triton.jit
def _row_sums(counts_ptr, masses_ptr, row, tiles, bins, NUM_TILES: tl.constexpr):
    """(counts, sums of weights) of each bin over the row's tiles."""
    offs = (row * NUM_TILES + tiles)[:, None] * NUM_BINS + bins[None, :]
    mask = (tiles < NUM_TILES)[:, None] & (bins >= 0)[None, :]
    counts = tl.load(counts_ptr + offs, mask=mask, other=0, cache_modifier=".cg")
    masses = tl.load(masses_ptr + offs, mask=mask, other=0, cache_modifier=".cg")
    return tl.sum(counts, axis=0), tl.sum(masses, axis=0)


@triton.jit
def _store_places(places_ptr, num_ptr, row, tiles, counts, NUM_TILES: tl.constexpr):
    """Where each tile's weights begin among the row's, and how many there are."""
    ends = tl.cumsum(counts, axis=0)
    tl.store(places_ptr + row * (NUM_TILES + 1) + tiles, ends - counts, mask=tiles < NUM_TILES)
    num = tl.sum(counts, axis=0)
    tl.store(places_ptr + row * (NUM_TILES + 1) + NUM_TILES, num)
    tl.store(num_ptr + row, num)


@triton.jit(do_not_specialize=PACKED_NUMBERS)
def bins_kernel(
    source_ptr,
    temperature_ptr,
    tile_values_ptr,
    top_k_ptr,
    top_p_ptr,
    counts_ptr,
    masses_ptr,
    totals_ptr,
    total_ptr,
    base_ptr,
    low_ptr,
    high_ptr,
    num_ptr,
    places_ptr,
    counters_ptr,
    stride_row,
    VOCAB: tl.constexpr,
    NUM_TILES: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    tiles, _, largest = row_largest(tile_values_ptr, row, NUM_TILES, BLOCK_T)
    if not (draws_randomly(top_k, largest) & searches(top_k, top_p, VOCAB)):
        return
    has_top_k = top_k < VOCAB
    weights = tile_weights(source_ptr, temperature_ptr, tile, row, largest, stride_row, VOCAB, HAS_TEMPERATURE, BLOCK_V)
    wide = weights.to(tl.int64)
    bits = weights.to(tl.int32, bitcast=True)
    bins = tl.arange(0, NUM_BINS)
    counts = tl.zeros((NUM_BINS,), tl.int32)
    masses = tl.zeros((NUM_BINS,), tl.int64)
    # The first power of 4 that a weight of this tile reaches; what a bin has, those after it have at least.
    power = tl.maximum((127 + 43 - (tl.max(bits, axis=0) >> 23)) // 2, 0)
    more = power < _NUM_POWERS
    while more:
        is_in = bits >= _bits_of_power(power)
        count = tl.sum(is_in.to(tl.int32), axis=0)
        counts = tl.where(bins >= power, count, counts)
        masses = tl.where(bins >= power, tl.sum(tl.where(is_in, wide, 0), axis=0), masses)
        power += 1
        is_needed = tl.where(has_top_k, count < top_k, (power < _LAST_POWER_OF_TOP_P) | (top_p > 0.99))
        more = is_needed & (power < _NUM_POWERS)
    at = row * NUM_TILES + tile
    tl.store(counts_ptr + at * NUM_BINS + bins, counts)
    tl.store(masses_ptr + at * NUM_BINS + bins, masses)
    tl.store(totals_ptr + at, tl.sum(wide, axis=0))
    if is_last_of(counters_ptr + row, NUM_TILES):
        total = tl.sum(tl.load(totals_ptr + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=0, cache_modifier=".cg"))
        counts, masses = _row_sums(counts_ptr, masses_ptr, row, tiles, bins, NUM_TILES)
        reaches = tl.where(has_top_k, counts >= top_k, masses.to(tl.float64) >= top_p * total.to(tl.float64))
        chosen = tl.min(tl.where(reaches & (bins < _NUM_POWERS), bins, _NUM_POWERS), axis=0)
        # fewer than k weights that are not zero: all are kept
        low = tl.where(chosen < _NUM_POWERS, _bits_of_power(chosen), 0)
        chosen = tl.minimum(chosen, _NUM_POWERS - 1)
        high = tl.where(chosen > 0, _bits_of_power(chosen - 1), LARGEST_WEIGHT_BITS + 1)
        above = tl.sum(tl.where(bins == chosen - 1, masses, 0), axis=0)
        tl.store(low_ptr + row, low)
        tl.store(high_ptr + row, high)
        tl.store(base_ptr + row, tl.where(has_top_k, 0, above))
        tl.store(total_ptr + row, total)
        tile_counts_ptr = counts_ptr + (row * NUM_TILES + tiles) * NUM_BINS + chosen
        tile_counts = tl.load(tile_counts_ptr, mask=tiles < NUM_TILES, other=0, cache_modifier=".cg")
        _store_places(places_ptr, num_ptr, row, tiles, tile_counts, NUM_TILES)


@triton.jit(do_not_specialize=PACKED_NUMBERS)
def refine_kernel(
    source_ptr,
    temperature_ptr,
    tile_values_ptr,
    top_k_ptr,
    top_p_ptr,
    counts_ptr,
    masses_ptr,
    total_ptr,
    base_ptr,
    low_ptr,
    high_ptr,
    num_ptr,
    places_ptr,
    counters_ptr,
    stride_row,
    VOCAB: tl.constexpr,
    NUM_TILES: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of top-p alone: low, high, base, places and num of a 16th of their bracket."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    tiles, _, largest = row_largest(tile_values_ptr, row, NUM_TILES, BLOCK_T)
    if (top_k < VOCAB) | (top_p >= 1.0) | (largest == float("-inf")):
        return
    low = tl.load(low_ptr + row)
    high = tl.load(high_ptr + row)
    bins = tl.arange(0, NUM_BINS)
    bounds = low + (high - low) // _NUM_PARTS * tl.minimum(bins, _NUM_PARTS - 1)
    counts = tl.zeros((NUM_BINS,), tl.int32)
    masses = tl.zeros((NUM_BINS,), tl.int64)
    weights = tile_weights(source_ptr, temperature_ptr, tile, row, largest, stride_row, VOCAB, HAS_TEMPERATURE, BLOCK_V)
    bits = weights.to(tl.int32, bitcast=True)
    bits = tl.where(bits < high, bits, 0)
    wide = weights.to(tl.int64)
    if tl.max(bits, axis=0) >= low:
        for part in range(_NUM_PARTS):
            is_in = bits >= low + (high - low) // _NUM_PARTS * part
            counts = tl.where(bins == part, tl.sum(is_in.to(tl.int32), axis=0), counts)
            masses = tl.where(bins == part, tl.sum(tl.where(is_in, wide, 0), axis=0), masses)
    at = row * NUM_TILES + tile
    tl.store(counts_ptr + at * NUM_BINS + bins, counts)
    tl.store(masses_ptr + at * NUM_BINS + bins, masses)
    if is_last_of(counters_ptr + row, NUM_TILES):
        base = tl.load(base_ptr + row)
        total = tl.load(total_ptr + row)
        _row_counts, masses = _row_sums(counts_ptr, masses_ptr, row, tiles, bins, NUM_TILES)
        reaches = (base + masses).to(tl.float64) >= top_p * total.to(tl.float64)
        chosen = tl.max(tl.where(reaches & (bins < _NUM_PARTS), bins, 0), axis=0)
        above = tl.sum(tl.where(bins == chosen + 1, masses, 0), axis=0)
        tl.store(base_ptr + row, base + above)
        tl.store(low_ptr + row, tl.max(tl.where(bins == chosen, bounds, 0), axis=0))
        next_bound = tl.max(tl.where(bins == chosen + 1, bounds, 0), axis=0)
        tl.store(high_ptr + row, tl.where(chosen == _NUM_PARTS - 1, high, next_bound))
        mine_ptr = counts_ptr + (row * NUM_TILES + tiles) * NUM_BINS + chosen
        mine = tl.load(mine_ptr, mask=tiles < NUM_TILES, other=0, cache_modifier=".cg")
        higher = tl.load(mine_ptr + 1, mask=tiles < NUM_TILES, other=0, cache_modifier=".cg")  # past the last part: 0
        _store_places(places_ptr, num_ptr, row, tiles, mine - higher, NUM_TILES)
