"""Linear layers of one row over 4 bit weights, for Hopper: plain, after RMSNorm, and gated, as hopper_row_linear.py has them for 16 bits.

    y = x W + b,   W[k, n] = (nibble[k, n] - zero[g, n]) * scale[g, n],   g = k // 128;   sums and scales are fp32

As there a program has a multiprocessor to itself, and its ring is full before it waits for the kernel before it. Eight warps share
the inputs of a tile, an eighth each, a slice. The matrix instruction multiplies eight columns anyway: column c is x's slice c, so all
warps have one right operand, and of warp w's sums column w counts.

    tile    S strips of 16 outputs       step    R blocks of 64 inputs of every slice, S R = 8: 32 KiB of words, and 2 KiB of params

    virtual rows [S, 8 warps, 16] x columns [8 slices]       at the end of a tile the diagonal, added over the warps

Words go to the instruction's registers as operands.W4A16Tiles says, each nibble as the number offset + nibble, which costs the least. What
that and the zeros add to a group's sum is (offset + zero) times the sum of its x, and comes off once a group, in fp32; in fp16, where every
other 16 inputs have an offset of 64 instead of 1024, the sum of those 960 times more.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbotriton.backend.ops.operands import W4A16Tiles

from .hopper_gate_up import high_half, low_half
from .hopper_row_linear import commit_copies, copy_async, silu_times, wait_copies
from .hopper_tuning import hopper_row_w4a16_blocks, takes_hopper_row_w4a16
from .launch import has_pdl, is_hopper, launch_options, num_sms
from .tuning import next_power_of_2
from .w4a16_words import PAIRED_RAW_BF16, PAIRED_RAW_FP16, TAKES_PAIRED_RAW

__all__ = ["linear", "norm_gate_up", "norm_linear", "takes"]

NUM_STAGES = gl.constexpr(5)
SLICES = gl.constexpr(8)
ACC = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [8, 1], [16, 8]))


@gluon.jit
def _ask(words_ptr, params_ptr, words_stage, params_stage, tile, step, N, K: gl.constexpr, S: gl.constexpr, R: gl.constexpr):
    """Asks for a tile's step: of every strip and slice R blocks, and the params of their groups."""
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0])
    PARAMS: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0])
    GROUPS: gl.constexpr = R // 2
    rows = gl.arange(0, S * SLICES, layout=gl.SliceLayout(1, WORDS))
    begin = (tile * S + rows // SLICES).to(gl.int64) * (2 * K) + (rows % SLICES * (K // 512) + step * R) * 128
    copy_async(words_stage, words_ptr + begin[:, None] + gl.arange(0, R * 128, layout=gl.SliceLayout(0, WORDS))[None, :])
    rows = gl.arange(0, S * SLICES * GROUPS, layout=gl.SliceLayout(1, PARAMS))
    strip, group = tile * S + rows // (SLICES * GROUPS), rows // GROUPS % SLICES * (K // 1024) + step * GROUPS + rows % GROUPS
    begin = group * N + strip * 16
    copy_async(params_stage, params_ptr + begin[:, None] + gl.arange(0, 16, layout=gl.SliceLayout(0, PARAMS))[None, :])


@gluon.jit
def _inputs(K: gl.constexpr, PARTS: gl.constexpr, LAYOUT: gl.constexpr):
    """Which input stands where in x_shared: [SLICES * PARTS, 128], every group of 128 a row, slice by slice in each part; past K more."""
    rows = gl.arange(0, SLICES * PARTS, layout=gl.SliceLayout(1, LAYOUT))
    begin = gl.where(rows < K // 128, rows % SLICES * (K // SLICES) + rows // SLICES * 128, K)
    return begin[:, None] + gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def _bring_x(
    x_ptr,
    residual_ptr,
    gain_ptr,
    r_ptr,
    eps,
    x_shared,
    sums_shared,
    K: gl.constexpr,
    HAS_NORM: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    PARTS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Waits for the kernel before, and puts x, or rms_norm(x + residual), rounded, into x_shared, and the sums of its rows into the first
    half of sums_shared; in fp16 into the second half those of every second 16 inputs. Program 0 stores x + residual."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0])
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    inputs = _inputs(K, PARTS, LAYOUT)
    if HAS_NORM:
        gain = gl.load(gain_ptr + inputs, mask=inputs < K, other=0.0).to(gl.float32)
    if PDL:
        gdc_wait()
    x = gl.load(x_ptr + inputs, mask=inputs < K, other=0.0)
    if HAS_NORM:
        if HAS_RESIDUAL:
            x = (x.to(gl.float32) + gl.load(residual_ptr + inputs, mask=inputs < K, other=0.0).to(gl.float32)).to(dtype)
            if gl.program_id(0) == 0:
                gl.store(r_ptr + inputs, x, mask=inputs < K)
        wide = x.to(gl.float32)
        x = (wide * gl.rsqrt(gl.sum(gl.sum(wide * wide, axis=1), axis=0) / K + eps) * gain).to(dtype)
    x_shared.store(x)
    wide = x.to(gl.float32)
    sums_shared.slice(0, SLICES * PARTS, 0).store(gl.sum(wide, axis=1))
    if dtype == gl.float16:
        is_second = gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT)) // 16 % 2 == 1
        sums_shared.slice(SLICES * PARTS, SLICES * PARTS, 0).store(gl.sum(gl.where(is_second[None, :], wide, 0.0), axis=1))


@gluon.jit
def _numbers(words, dtype: gl.constexpr):
    """Eight tensors of offset + nibble, two by two from every pair of words (m8)."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(PAIRED_RAW_BF16, TAKES_PAIRED_RAW, [words], (gl.bfloat16,) * 8, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(PAIRED_RAW_FP16, TAKES_PAIRED_RAW, [words], (gl.float16,) * 8, is_pure=True, pack=2)


@gluon.jit
def _group_of_words(words, group: gl.constexpr, GROUPS: gl.constexpr, S: gl.constexpr):
    """[S, warps, groups, 2, 8, 4, k32, m8] -> those of one group: [S, warps, 2, 8, 4, k32, m8]."""
    if GROUPS == 1:
        return gl.reshape(words, [S, 8, 2, 8, 4, 2, 2])
    else:
        even, odd = gl.split(gl.permute(gl.reshape(words, [S, 8, GROUPS // 2, 2, 2, 8, 4, 2, 2]), (0, 1, 2, 4, 5, 6, 7, 8, 3)))
        return _group_of_words(even if group % 2 == 0 else odd, group // 2, GROUPS // 2, S)


@gluon.jit
def _group_of_params(params, group: gl.constexpr, GROUPS: gl.constexpr, S: gl.constexpr):
    """[S, warps, groups, 8, m8] -> those of one group: [S, warps, 8, m8]."""
    if GROUPS == 1:
        return gl.reshape(params, [S, 8, 8, 2])
    else:
        even, odd = gl.split(gl.permute(gl.reshape(params, [S, 8, GROUPS // 2, 2, 8, 2]), (0, 1, 2, 4, 5, 3)))
        return _group_of_params(even if group % 2 == 0 else odd, group // 2, GROUPS // 2, S)


@gluon.jit
def _with_group(
    acc, words, params, x_shared, sums_shared, part: gl.constexpr, S: gl.constexpr, PARTS: gl.constexpr, dtype: gl.constexpr
):
    """acc, [128 S, SLICES], and the sums of group `part` of every slice. words: [S, warps, 2, 8, 4, k32, m8]; params: [S, warps,
    8, m8]."""
    a, b, c, d, e, f, g, h = _numbers(words, dtype)
    # the assembly takes pairs of words (m8) and gives pairs of inputs (k1): [S, warps, block, 8, 4, k32, k1, k16, k8, m8]
    left = gl.join(gl.join(gl.join(a, b), gl.join(c, d)), gl.join(gl.join(e, f), gl.join(g, h)))
    left = gl.reshape(gl.permute(left, (0, 1, 9, 3, 2, 5, 7, 8, 4, 6)), (128 * S, 128))
    left = gl.convert_layout(left, gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)
    right = x_shared.slice(part * SLICES, SLICES, 0).permute((1, 0)).load(gl.DotOperandLayout(1, ACC, 2))
    sums = mma_v2(left, right, gl.zeros([128 * S, SLICES], gl.float32, ACC))
    params = gl.reshape(gl.permute(params, (0, 1, 3, 2)), (128 * S,))
    params = gl.convert_layout(params, gl.SliceLayout(1, ACC), assert_trivial=True)
    sums += low_half(params, dtype)[:, None] * sums_shared.slice(part * SLICES, SLICES, 0).load(gl.SliceLayout(0, ACC))[None, :]
    if dtype == gl.float16:
        sums += 960.0 * sums_shared.slice((PARTS + part) * SLICES, SLICES, 0).load(gl.SliceLayout(0, ACC))[None, :]
    return acc + sums * high_half(params, dtype)[:, None]


@gluon.jit
def _diagonal(acc, S: gl.constexpr):
    """[128 S, SLICES] -> [S, 16]: what the warps have of their own slices, added."""
    warps = gl.arange(0, 128 * S, layout=gl.SliceLayout(1, ACC)) // 16 % SLICES
    columns = gl.arange(0, SLICES, layout=gl.SliceLayout(0, ACC))
    own = gl.sum(gl.where(warps[:, None] == columns[None, :], acc, 0.0), axis=1)
    return gl.sum(gl.reshape(own, (S, SLICES, 16)), axis=1)


@gluon.jit
def _row_w4a16_kernel(
    x_ptr,
    residual_ptr,
    gain_ptr,
    words_ptr,
    params_ptr,
    bias_ptr,
    y_ptr,
    r_ptr,
    eps,
    N,
    K: gl.constexpr,
    HAS_NORM: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    S: gl.constexpr,
    R: gl.constexpr,
    PARTS: gl.constexpr,
    PDL: gl.constexpr,
):
    """PARTS: K / 1024 or more, a power of two."""
    if PDL:
        gdc_launch_dependents()
    # [S, warps, groups, block, outputs of 8, pairs of inputs, k32, m8]
    PLACES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]]
        + ([[0, 0, 2, 0, 0, 0, 0, 0]] if R == 8 else [[1, 0, 0, 0, 0, 0, 0, 0]]),
        [
            [0, 0, 0, 0, 0, 1, 0, 0],
            [0, 0, 0, 0, 0, 2, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 2, 0, 0, 0],
            [0, 0, 0, 0, 4, 0, 0, 0],
        ],
        [[0, 1, 0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0, 0], [0, 4, 0, 0, 0, 0, 0, 0]],
        [],
        [S, 8, R // 2, 2, 8, 4, 2, 2],
    )
    PARAMS: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(5, gl.SliceLayout(6, PLACES)))
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    NUM_STEPS: gl.constexpr = K // (512 * R)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    num_tiles = N // (16 * S)
    words_ring = gl.allocate_shared_memory(gl.int32, [NUM_STAGES, S * SLICES, R * 128], PLAIN)
    params_ring = gl.allocate_shared_memory(gl.int32, [NUM_STAGES, S * SLICES * (R // 2), 16], PLAIN)
    x_shared = gl.allocate_shared_memory(dtype, [SLICES * PARTS, 128], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    sums_shared = gl.allocate_shared_memory(gl.float32, [2 * SLICES * PARTS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for number in gl.static_range(NUM_STAGES):
        tile = gl.program_id(0) + number // NUM_STEPS * gl.num_programs(0)
        if tile < num_tiles:
            _ask(words_ptr, params_ptr, words_ring.index(number), params_ring.index(number), tile, number % NUM_STEPS, N, K, S, R)
        commit_copies()
    _bring_x(x_ptr, residual_ptr, gain_ptr, r_ptr, eps, x_shared, sums_shared, K, HAS_NORM, HAS_RESIDUAL, PARTS, PDL)
    stage = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        acc = gl.zeros([128 * S, SLICES], gl.float32, ACC)
        for step in gl.static_range(NUM_STEPS):
            wait_copies(NUM_STAGES - 1)
            words = words_ring.index(stage).reshape([S, 8, R // 2, 2, 8, 4, 2, 2]).load(PLACES)
            params = params_ring.index(stage).reshape([S, 8, R // 2, 2, 8]).permute((0, 1, 2, 4, 3)).load(PARAMS)
            for group in gl.static_range(R // 2):
                some_words, some_params = _group_of_words(words, group, R // 2, S), _group_of_params(params, group, R // 2, S)
                acc = _with_group(acc, some_words, some_params, x_shared, sums_shared, step * (R // 2) + group, S, PARTS, dtype)
            later = tile + (step + NUM_STAGES) // NUM_STEPS * gl.num_programs(0)
            if later < num_tiles:
                following = (step + NUM_STAGES) % NUM_STEPS
                _ask(words_ptr, params_ptr, words_ring.index(stage), params_ring.index(stage), later, following, N, K, S, R)
            commit_copies()
            stage = gl.where(stage == NUM_STAGES - 1, 0, stage + 1)
        sums = _diagonal(acc, S)
        if GATED:  # outputs 0..7 of a strip are gates, 8..15 the ups of the same columns
            PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [8, 1], [1, 0])
            pairs = gl.reshape(gl.permute(gl.reshape(sums, (S, 2, 8)), (0, 2, 1)), (8 * S, 2))
            gate, up = gl.split(gl.convert_layout(pairs, PAIRS))
            columns = tile * (8 * S) + gl.arange(0, 8 * S, layout=gl.SliceLayout(1, PAIRS))
            if HAS_BIAS:
                gate += gl.load(bias_ptr + columns).to(gl.float32)
                up += gl.load(bias_ptr + N // 2 + columns).to(gl.float32)
            gl.store(y_ptr + columns, silu_times(gate, up, dtype).to(dtype))
        else:
            OUTPUTS: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
            y = gl.convert_layout(gl.reshape(sums, (16 * S,)), OUTPUTS)
            columns = tile * (16 * S) + gl.arange(0, 16 * S, layout=OUTPUTS)
            if HAS_BIAS:
                y += gl.load(bias_ptr + columns).to(gl.float32)
            gl.store(y_ptr + columns, y.to(dtype))


def takes(x: torch.Tensor, weight: W4A16Tiles) -> bool:
    """Whether one of these layers can be asked for."""
    return takes_hopper_row_w4a16(
        x.shape[0], weight.in_features, weight.out_features, weight.group_size, is_hopper=is_hopper(x.device)
    )


def linear(x: torch.Tensor, weight: W4A16Tiles) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [1, in_features], the weight's dtype, contiguous; weight: groups of 128, in_features a multiple of 2048, at most 16384, not gated

    Returns [1, out_features], new, contiguous, in x's dtype.
    """
    assert not weight.gated, "a gated weight's columns are interleaved: norm_gate_up"
    return _launch(x, None, None, 0.0, weight)[0]


def norm_linear(
    x: torch.Tensor, residual: torch.Tensor | None, gain: torch.Tensor, eps: float, weight: W4A16Tiles
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `linear` of rms_norm(x + residual); residual: [1, in_features], as x, or None; gain: [in_features], contiguous.

    Returns (y: [1, out_features], r: [1, in_features]); without a residual r is x itself.
    """
    assert not weight.gated, "a gated weight's columns are interleaved: norm_gate_up"
    return _launch(x, residual, gain, eps, weight)


def norm_gate_up(
    x: torch.Tensor, residual: torch.Tensor | None, gain: torch.Tensor, eps: float, weight: W4A16Tiles
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `norm_linear` with columns [gate | up], and silu(gate) * up: y is [1, out_features / 2]."""
    assert weight.gated, "the columns are not those of gate and up"
    return _launch(x, residual, gain, eps, weight)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, gain: torch.Tensor | None, eps: float, weight: W4A16Tiles
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a gain there is no norm."""
    k, n = weight.in_features, weight.out_features
    assert x.shape == (1, k), f"x is {tuple(x.shape)}, not {(1, k)}"
    assert x.stride(1) == 1, "x must be contiguous"
    assert x.dtype is weight.dtype, f"the weight was packed for {weight.dtype}"
    y = torch.empty((1, n // 2 if weight.gated else n), dtype=x.dtype, device=x.device)
    r = x if residual is None else torch.empty((1, k), dtype=x.dtype, device=x.device)
    blocks = hopper_row_w4a16_blocks(k)
    strips = 8 // blocks
    _row_w4a16_kernel[(min(n // (16 * strips), num_sms(x.device)),)](
        x,
        residual,
        gain,
        weight.words,
        weight.params,
        weight.bias,
        y,
        None if residual is None else r,
        eps,
        n,
        K=k,
        HAS_NORM=gain is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=weight.bias is not None,
        GATED=weight.gated,
        S=strips,
        R=blocks,
        PARTS=next_power_of_2(k // 1024),
        num_warps=8,
        **launch_options(has_pdl(x.device)),
    )
    return y, r
