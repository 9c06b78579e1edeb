"""4 bit words become 16 bit numbers in registers (operands.W4A16Tiles): what both kernels over 4 bit weights share.

A nibble becomes a number by its bits: 0x4300 | v is 128 + v in bf16, 0x6400 | v is 1024 + v in fp16. Two numbers sit in a register:
they are shifted, then the offset and the zero are taken away together, which is exact, then they are scaled, which rounds:

    FORM "offset"    128 + v  or  1024 + v         7 instructions for the 8 numbers of a word
    FORM "steps"     v - zero                      11
    FORM "weights"   round((v - zero) * scale)     15
"""

import triton
import triton.language as tl

__all__ = ["widen"]

#: $0..$7: the 16 numbers of the words $8 (outputs 0..7 of a strip) and $9 (8..15); $10, $12 their negated offset zeros, $14, $16 scales.
#: Operands come in pairs since two words are taken at once; zeros and scales are the same for both.
_SPREAD = """
    lop3.b32 $0, $8, 0x000F000F, OFFSET, 0xEA;
    shr.b32 w, $8, 4;
    lop3.b32 $1, w, 0x000F000F, OFFSET, 0xEA;
    shr.b32 w, $8, 8;
    lop3.b32 $2, w, 0x000F000F, OFFSET, 0xEA;
    shr.b32 w, $8, 12;
    lop3.b32 $3, w, 0x000F000F, OFFSET, 0xEA;
    lop3.b32 $4, $9, 0x000F000F, OFFSET, 0xEA;
    shr.b32 w, $9, 4;
    lop3.b32 $5, w, 0x000F000F, OFFSET, 0xEA;
    shr.b32 w, $9, 8;
    lop3.b32 $6, w, 0x000F000F, OFFSET, 0xEA;
    shr.b32 w, $9, 12;
    lop3.b32 $7, w, 0x000F000F, OFFSET, 0xEA;
"""


def _asm(kind: str, offset: str, one: str, form: str) -> tl.constexpr:
    """Sub and mul as fused multiply-adds, which sm_80 has for both types; -0 leaves a product as it is."""
    less_zero = "".join(f"    fma.rn.{kind} ${i}, ${i}, one, ${10 if i < 4 else 12};\n" for i in range(8))
    scaled = "".join(f"    fma.rn.{kind} ${i}, ${i}, ${14 if i < 4 else 16}, none;\n" for i in range(8))
    head = f"{{\n    .reg .b32 w, one, none;\n    mov.b32 one, {one};\n    mov.b32 none, 0x80008000;\n"
    steps = {"offset": "", "steps": less_zero, "weights": less_zero + scaled}
    return tl.constexpr(head + _SPREAD.replace("OFFSET", offset) + steps[form] + "}\n")


_BF16 = ("bf16x2", "0x43004300", "0x3F803F80")
_FP16 = ("f16x2", "0x64006400", "0x3C003C00")
_OFFSET_BF16, _OFFSET_FP16 = _asm(*_BF16, "offset"), _asm(*_FP16, "offset")
_STEPS_BF16, _STEPS_FP16 = _asm(*_BF16, "steps"), _asm(*_FP16, "steps")
_WEIGHTS_BF16, _WEIGHTS_FP16 = _asm(*_BF16, "weights"), _asm(*_FP16, "weights")
_TAKES_WORDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 2))
_TAKES_ZEROS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 6))
_TAKES_SCALES = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 10))


@triton.jit
def _twice(half):
    """The low 16 bits in both halves of a word."""
    return (half & 0xFFFF) * 0x10001


@triton.jit
def widen(words, low, high, dtype: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr):
    """The numbers of some words: [A, B, k32, k1, k16, k8, m8], each of the last axes 2 long, in `dtype`.

    words: [A, B, 4], int32; low, high: [A, B], int32: scale << 16 | negated offset zero of outputs 0..7 and 8..15 of a strip
    """
    A: tl.constexpr = words.shape[0]
    B: tl.constexpr = words.shape[1]
    tl.static_assert(dtype == tl.bfloat16 or dtype == tl.float16, "weights are widened to 16 bit floats")
    if ASM:
        zero_low = tl.broadcast_to(_twice(low)[:, :, None], words.shape)
        zero_high = tl.broadcast_to(_twice(high)[:, :, None], words.shape)
        scale_low = tl.broadcast_to(_twice(low >> 16)[:, :, None], words.shape)
        scale_high = tl.broadcast_to(_twice(high >> 16)[:, :, None], words.shape)
        if FORM == "offset":
            operands = (words,)
            takes: tl.constexpr = _TAKES_WORDS
            of_bf16: tl.constexpr = _OFFSET_BF16
            of_fp16: tl.constexpr = _OFFSET_FP16
        elif FORM == "steps":
            operands = (words, zero_low, zero_high)
            takes: tl.constexpr = _TAKES_ZEROS
            of_bf16: tl.constexpr = _STEPS_BF16
            of_fp16: tl.constexpr = _STEPS_FP16
        else:
            operands = (words, zero_low, zero_high, scale_low, scale_high)
            takes: tl.constexpr = _TAKES_SCALES
            of_bf16: tl.constexpr = _WEIGHTS_BF16
            of_fp16: tl.constexpr = _WEIGHTS_FP16
        if dtype == tl.bfloat16:
            results = tl.inline_asm_elementwise(of_bf16, takes, operands, (tl.bfloat16,) * 8, is_pure=True, pack=2)
        else:
            results = tl.inline_asm_elementwise(of_fp16, takes, operands, (tl.float16,) * 8, is_pure=True, pack=2)
        a, b, c, d, e, f, g, h = results
        # [A, B, (k32, k1), k16, k8, m8]: the asm takes pairs of words (m8) and gives pairs of inputs (k1)
        numbers = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
        numbers = tl.reshape(numbers, (A, B, 2, 2, 2, 2, 2))
    else:
        # [A, B, (k32, m8), (k1, k8, k16)] by plain shifts
        places = tl.arange(0, 8)
        shifts = (places // 4) * 16 + (places % 4) * 4
        nibbles = (words[:, :, :, None] >> shifts[None, None, None, :]) & 15
        is_high = (tl.arange(0, 4) % 2)[None, None, :, None] == 1
        params = tl.where(is_high, high[:, :, None, None], low[:, :, None, None])
        numbers = nibbles.to(tl.float32) + (128 if dtype == tl.bfloat16 else 1024)
        if FORM != "offset":
            numbers += params.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        if FORM == "weights":
            numbers *= (params >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        numbers = tl.permute(tl.reshape(numbers.to(dtype), (A, B, 2, 2, 2, 2, 2)), (0, 1, 2, 4, 6, 5, 3))
    return numbers
