"""The last of sample_filter.py's launches: what is left of a row's weights is copied together, and one program finds the smallest kept.

Brackets of bits are halved and more: each pass over what is left asks at four places and draws both ends in to weights that are there.
"""

import triton
import triton.language as tl

from .launch import wait_for_previous
from .sample_weights import (
    LARGEST_WEIGHT_BITS,
    PACKED_NUMBERS,
    draws_randomly,
    row_largest,
    searches,
    smallest_by_min_p,
    tile_weights,
)
from .split_sum import is_last_of

__all__ = ["search_kernel"]

_WEIGHTS_A_BLOCK = tl.constexpr(2048)
_NUM_BOUNDS = tl.constexpr(4)


@triton.jit
def _block_of_weights(
    begin,
    num,
    is_copied,
    copied_ptr,
    source_ptr,
    temperature_ptr,
    row,
    largest,
    stride_row,
    VOCAB: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """Weights begin .. of those that were copied together, or of the row itself."""
    if is_copied:
        offs = begin + tl.arange(0, _WEIGHTS_A_BLOCK)
        weights = tl.load(copied_ptr + offs, mask=offs < num, other=0.0, cache_modifier=".cg")
    else:
        block = begin // _WEIGHTS_A_BLOCK
        weights = tile_weights(
            source_ptr, temperature_ptr, block, row, largest, stride_row, VOCAB, HAS_TEMPERATURE, _WEIGHTS_A_BLOCK
        )
    return weights


@triton.jit
def _smallest_kept(
    low,
    last,
    top_k,
    base,
    bound,
    num,
    is_copied,
    copied_ptr,
    source_ptr,
    temperature_ptr,
    row,
    largest,
    stride_row,
    BY_MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """The smallest v in [low, last] (bits) with fewer than top_k weights above it; BY_MASS: with base and the weights above it summing
    to less than `bound` (fp64). It is one of the weights: besides asking at 4 places between, each pass draws low and last in to what
    is there."""
    while low < last:
        places = tl.arange(0, _NUM_BOUNDS)
        bounds = low + ((last - low).to(tl.int64) * (places + 1) // (_NUM_BOUNDS + 1)).to(tl.int32)
        above = tl.zeros((_NUM_BOUNDS,), tl.int64)
        first_present = last
        last_present = low
        for begin in range(0, num, _WEIGHTS_A_BLOCK):
            weights = _block_of_weights(
                begin,
                num,
                is_copied,
                copied_ptr,
                source_ptr,
                temperature_ptr,
                row,
                largest,
                stride_row,
                VOCAB,
                HAS_TEMPERATURE,
            )
            bits = weights.to(tl.int32, bitcast=True)
            is_above = bits[None, :] > bounds[:, None]
            if BY_MASS:
                above += tl.sum(tl.where(is_above, weights.to(tl.int64)[None, :], 0), axis=1)
            else:
                above += tl.sum(is_above.to(tl.int32), axis=1).to(tl.int64)
            first_present = tl.minimum(first_present, tl.min(tl.where(bits >= low, bits, last), axis=0))
            last_present = tl.maximum(last_present, tl.max(tl.where(bits <= last, bits, low), axis=0))
        is_enough = (base + above).to(tl.float64) < bound if BY_MASS else above < top_k
        low = tl.maximum(tl.max(tl.where(is_enough, low, bounds + 1), axis=0), first_present)
        last = tl.minimum(tl.min(tl.where(is_enough, bounds, last), axis=0), last_present)
    return low


@triton.jit(do_not_specialize=[*PACKED_NUMBERS, "max_copied"])
def search_kernel(
    source_ptr,
    temperature_ptr,
    tile_values_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    total_ptr,
    base_ptr,
    low_ptr,
    high_ptr,
    num_ptr,
    places_ptr,
    copied_ptr,
    smallest_ptr,
    counters_ptr,
    max_copied,
    stride_row,
    VOCAB: tl.constexpr,
    NUM_TILES: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """smallest [num_rows], int64: of what top-k, top-p and min-p keep. copied: [num_rows, max_copied], fp32."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    _, _, largest = row_largest(tile_values_ptr, row, NUM_TILES, BLOCK_T)
    if not (draws_randomly(top_k, largest) & searches(top_k, top_p, VOCAB)):
        return
    has_top_k = top_k < VOCAB
    low = tl.load(low_ptr + row)
    high = tl.load(high_ptr + row)
    num = tl.load(num_ptr + row)
    is_copied = num <= max_copied
    mine_ptr = copied_ptr + row * max_copied
    begin = tl.load(places_ptr + row * (NUM_TILES + 1) + tile)
    if is_copied & (tl.load(places_ptr + row * (NUM_TILES + 1) + tile + 1) > begin):
        weights = tile_weights(source_ptr, temperature_ptr, tile, row, largest, stride_row, VOCAB, HAS_TEMPERATURE, BLOCK_V)
        bits = weights.to(tl.int32, bitcast=True)
        end = tl.where(has_top_k, LARGEST_WEIGHT_BITS + 1, high)
        is_in = (bits >= tl.maximum(low, 1)) & (bits < end)
        place = begin + tl.cumsum(is_in.to(tl.int32), axis=0) - 1
        tl.store(mine_ptr + place, weights, mask=is_in)
    if is_last_of(counters_ptr + row, NUM_TILES):
        num = tl.where(is_copied, num, VOCAB)
        base = tl.where(is_copied, tl.load(base_ptr + row), 0)
        last = high - 1
        total = tl.load(total_ptr + row)
        if has_top_k:
            low = _smallest_kept(
                low,
                tl.where(low > 0, last, 0),
                top_k,
                base,
                0.0,
                num,
                is_copied,
                mine_ptr,
                source_ptr,
                temperature_ptr,
                row,
                largest,
                stride_row,
                False,
                VOCAB,
                HAS_TEMPERATURE,
            )
            count = top_k * 0
            total = total * 0
            for start in range(0, num, _WEIGHTS_A_BLOCK):
                weights = _block_of_weights(
                    start,
                    num,
                    is_copied,
                    mine_ptr,
                    source_ptr,
                    temperature_ptr,
                    row,
                    largest,
                    stride_row,
                    VOCAB,
                    HAS_TEMPERATURE,
                )
                is_above = weights.to(tl.int32, bitcast=True) > low
                count += tl.sum(is_above.to(tl.int32), axis=0)
                total += tl.sum(tl.where(is_above, weights.to(tl.int64), 0), axis=0)
            total += (top_k - count) * low.to(tl.float32, bitcast=True).to(tl.int64)
            last = LARGEST_WEIGHT_BITS
        low = _smallest_kept(
            low,
            tl.where(top_p < 1.0, last, low),
            top_k,
            base,
            top_p * total.to(tl.float64),
            num,
            is_copied,
            mine_ptr,
            source_ptr,
            temperature_ptr,
            row,
            largest,
            stride_row,
            True,
            VOCAB,
            HAS_TEMPERATURE,
        )
        smallest = low.to(tl.float32, bitcast=True).to(tl.int64)
        tl.store(smallest_ptr + row, tl.maximum(smallest, smallest_by_min_p(tl.load(min_p_ptr + row))))
