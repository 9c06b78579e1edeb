"""Arithmetic of Gluon kernels for which the compiler takes more instructions than the chip needs."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["rounded", "sigmoid"]

# 1 / (1 + exp(-x)) in four instructions; two numbers to bf16 and back in three, where the compiler takes a slow one for each
_SIGMOID = gl.constexpr(
    "mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;"
)
_ROUND_BF16 = gl.constexpr(
    "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xFFFF0000; }"
)


@gluon.jit
def rounded(numbers, dtype: gl.constexpr):
    """fp32 numbers that `dtype` holds."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(_ROUND_BF16, "=f,=f,f,f", [numbers], gl.float32, is_pure=True, pack=2)
    else:
        return numbers.to(dtype).to(gl.float32)


@gluon.jit
def sigmoid(numbers):
    """1 / (1 + exp(-x)) of fp32."""
    return gl.inline_asm_elementwise(_SIGMOID, "=f,f", [numbers], gl.float32, is_pure=True, pack=1)
