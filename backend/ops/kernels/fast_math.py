"""Functions of fp32 in one instruction each: a few units in the last place, subnormal numbers are zeros. ASM: not in the interpreter."""

import triton
import triton.language as tl

__all__ = ["fast_exp2", "fast_inverse", "fast_log2"]


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
