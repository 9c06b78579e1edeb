"""4 bit words become 16 bit numbers in registers (operands.W4A16Tiles): what the kernels over 4 bit weights share.

A nibble becomes a number by its bits: 0x4300 | v is 128 + v in bf16, 0x6400 | v is 1024 + v and 0x5400 | v << 4 is 64 + v in fp16, whose
ten bits hold a nibble in two places and save two shifts of three. Two numbers sit in a register: they are masked, then the offset and
the zero are taken away together, which is exact, then they are scaled, which rounds:

    FORM "raw"       offset + v                     7 instructions for the 8 numbers of a word, in fp16 5
    FORM "steps"     v - zero                      11, in fp16 9
    FORM "weights"   round((v - zero) * scale)     15, in fp16 13
"""

import triton
import triton.language as tl

__all__ = [
    "PAIRED_BF16",
    "PAIRED_FP16",
    "PAIRED_RAW_BF16",
    "PAIRED_RAW_FP16",
    "TAKES_PAIRED_BF16",
    "TAKES_PAIRED_FP16",
    "TAKES_PAIRED_RAW",
    "load_weights",
    "numbers_of",
    "widen",
]


def _asm(kind: str, form: str, *, paired: bool = False) -> str:
    """$0..$7: the 16 numbers of the words $8 (outputs 0..7 of a strip) and $9 (8..15); after them, in pairs since two words are taken
    at once, negated offset zeros for low and high outputs (fp16: those of the second offset too), and scales. paired: a pair has one
    word of low outputs and one of high ones, and there are half as many.

    Sub and mul are fused multiply-adds, which sm_80 has for both types; -0 leaves a product as it is.
    """
    is_fp16 = kind == "f16x2"
    offsets, one = (("0x64006400", "0x54005400"), "0x3C003C00") if is_fp16 else (("0x43004300",), "0x3F803F80")
    pair = 1 if paired else 2
    lines = [".reg .b32 w, one, none;", f"mov.b32 one, {one};", "mov.b32 none, 0x80008000;"]
    for i in range(8):
        word, place = 8 + i // 4, i % 4
        is_second = is_fp16 and place % 2 == 1
        shift = 4 * (place - is_second)
        if shift and not is_second:
            lines.append(f"shr.b32 w, ${word}, {shift};")
        mask = "0x00F000F0" if is_second else "0x000F000F"
        lines.append(f"lop3.b32 ${i}, {'w' if shift else f'${word}'}, {mask}, {offsets[is_second]}, 0xEA;")
    for i in range(8) if form != "raw" else ():
        zero = 10 + pair * (i // 4) + 2 * pair * (is_fp16 and i % 2)
        lines.append(f"fma.rn.{kind} ${i}, ${i}, one, ${zero};")
    for i in range(8) if form == "weights" else ():
        lines.append(f"fma.rn.{kind} ${i}, ${i}, ${10 + (4 if is_fp16 else 2) * pair + pair * (i // 4)}, none;")
    return "{\n    " + "\n    ".join(lines) + "\n}\n"


_STEPS_BF16, _STEPS_FP16 = tl.constexpr(_asm("bf16x2", "steps")), tl.constexpr(_asm("f16x2", "steps"))
_WEIGHTS_BF16, _WEIGHTS_FP16 = tl.constexpr(_asm("bf16x2", "weights")), tl.constexpr(_asm("f16x2", "weights"))
#: by the number of operands after the words
_TAKES_2, _TAKES_4, _TAKES_6 = (tl.constexpr(",".join(["=r"] * 8 + ["r"] * (2 + 2 * count))) for count in (2, 4, 6))
#: for the kernels in Gluon
PAIRED_BF16, PAIRED_FP16 = (tl.constexpr(_asm(kind, "weights", paired=True)) for kind in ("bf16x2", "f16x2"))
TAKES_PAIRED_BF16, TAKES_PAIRED_FP16 = (tl.constexpr(",".join(["=r"] * 8 + ["r"] * (2 + 2 * count))) for count in (2, 3))
PAIRED_RAW_BF16, PAIRED_RAW_FP16 = (tl.constexpr(_asm(kind, "raw", paired=True)) for kind in ("bf16x2", "f16x2"))
TAKES_PAIRED_RAW = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 2))


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
        if dtype == tl.bfloat16:
            if FORM == "steps":
                asm: tl.constexpr = _STEPS_BF16
                takes: tl.constexpr = _TAKES_2
                operands = (words, zero_low, zero_high)
            else:
                asm: tl.constexpr = _WEIGHTS_BF16
                takes: tl.constexpr = _TAKES_4
                operands = (words, zero_low, zero_high, scale_low, scale_high)
            results = tl.inline_asm_elementwise(asm, takes, operands, (tl.bfloat16,) * 8, is_pure=True, pack=2)
        else:
            # bits of -(64 + zero) from those of -(1024 + zero)
            second_low = tl.broadcast_to(_twice(low << 4 & 0xF0 | 0xD400)[:, :, None], words.shape)
            second_high = tl.broadcast_to(_twice(high << 4 & 0xF0 | 0xD400)[:, :, None], words.shape)
            if FORM == "steps":
                asm: tl.constexpr = _STEPS_FP16
                takes: tl.constexpr = _TAKES_4
                operands = (words, zero_low, zero_high, second_low, second_high)
            else:
                asm: tl.constexpr = _WEIGHTS_FP16
                takes: tl.constexpr = _TAKES_6
                operands = (words, zero_low, zero_high, second_low, second_high, scale_low, scale_high)
            results = tl.inline_asm_elementwise(asm, takes, operands, (tl.float16,) * 8, is_pure=True, pack=2)
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
        numbers += params.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        if FORM == "weights":
            numbers *= (params >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        numbers = tl.permute(tl.reshape(numbers.to(dtype), (A, B, 2, 2, 2, 2, 2)), (0, 1, 2, 4, 6, 5, 3))
    return numbers


@triton.jit
def load_weights(
    words_ptr, params_ptr, first_strip, step, is_needed, N, K, GROUP_SIZE: tl.constexpr, W: tl.constexpr, R: tl.constexpr
):
    """(words [32 W, R, 4], params [32 W, 2]) of a step, a strip of 16 outputs a warp. is_needed: None, or whether to load at all."""
    thread = tl.arange(0, 32 * W)
    strip = first_strip + thread // 32
    lanes = strip.to(tl.int64) * (2 * K) + thread % 32 * 4
    parts = tl.arange(0, R) * 128
    ptrs = words_ptr + step * (128 * R) + lanes[:, None, None] + parts[None, :, None] + tl.arange(0, 4)[None, None, :]
    group = step * (64 * R) // GROUP_SIZE
    outputs = (strip * 16 + thread % 32 // 4)[:, None] + tl.arange(0, 2)[None, :] * 8
    if is_needed is None:
        words, params = tl.load(ptrs), tl.load(params_ptr + group * N + outputs)
    else:
        mask = thread < tl.where(is_needed, 32 * W, 0)
        words = tl.load(ptrs, mask=mask[:, None, None])
        params = tl.load(params_ptr + group * N + outputs, mask=mask[:, None])
    return words, params


@triton.jit
def numbers_of(words, params, dtype: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr):
    """The numbers of a step in `dtype`: [16 W, 64 R], a matrix instruction's left operand without another move."""
    W: tl.constexpr = words.shape[0] // 32
    R: tl.constexpr = words.shape[1]
    low, high = tl.split(params)
    low = tl.broadcast_to(low[:, None], (32 * W, R))
    high = tl.broadcast_to(high[:, None], (32 * W, R))
    numbers = tl.reshape(widen(words, low, high, dtype, FORM, ASM), (W, 8, 4, R, 2, 2, 2, 2, 2))  # W g t R k32 k1 k16 k8 m8
    return tl.reshape(tl.permute(numbers, (0, 8, 1, 3, 4, 6, 7, 2, 5)), (16 * W, 64 * R))
