"""Words of quantised pages on their way into a product: where a key's lie, how they are loaded, how their bits become numbers.

Stored numbers are widened by their bits alone, two at a time (PTX; plain shifts in triton's interpreter): 0x6400 | v is 1024 + v in fp16.
What stands in which lane, quantized_decode_attention.py says.
"""

import triton
import triton.language as tl

__all__ = ["block_of", "fast_exp2", "fast_inverse", "fast_log2", "key_rows", "load_params", "load_words", "tile_start", "widened"]

#: $0..$3: bytes 0..3 of the words $4 (low halves) and $5 (high halves), as 1024 + v.
_WIDEN_8 = tl.constexpr("""{
    .reg .b32 u;
    prmt.b32 u, $4, $5, 0x5140;
    prmt.b32 $0, u, 0x64646464, 0x4140;
    prmt.b32 $1, u, 0x64646464, 0x4342;
    prmt.b32 u, $4, $5, 0x7362;
    prmt.b32 $2, u, 0x64646464, 0x4140;
    prmt.b32 $3, u, 0x64646464, 0x4342;
}""")
#: $0..$3: the low nibbles of bytes 0..3 of $8 and $9, as 1024 + v; $4..$7: the high ones, as 1024 + 16 v.
_WIDEN_4 = tl.constexpr("""{
    .reg .b32 u;
    prmt.b32 u, $8, $9, 0x5410;
    lop3.b32 $0, u, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $4, u, 0x00F000F0, 0x64006400, 0xEA;
    shr.b32 u, u, 8;
    lop3.b32 $1, u, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $5, u, 0x00F000F0, 0x64006400, 0xEA;
    prmt.b32 u, $8, $9, 0x7632;
    lop3.b32 $2, u, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $6, u, 0x00F000F0, 0x64006400, 0xEA;
    shr.b32 u, u, 8;
    lop3.b32 $3, u, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $7, u, 0x00F000F0, 0x64006400, 0xEA;
}""")
#: $0..$3: the e4m3 bytes 0..3 of the words $4 and $5 as fp16 numbers of the same bits, which are 2^-8 of theirs.
_WIDEN_E4M3 = tl.constexpr(
    "{\n    .reg .b32 u, w, m;\n"
    + "".join(
        f"    prmt.b32 u, $4, $5, {pair};\n"
        + "".join(
            f"    prmt.b32 w, u, 0, {place};\n    shr.b32 m, w, 1;\n    and.b32 m, m, 0x3F803F80;\n"
            f"    lop3.b32 ${out}, w, 0x80008000, m, 0xEA;\n"
            for out, place in ((first, "0x1404"), (first + 1, "0x3424"))
        )
        for first, pair in ((0, "0x5140"), (2, "0x7362"))
    )
    + "}"
)
_CONSTRAINTS_8 = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 2))
_CONSTRAINTS_4 = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 2))


@triton.jit
def fast_exp2(x, ASM: tl.constexpr):
    """Without the care for subnormal results that tl.exp2 takes: three instructions less."""
    if ASM:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def fast_log2(x, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def fast_inverse(x, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def _four(a, b, c, d):
    """[...] each -> [..., 2, 2]: the last dim is the high bit of the index."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def widened(words, BITS: tl.constexpr, E4M3: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """words: int32 [...], an even number along the last dim -> two tensors [..., 2, 2] of `dtype`, a byte's index in the last two dims.

    8 bit: the bytes, and the same again. 4 bit: low nibbles and 16 times the high ones. fp16: plus 1024; the asm takes words in pairs.
    e4m3: 2^-8 of the numbers that the bytes are.
    """
    if ASM:
        if BITS == 8:
            a, b, c, d = tl.inline_asm_elementwise(
                _WIDEN_E4M3 if E4M3 else _WIDEN_8, _CONSTRAINTS_8, [words], (tl.float16,) * 4, is_pure=True, pack=2
            )
            low = _four(a, b, c, d)
            high = low
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                _WIDEN_4, _CONSTRAINTS_4, [words], (tl.float16,) * 8, is_pure=True, pack=2
            )
            low = _four(a, b, c, d)
            high = _four(e, f, g, h)
    else:
        offset: tl.constexpr = 1024 if dtype == tl.float16 else 0
        mask: tl.constexpr = 15 if BITS == 4 else 255
        low = _four(words & mask, (words >> 8) & mask, (words >> 16) & mask, (words >> 24) & mask)
        high = low
        if BITS == 4:
            high = _four((words >> 4) & 15, (words >> 12) & 15, (words >> 20) & 15, (words >> 28) & 15) * 16
        if E4M3:
            low = (((low & 128) << 8) | ((low & 127) << 7)).to(tl.int16).to(tl.float16, bitcast=True).to(dtype)
            high = low
        else:
            low = (low + offset).to(dtype)
            high = (high + offset).to(dtype)
    return low, high


@triton.jit
def block_of(table_ptr, tile, last, BLOCK_SIZE: tl.constexpr):
    """Id of the block in which the tile begins; past the last key: of the last block. int64: the pool may pass 2^31."""
    return tl.load(table_ptr + tl.minimum(tile, last) // BLOCK_SIZE).to(tl.int64)


@triton.jit
def tile_start(block, tile, stride_block, stride_token, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offset, int64, of what `key_rows` gives; block: of the tile, which counts where a tile lies in one."""
    start = block * stride_block + tile % BLOCK_SIZE * stride_token if BLOCK_SIZE % BLOCK_N == 0 else block * 0
    return start


@triton.jit
def key_rows(table_ptr, tile, keys, last, stride_block, stride_token, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of the keys `tile` + keys from `tile_start`: int32 where they lie in a block. Past `last` others of it, or `last` itself."""
    if BLOCK_SIZE % BLOCK_N == 0:
        rows = keys * stride_token
    else:
        keys = tl.minimum(tile + keys, last)
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE).to(tl.int64)
        rows = blocks * stride_block + keys % BLOCK_SIZE * stride_token
    return rows


@triton.jit
def load_words(ptr, rows, words, HALF: tl.constexpr, IS_PADDED: tl.constexpr):
    """rows: [32 N8]; words: [32 N8, NW], the places of a lane's words in the half -> int32 [32 N8, NW]."""
    ptrs = ptr + rows[:, None] + words
    if IS_PADDED:
        return tl.load(ptrs, mask=words < HALF // 4, other=0)
    return tl.load(ptrs)


@triton.jit
def load_params(ptr, rows, part: tl.constexpr, dtype: tl.constexpr):
    """fp32 (scale, zero) of keys: [BLOCK_N] each. A pair of 16 bit numbers is one word."""
    if ptr.dtype.element_ty == tl.float32:
        scale = tl.load(ptr + rows + 2 * part)
        zero = tl.load(ptr + rows + 2 * part + 1)
    else:
        word = tl.load(ptr + rows + part)
        scale = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        zero = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return scale, zero
