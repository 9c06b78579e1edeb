"""Words of quantised pages on their way into a product: where a key's lie, how they are loaded, how their bits become numbers.

Stored numbers are widened by their bits alone, two at a time (PTX; plain shifts in triton's interpreter): v as the bits of an fp16 number
is 2^-24 v, a subnormal one, which the matrix unit takes like any other.
What stands in which lane, quantized_decode_attention.py says. Assembly that takes several words takes them as they lie in a thread, so its
loads must come in one piece: rows of keys are multiples of 16 bytes, and the compiler knows it. Others take plain shifts, more slowly.
"""

import triton
import triton.language as tl

__all__ = [
    "block_of",
    "load_keys",
    "load_params",
    "load_values",
    "nibbles",
    "params_of",
    "signed_bytes",
    "widened",
]

_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 4))


def _masked(operation: str) -> str:
    """$0..$3: the four bytes of the words $4..$7."""
    return "{" + "".join(operation.format(f"${i}", f"${4 + i}") for i in range(4)) + "}"


#: Low nibbles; 16 times the high ones, less 128; bytes less 128.
_LOW_NIBBLES = tl.constexpr(_masked("and.b32 {0}, {1}, 0x0F0F0F0F;\n"))
_HIGH_NIBBLES = tl.constexpr(_masked("lop3.b32 {0}, {1}, 0xF0F0F0F0, 0x80808080, 0x6A;\n"))
_SIGNED_BYTES = tl.constexpr(_masked("xor.b32 {0}, {1}, 0x80808080;\n"))


def _pairs(operation: str, count: int) -> str:
    """`operation` on the words a ($2 count) and b: `count` pairs of fp16 numbers each."""
    return (
        "{.reg .b32 u, m;\n"
        + "".join(operation.format(*(f"${count * i + j}" for j in range(count)), word=f"${2 * count + i}") for i in range(2))
        + "}"
    )


#: Bytes 0 and 2, then 1 and 3 of a word, then the next's: as 2^-24 v.
_WIDEN_8 = tl.constexpr(_pairs("prmt.b32 {0}, {word}, 0, 0x4240;\nprmt.b32 {1}, {word}, 0, 0x4341;\n", 2))
#: The same as e4m3 numbers: fp16 numbers of the same bits, which are 2^-8 of theirs.
_WIDEN_E4M3 = tl.constexpr(
    _pairs(
        "".join(
            f"{spread}shr.b32 m, u, 1;\nand.b32 m, m, 0x3F803F80;\nlop3.b32 {{{out}}}, u, 0x80008000, m, 0xEA;\n"
            for out, spread in enumerate(("shl.b32 u, {word}, 8;\n", "mov.b32 u, {word};\n"))
        ),
        2,
    )
)
#: Low nibbles of bytes 0 and 2, of 1 and 3, as 2^-24 v; the high ones alike, as 2^-20 v.
_WIDEN_4 = tl.constexpr(
    _pairs(
        "shr.b32 u, {word}, 8;\n"
        "and.b32 {0}, {word}, 0x000F000F;\nand.b32 {1}, u, 0x000F000F;\n"
        "and.b32 {2}, {word}, 0x00F000F0;\nand.b32 {3}, u, 0x00F000F0;\n",
        4,
    )
)
_PAIR_CONSTRAINTS_8 = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 2))
_PAIR_CONSTRAINTS_4 = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 2))


@triton.jit
def _four(a, b, c, d):
    """[...] each -> [..., 2, 2]: the last dim is the high bit of the index."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _bytes(words):
    """int32 [rows, words] -> [rows, words, 4]."""
    four = _four(words & 255, (words >> 8) & 255, (words >> 16) & 255, (words >> 24) & 255)
    return tl.reshape(tl.permute(four, (0, 1, 3, 2)), (words.shape[0], words.shape[1], 4))


@triton.jit
def _four_words(words, OPERATION: tl.constexpr):
    """int32 [rows, 4] -> int8 [rows, 4, 4]: bytes of what OPERATION makes of the words, which a thread holds in one piece."""
    a, b, c, d = tl.inline_asm_elementwise(OPERATION, _CONSTRAINTS, [words], (tl.int8,) * 4, is_pure=True, pack=4)
    # a is word 0: its last dim stands for bytes
    return tl.reshape(tl.permute(_four(a, b, c, d), (0, 3, 2, 1)), (words.shape[0], 4, 4))


@triton.jit
def nibbles(words, INTEGER: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Keys. int32 [rows, words] -> two tensors [rows, words, 4]: low nibbles; 16 times the high ones, less 128."""
    if INTEGER and ASM:
        low = _four_words(words, _LOW_NIBBLES)
        high = _four_words(words, _HIGH_NIBBLES)
    else:
        number_type: tl.constexpr = tl.int8 if INTEGER else dtype
        numbers = _bytes(words)
        low = (numbers & 15).to(number_type)
        high = ((numbers & 240) - 128).to(number_type)
    return low, high


@triton.jit
def signed_bytes(words, INTEGER: tl.constexpr, E4M3: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Keys. int32 [rows, words] -> [rows, words, 4]: the bytes less 128; e4m3: 2^-8 of the numbers that they are."""
    if E4M3:
        numbers, _ = widened(words, 8, E4M3, dtype, ASM)
    elif INTEGER and ASM:
        numbers = _four_words(words, _SIGNED_BYTES)
    else:
        numbers = (_bytes(words) - 128).to(tl.int8 if INTEGER else dtype)
    return numbers


@triton.jit
def widened(words, BITS: tl.constexpr, E4M3: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Values. int32 [rows, words] -> two tensors [rows, words, 4] of `dtype`.

    8 bit: the bytes, and the same again. 4 bit: low nibbles and 16 times the high ones. fp16: 2^-24 of these.
    e4m3: 2^-8 of the numbers that the bytes are.
    """
    if ASM:
        if BITS == 8:
            a, b, c, d = tl.inline_asm_elementwise(
                _WIDEN_E4M3 if E4M3 else _WIDEN_8, _PAIR_CONSTRAINTS_8, [words], (tl.float16,) * 4, is_pure=True, pack=2
            )
            low = _pairs_of(a, b, c, d)
            high = low
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                _WIDEN_4, _PAIR_CONSTRAINTS_4, [words], (tl.float16,) * 8, is_pure=True, pack=2
            )
            low = _pairs_of(a, b, e, f)
            high = _pairs_of(c, d, g, h)
    else:
        numbers = _bytes(words)
        low = numbers
        high = numbers
        if E4M3:
            low = (((low & 128) << 8) | ((low & 127) << 7)).to(tl.int16).to(tl.float16, bitcast=True).to(dtype)
            high = low
        else:
            if BITS == 4:
                low = numbers & 15
                high = numbers & 240
            low = _as_bits(low, dtype)
            high = _as_bits(high, dtype)
    return low, high


@triton.jit
def _as_bits(numbers, dtype: tl.constexpr):
    """int32 -> fp32 as they are, or their bits as fp16."""
    if dtype == tl.float16:
        numbers = numbers.to(tl.int16).to(tl.float16, bitcast=True)
    return numbers.to(dtype)


@triton.jit
def _pairs_of(a, b, c, d):
    """a, b: [rows, words], of word 0 of two bytes 0 and 2, bytes 1 and 3; c, d: of word 1 -> [rows, words, 4]."""
    rows: tl.constexpr = a.shape[0]
    words: tl.constexpr = a.shape[1]
    parts = tl.reshape(_four(a, b, c, d), (rows, words // 2, 2, 2, 2))  # pair, high bit of byte, low bit, word
    return tl.reshape(tl.permute(parts, (0, 1, 4, 2, 3)), (rows, words, 4))


@triton.jit
def block_of(table_ptr, tile, last, BLOCK_SIZE: tl.constexpr):
    """Id of the block in which the tile begins; past the last key: of the last block."""
    return tl.load(table_ptr + tl.cast(tl.minimum(tile, last), tl.uint32) // BLOCK_SIZE)


@triton.jit
def _load(
    ptr,
    table_ptr,
    block,
    tile,
    last,
    stride_block,
    stride_token,
    lane_keys,
    lane_words,
    keys,
    words,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_WORDS: tl.constexpr,
):
    """Words lane_words + words of the keys tile + lane_keys + keys, past `last` others of its block or `last` itself. NUM_WORDS: of a key,
    past them 0; 0: not asked.

    lane_keys, lane_words: [rows, 1], what differs between lanes; keys, words: [rows, words], what does not. block: of the tile, which
    counts where a tile lies in one. Added in this order an address is the work of two instructions, and the rest part of the loads.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        lanes = (ptr + lane_keys * stride_token + lane_words).to(tl.pointer_type(tl.uint8))
        # bytes in 64 bits, since the pool may pass 2^31; ids are not negative
        lanes += block.to(tl.uint32).to(tl.uint64) * (stride_block * 4).to(tl.uint32).to(tl.uint64)
        if BLOCK_SIZE > BLOCK_N:
            # tiles begin at multiples of BLOCK_N: so written, the compiler sees how the loads are aligned
            lanes += tl.cast(tile, tl.uint32) // BLOCK_N % (BLOCK_SIZE // BLOCK_N) * (4 * BLOCK_N * stride_token)
        ptrs = lanes.to(tl.pointer_type(ptr.dtype.element_ty)) + (keys * stride_token + words)
    else:
        keys = tl.minimum(tile + lane_keys + keys, last)
        rows = tl.load(table_ptr + keys // BLOCK_SIZE).to(tl.int64) * stride_block + keys % BLOCK_SIZE * stride_token
        ptrs = ptr + rows + lane_words + words
    return tl.load(ptrs, mask=lane_words + words < NUM_WORDS, other=0) if NUM_WORDS > 0 else tl.load(ptrs)


@triton.jit
def load_keys(
    ptr,
    table_ptr,
    block,
    tile,
    last,
    stride_block,
    stride_token,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    """int32 [(chunk, J, 8, 4), 4]: BLOCK_ROW / 16 words of a lane of each of its J keys. ROW: bytes of a key; past them 0."""
    J: tl.constexpr = BLOCK_N // 8
    place = tl.arange(0, 32 * J * (BLOCK_ROW // 64))[:, None]
    keys = place // 32 % J
    words = place // (32 * J) * 16 + tl.arange(0, 4)[None, :]
    return _load(
        ptr, table_ptr, block, tile, last, stride_block, stride_token, place % 32 // 4 * J, place % 4 * 4, keys, words,
        BLOCK_SIZE, BLOCK_N, ROW // 4 if ROW < BLOCK_ROW else 0,
    )  # fmt: skip


@triton.jit
def load_values(
    ptr,
    table_ptr,
    block,
    tile,
    last,
    stride_block,
    stride_token,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    """int32 [(chunk, J / 2, 2, 2, 8, 4), CHUNK]: BLOCK_ROW / 32 words of a lane of each of its 2 J values. ROW: as `load_keys`'."""
    J: tl.constexpr = BLOCK_N // 8
    CHUNK: tl.constexpr = 2 if BLOCK_ROW < 128 else 4
    place = tl.arange(0, 64 * J * (BLOCK_ROW // 32 // CHUNK))[:, None]
    nth = place // 32 % (2 * J)
    keys = nth // 2 % 2 * (4 * J) + nth // 4 * 2 + nth % 2
    words = place // (64 * J) * (8 * CHUNK) + tl.arange(0, CHUNK)[None, :]
    return _load(
        ptr, table_ptr, block, tile, last, stride_block, stride_token, place % 4 * J, place % 32 // 4 * CHUNK, keys, words,
        BLOCK_SIZE, BLOCK_N, ROW // 4 if ROW < BLOCK_ROW else 0,
    )  # fmt: skip


@triton.jit
def load_params(
    ptr,
    table_ptr,
    block,
    tile,
    last,
    stride_block,
    stride_token,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_WORDS: tl.constexpr,
):
    """[(chunk, 8, 4), CHUNK]: NUM_WORDS words of each of a lane's J keys, in chunks of at most 16 bytes."""
    J: tl.constexpr = BLOCK_N // 8
    CHUNK: tl.constexpr = J * NUM_WORDS if J * NUM_WORDS < 4 else 4
    place = tl.arange(0, 32 * (J * NUM_WORDS // CHUNK))[:, None]
    words = place // 32 * CHUNK + tl.arange(0, CHUNK)[None, :]
    ARE_TOGETHER: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0 and stride_token == NUM_WORDS  # a lane's keys
    keys = words * 0 if ARE_TOGETHER else words // NUM_WORDS
    words = words if ARE_TOGETHER else words % NUM_WORDS
    return _load(
        ptr, table_ptr, block, tile, last, stride_block, stride_token, place % 32 // 4 * J, place * 0, keys, words,
        BLOCK_SIZE, BLOCK_N, 0,
    )  # fmt: skip


@triton.jit
def params_of(params, part: tl.constexpr, NUM_WORDS: tl.constexpr, J: tl.constexpr, dtype: tl.constexpr):
    """What `load_params` gave -> fp32 (scale, zero) of a part: [J, 8, 1, 4] each. A pair of 16 bit numbers is one word."""
    chunks: tl.constexpr = params.shape[0] // 32
    words = tl.permute(tl.reshape(params, (chunks, 8, 4, params.shape[1])), (0, 3, 1, 2))
    words = tl.permute(tl.reshape(words, (J, NUM_WORDS, 8, 1, 4)), (0, 2, 3, 4, 1))
    if params.dtype == tl.float32:
        words = tl.reshape(words, (J, 8, 1, 4, NUM_WORDS // 2, 2))
        scale, zero = tl.split(words)
        scale = _part(scale, part, NUM_WORDS // 2, J)
        zero = _part(zero, part, NUM_WORDS // 2, J)
    else:
        word = _part(words, part, NUM_WORDS, J)
        if dtype == tl.bfloat16:  # the upper half of an fp32 number
            scale = (word << 16).to(tl.float32, bitcast=True)
            zero = (word & -65536).to(tl.float32, bitcast=True)
        else:
            scale = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            zero = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def _part(words, part: tl.constexpr, NUM_PARTS: tl.constexpr, J: tl.constexpr):
    """[J, 8, 1, 4, NUM_PARTS] -> [J, 8, 1, 4]."""
    if NUM_PARTS == 1:
        words = tl.reshape(words, (J, 8, 1, 4))
    else:
        first, second = tl.split(words)
        words = first if part == 0 else second
    return words
