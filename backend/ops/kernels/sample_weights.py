"""What the kernels of a random draw share: a tile of logits, the whole-number weights of a draw, and where both are kept.

The arithmetic is that of `reference/sample.py`, operation by operation in fp32: launch with `EXACT`, so that no product is fused into a
sum. Weights are whole and at most 2^44: fp32 holds each, their bits are in their order, and int64 sums are exact in any order.
"""

import triton
import triton.language as tl

from ..reference.sample import LOG2_E, POWER_OF_2_COEFFICIENTS, WEIGHT_BITS

__all__ = [
    "EXACT",
    "LARGEST_WEIGHT_BITS",
    "PACKED_NUMBERS",
    "draws_randomly",
    "row_largest",
    "searches",
    "shaped",
    "smallest_by_min_p",
    "tile_weights",
]

#: Launch options of every kernel that computes logits or weights.
EXACT = {"enable_fp_fusion": False}

#: Arguments that are parts of one packed array, for do_not_specialize: whether they are aligned changes from step to step and must not
#: choose another compiled kernel.
PACKED_NUMBERS = [
    "temperature_ptr", "repetition_ptr", "presence_ptr", "frequency_ptr", "slots_ptr", "bias_starts_ptr", "bias_ids_ptr", "bias_ptr",
    "banned_starts_ptr", "banned_ids_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr",
]  # fmt: skip

_LOG2_E = tl.constexpr(LOG2_E)
_EXPONENT = tl.constexpr(127 + WEIGHT_BITS)
_LARGEST = tl.constexpr(2.0**WEIGHT_BITS)
LARGEST_WEIGHT_BITS = tl.constexpr((127 + WEIGHT_BITS) << 23)  # the largest weight's, as fp32
_C1, _C2, _C3, _C4, _C5, _C6 = (tl.constexpr(c) for c in POWER_OF_2_COEFFICIENTS[1:])


@triton.jit
def shaped(
    logits,
    ids,
    mask,
    row,
    temperature_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    slots_ptr,
    counts_ptr,
    seen_ptr,
    VOCAB: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
):
    """Biased fp32 logits of `ids` in a row, divided by its temperature and penalised."""
    logits = tl.where(logits == logits, logits, float("-inf"))
    if HAS_TEMPERATURE:
        logits = tl.div_rn(logits, tl.load(temperature_ptr + row).to(tl.float32))
    if HAS_PENALTIES:
        line = tl.load(slots_ptr + row) * VOCAB
        repetition = tl.load(repetition_ptr + row).to(tl.float32)
        penalised = tl.where(logits < 0, logits * repetition, tl.div_rn(logits, repetition))
        logits = tl.where(tl.load(seen_ptr + line + ids, mask=mask, other=0) != 0, penalised, logits)
        count = tl.load(counts_ptr + line + ids, mask=mask, other=0).to(tl.float32)
        logits = logits - tl.load(presence_ptr + row).to(tl.float32) * (count > 0).to(tl.float32)
        logits = logits - tl.load(frequency_ptr + row).to(tl.float32) * count
    return logits


@triton.jit
def weights_of(logits, largest):
    """floor(2^44 e^(logits - largest)), as fp32."""
    x = tl.where(logits == largest, 0.0, logits - largest)
    t = tl.maximum(x * _LOG2_E, -64.0)
    whole = tl.floor(t)
    fraction = t - whole
    power = fraction * _C6 + _C5
    power = power * fraction + _C4
    power = power * fraction + _C3
    power = power * fraction + _C2
    power = power * fraction + _C1
    power = power * fraction + 1.0
    scale = ((whole.to(tl.int32) + _EXPONENT) << 23).to(tl.float32, bitcast=True)
    return tl.floor(power * scale)


@triton.jit
def row_largest(tile_values_ptr, row, NUM_TILES: tl.constexpr, BLOCK_T: tl.constexpr):
    """(tile numbers, the largest logit of each tile, that of the row)."""
    tiles = tl.arange(0, BLOCK_T)
    values = tl.load(tile_values_ptr + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=float("-inf"))
    return tiles, values, tl.max(values, axis=0)


@triton.jit
def tile_weights(
    source_ptr,
    temperature_ptr,
    tile,
    row,
    largest,
    stride_row,
    VOCAB: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Weights of the tile's BLOCK_V ids, fp32; 0 past the vocabulary. source: the model's logits, or shaped ones (no temperature)."""
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = ids < VOCAB
    logits = tl.load(source_ptr + row * stride_row + ids, mask=mask, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("-inf"))
    if HAS_TEMPERATURE:
        logits = tl.div_rn(logits, tl.load(temperature_ptr + row).to(tl.float32))
    return tl.where(mask, weights_of(logits, largest), 0.0)


@triton.jit
def draws_randomly(top_k, largest):
    """Neither greedy nor without one finite logit."""
    return (top_k > 1) & (largest > float("-inf"))


@triton.jit
def searches(top_k, top_p, VOCAB: tl.constexpr):
    """What is kept depends on other weights than the row's largest."""
    return (top_k < VOCAB) | (top_p < 1.0)


@triton.jit
def smallest_by_min_p(min_p):
    """min_p: fp64. The smallest weight that it keeps, int64."""
    scaled = min_p * _LARGEST
    whole = scaled.to(tl.int64)
    return whole + (whole.to(tl.float64) < scaled).to(tl.int64)
