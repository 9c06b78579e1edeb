"""Operands of the two products of quantised decode attention, in the order that lets each thread keep what it loaded.

What stands in which lane, and why a head has two columns, quantized_decode_attention.py says.
"""

import triton
import triton.language as tl

__all__ = ["digits_of", "k_dims_of", "of_heads", "products_of", "v_dims_of", "value_operand", "weight_operand"]


@triton.jit
def k_dims_of(k, INTEGER: tl.constexpr):
    """Byte of a key, and so its dim, that stands k-th in the product."""
    if INTEGER:
        chunk, word, lane = k // 64, k // 32 % 2 * 2 + k // 4 % 2, k // 8 % 4
    else:
        chunk, word, lane = k // 64, k // 16 % 4, k // 4 % 4
    return chunk * 64 + lane * 16 + word * 4 + k % 4


@triton.jit
def v_dims_of(row, VW: tl.constexpr):
    """Byte of a value that stands in the row of the product, of the first of the row's two."""
    CHUNK: tl.constexpr = VW if VW < 4 else 4
    word, odd, lane = row // 16, row // 8 % 2, row % 8
    return 4 * (word // CHUNK * (8 * CHUNK) + lane * CHUNK + word % CHUNK) + odd


@triton.jit
def digits_of(q, INTEGER: tl.constexpr, dtype: tl.constexpr):
    """q: fp32 [BLOCK_ROW, 2 BLOCK_G], each column twice -> (its digits, whose products are added; sums over dims: [2 BLOCK_G]).

    INTEGER: of round(q) = 256 d0 + d1, int8; |q| <= 32512. Otherwise q rounded to dtype and what that left.
    """
    is_first = (tl.arange(0, q.shape[1]) % 2 == 0)[None, :]
    if INTEGER:
        rounded = q + 12582912.0  # 1.5 * 2^23: the last bits are the integer
        number = rounded.to(tl.int32, bitcast=True) - 0x4B400000
        rounded -= 12582912.0
        first = (number + 128) >> 8
        digits = tl.where(is_first, first, number - first * 256).to(tl.int8)
    else:
        rounded = q
        first = q.to(dtype)
        digits = tl.where(is_first, first, (q - first.to(tl.float32)).to(dtype))
    return digits, tl.sum(rounded, axis=0)


@triton.jit
def of_heads(x, Q: tl.constexpr):
    """[2 BLOCK_G], pairs of one number -> [1, 1, Q, 4]."""
    return tl.reshape(tl.max(tl.reshape(x, (4 * Q, 2)), axis=1), (1, 1, Q, 4))


@triton.jit
def products_of(numbers, q, J: tl.constexpr, KW: tl.constexpr, INTEGER: tl.constexpr):
    """numbers: [(chunk, J, 8, 4), 4, 4] of keys' bytes; q: digits of `digits_of` -> fp32 [J, 8, Q, 4]."""
    if INTEGER:
        parts = tl.reshape(numbers, (KW // 4, J, 8, 4, 2, 2, 4))  # chunk j g t word_high word_low byte
        keys = tl.reshape(tl.permute(parts, (1, 2, 0, 4, 3, 5, 6)), (8 * J, 16 * KW))
        products = tl.dot(keys, q, out_dtype=tl.int32)
    else:
        parts = tl.reshape(numbers, (KW // 4, J, 8, 4, 4, 4))  # chunk j g t word byte
        keys = tl.reshape(tl.permute(parts, (1, 2, 0, 4, 3, 5)), (8 * J, 16 * KW))
        products = tl.dot(keys, q, input_precision="ieee")
    first, second = tl.split(tl.reshape(products, (J, 8, q.shape[1] // 8, 4, 2)))
    return (first * 256 + second).to(tl.float32) if INTEGER else first + second


@triton.jit
def value_operand(numbers, J: tl.constexpr, VW: tl.constexpr):
    """[(chunk, J / 2, 2, 2, 8, 4), CHUNK, 4] -> [16 VW, 2 BLOCK_N]: two bytes of a key stand side by side."""
    CHUNK: tl.constexpr = VW if VW < 4 else 4
    parts = tl.reshape(numbers, (VW // CHUNK, J // 2, 2, 2, 8, 4, CHUNK, 2, 2))  # chunk r h c g t word i p
    return tl.reshape(tl.permute(parts, (0, 6, 8, 4, 1, 2, 5, 3, 7)), (16 * VW, 16 * J))


@triton.jit
def weight_operand(weights):
    """[J, 8, Q, 4] -> [2 BLOCK_N, 2 BLOCK_G]: columns of a head's even and odd bytes, which take the key's one or the other."""
    J: tl.constexpr = weights.shape[0]
    BLOCK_G: tl.constexpr = 4 * weights.shape[2]
    parts = tl.permute(tl.reshape(weights, (J // 2, 2, 2, 4, BLOCK_G)), (0, 2, 3, 1, 4))  # r h t c head
    weights = tl.reshape(parts, (8 * J, 1, BLOCK_G, 1))
    is_own = tl.arange(0, 2)[:, None] == tl.arange(0, 2)[None, :]
    weights = tl.where(tl.reshape(is_own, (1, 2, 1, 2)), weights, 0.0)
    return tl.reshape(weights, (16 * J, 2 * BLOCK_G))
