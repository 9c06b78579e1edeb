"""From words and params of a step in shared memory to the matrix instruction's left operand, for `hopper_w4a16_linear`, in Gluon.

words     NUM_GROUPS x S x WARPS strips of 16 outputs, each 128 words of 64 inputs or 256 of 128, as `packing.pack_fragments` lays them
params    an output's zero and scale for each of its groups of inputs in the step
weights   [64 S, 64] of a group of warps: a thread widens its words where they are
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .w4a16_words import PAIRED_BF16, PAIRED_FP16, TAKES_PAIRED_BF16, TAKES_PAIRED_FP16

__all__ = ["NUM_GROUPS", "WARPS", "params_of", "weights_of", "words_of"]

NUM_GROUPS = gl.constexpr(2)
WARPS = gl.constexpr(4)  # of a group


@gluon.jit
def _twice(half):
    """The low 16 bits in both halves of a word."""
    return (half & 0xFFFF) * 0x10001


@gluon.constexpr_function
def _layout_of_words(S, halves=1, ones=0):
    """Of words [S, warps, outputs of 8, pairs of inputs, k32, m8] of half a step, or of all of it, [S, warps, half, ...]; `ones` before."""

    def basis(S=0, warp=0, half=0, output=0, pair=0, k32=0, m8=0):
        return (
            [0] * ones + [S, warp, half, output, pair, k32, m8] if halves == 2 else [0] * ones + [S, warp, output, pair, k32, m8]
        )

    in_thread = [basis(m8=1), basis(k32=1)] + [basis(S=1)] * (S == 2) + [basis(half=1)] * (halves == 2)
    lanes = [basis(pair=1), basis(pair=2), basis(output=1), basis(output=2), basis(output=4)]
    shape = [1] * ones + ([S, 4, 2, 8, 4, 2, 2] if halves == 2 else [S, 4, 8, 4, 2, 2])
    return gl.DistributedLinearLayout(in_thread, lanes, [basis(warp=1), basis(warp=2)], [], shape)


@gluon.jit
def words_of(words_tile, S: gl.constexpr, HALVES: gl.constexpr, GROUP: gl.constexpr):
    """A group's words of a step, the first half's and the last half's: [S, warps, 8, 4, 2, 2] each, the same where there is one."""
    LAYOUT: gl.constexpr = _layout_of_words(S)
    FROM: gl.constexpr = _layout_of_words(S, HALVES, 1)
    if HALVES == 1:
        words = words_tile.reshape([NUM_GROUPS, S, WARPS, 8, 4, 2, 2]).slice(GROUP, 1).load(FROM)
        words = gl.convert_layout(gl.reshape(words, (S, WARPS, 8, 4, 2, 2)), LAYOUT, assert_trivial=True)
        return words, words
    else:
        words = words_tile.reshape([NUM_GROUPS, S, WARPS, 2, 8, 4, 2, 2]).slice(GROUP, 1).load(FROM)
        first, last = gl.split(gl.permute(gl.reshape(words, (S, WARPS, 2, 8, 4, 2, 2)), (0, 1, 3, 4, 5, 6, 2)))
        return gl.convert_layout(first, LAYOUT, assert_trivial=True), gl.convert_layout(last, LAYOUT, assert_trivial=True)


@gluon.jit
def params_of(params_tile, index: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr):
    """Zeros and scales of a group's outputs, `index` of those in the step: [S, warps, 8, m8]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, _layout_of_words(S)))
    FROM: gl.constexpr = gl.SliceLayout(5, gl.SliceLayout(6, _layout_of_words(S, 1, 2)))
    tile = params_tile.reshape([params_tile.shape[0], NUM_GROUPS, S, WARPS, 2, 8]).permute((0, 1, 2, 3, 5, 4))
    params = tile.slice(index, 1).slice(GROUP, 1, dim=1).load(FROM)
    return gl.convert_layout(gl.reshape(params, (S, WARPS, 8, 2)), LAYOUT, assert_trivial=True)


@gluon.jit
def weights_of(words, params, S: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """The weights of a group's half step, as the matrix instruction's left operand: [64 S, 64]."""
    zeros = _spread(_twice(params), words)
    scales = _spread(_twice(params >> 16), words)
    if dtype == gl.bfloat16:
        parts = gl.inline_asm_elementwise(
            PAIRED_BF16, TAKES_PAIRED_BF16, [words, zeros, scales], (gl.bfloat16,) * 8, is_pure=True, pack=2
        )
    else:
        seconds = _spread(_twice(params << 4 & 0xF0 | 0xD400), words)  # bits of -(64 + zero) from those of -(1024 + zero)
        parts = gl.inline_asm_elementwise(
            PAIRED_FP16, TAKES_PAIRED_FP16, [words, zeros, seconds, scales], (gl.float16,) * 8, is_pure=True, pack=2
        )
    a, b, c, d, e, f, g, h = parts
    # the assembly takes pairs of words (m8) and gives pairs of inputs (k1): [S, warps, 8, 4, k32, k1, k16, k8, m8]
    numbers = gl.join(gl.join(gl.join(a, b), gl.join(c, d)), gl.join(gl.join(e, f), gl.join(g, h)))
    numbers = gl.reshape(gl.permute(numbers, (0, 1, 8, 2, 4, 6, 7, 3, 5)), (16 * WARPS * S, 64))
    return gl.convert_layout(numbers, gl.DotOperandLayout(0, layout, 2), assert_trivial=True)


@gluon.jit
def _spread(params, words):
    """[S, warps, 8, m8] -> the shape of words."""
    return gl.broadcast(gl.expand_dims(gl.expand_dims(params, 3), 4), words)[0]
