"""Linear layers of one row for Hopper, bound by reading the weight once: plain, after RMSNorm, and gated.

    linear            y = round(x W + b)
    norm_linear       r = round(x + residual);   y = round(round(rms_norm(r)) W + b)
    norm_gate_up      the same with W = [gate | up]:   y = round(silu(round(gate)) * round(up))

As skinny_linear.py, but for what the memory does between two launches, where a row's layers wait for each other. A program has a
multiprocessor to itself and a ring in its shared memory, and asks for as many weights as fit there before it waits for the kernel before
it, 160 KiB where a tile in registers is 16 or 32. They come while that kernel ends and while x is normalised. In Gluon, since Triton's own
pipeline would begin after the wait.

Outputs go in pairs that lie GROUP apart: gate and up, the two dims that rotary turns, or any two. A tile is eight pairs, the first of all
and then the second of all; a warp adds along rows of its own, so that a tile ends with shuffles.

    ring    NUM_STAGES x [16 rows of W, 1024 inputs]      a tile's steps, by cp.async, 16 bytes a thread
    x       [K / 1024, 1024], rounded                     once a program, padded with zeros to a power of two of steps
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .hopper_tuning import hopper_row_config, takes_hopper_row
from .launch import has_pdl, is_hopper, launch_options, num_sms
from .tuning import ceil_div, next_power_of_2

__all__ = ["linear", "norm_gate_up", "norm_linear", "takes"]

# renamed after triton 3.6
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
commit_copies, wait_copies = async_copy.commit_group, async_copy.wait_group

BLOCK_N = gl.constexpr(8)  # pairs of outputs
BLOCK_K = gl.constexpr(1024)
ADDED_K = gl.constexpr(256)  # inputs whose sums are kept apart: what a warp reads at once, eight a lane


@gluon.jit
def ask(weight_ptr, stride_row, target, tile, step: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr):
    """Asks for the weights of a tile's step. Past N, W's rows, the last one is read; inputs past K are zeros."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    place = gl.arange(0, 2 * BLOCK_N, layout=gl.SliceLayout(1, ROWS))
    pairs = tile * BLOCK_N + place % BLOCK_N
    rows = pairs // GROUP * (2 * GROUP) + pairs % GROUP + place // BLOCK_N * GROUP
    inputs = step * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, ROWS))
    source = weight_ptr + (gl.minimum(rows, N - 1).to(gl.int64) * stride_row)[:, None] + inputs[None, :]
    if (step + 1) * BLOCK_K > K:
        copy_async(target, source, mask=(inputs < K)[None, :])
    else:
        copy_async(target, source)


@gluon.jit
def begin(
    weight_ptr, stride_row, ring, num_tiles, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, NUM_STAGES: gl.constexpr
):
    """Fills the ring with the first steps of the program's tiles."""
    NUM_STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    for stage in gl.static_range(NUM_STAGES):
        tile = gl.program_id(0) + stage // NUM_STEPS * gl.num_programs(0)
        if tile < num_tiles:
            ask(weight_ptr, stride_row, ring.index(stage), tile, stage % NUM_STEPS, N, K, GROUP)
        commit_copies()


@gluon.jit
def load_row(row_ptr, K: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr):
    """A row of K as [STEPS, BLOCK_K], zeros past K. WARPS: how many of them lie along STEPS."""
    PLACES: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, gl.num_warps() // WARPS], [1, 0])
    steps = gl.arange(0, STEPS, layout=gl.SliceLayout(1, PLACES))
    inputs = steps[:, None] * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, PLACES))[None, :]
    return gl.load(row_ptr + inputs, mask=inputs < K, other=0.0)


@gluon.jit
def store_row(row_ptr, values, K: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr):
    """The reverse of `load_row`."""
    PLACES: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, gl.num_warps() // WARPS], [1, 0])
    steps = gl.arange(0, STEPS, layout=gl.SliceLayout(1, PLACES))
    inputs = steps[:, None] * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, PLACES))[None, :]
    gl.store(row_ptr + inputs, values, mask=inputs < K)


@gluon.jit
def normalised(
    x, residual_ptr, gain, r_ptr, eps, K: gl.constexpr, HAS_RESIDUAL: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr
):
    """rms_norm(x + residual), rounded to x's dtype. Program 0 stores x + residual."""
    dtype: gl.constexpr = x.dtype
    if HAS_RESIDUAL:
        x = (x.to(gl.float32) + load_row(residual_ptr, K, STEPS, WARPS).to(gl.float32)).to(dtype)
        if gl.program_id(0) == 0:
            store_row(r_ptr, x, K, STEPS, WARPS)
    wide = x.to(gl.float32)
    scale = gl.rsqrt(gl.sum(gl.sum(wide * wide, axis=1), axis=0) / K + eps)
    return (wide * scale * gain).to(dtype)


@gluon.jit
def sums_of_tile(
    weight_ptr,
    stride_row,
    ring,
    x_shared,
    tile,
    num_tiles,
    stage,
    N: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """(x times the first rows of the tile's pairs, x times the second: [BLOCK_N] each; the stage of the next tile's first step)."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [gl.num_warps(), 1], [1, 0])
    NUM_STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    acc = gl.zeros([2 * BLOCK_N, ADDED_K], gl.float32, ROWS)
    for step in gl.static_range(NUM_STEPS):
        wait_copies(NUM_STAGES - 1)
        x = x_shared.slice(step, 1, 0).load(ROWS).to(gl.float32)
        products = ring.index(stage).load(ROWS).to(gl.float32) * x
        sums = gl.sum(products.reshape([2 * BLOCK_N, BLOCK_K // ADDED_K, ADDED_K]), axis=1)
        acc += gl.convert_layout(sums, ROWS, assert_trivial=True)
        later = tile + (step + NUM_STAGES) // NUM_STEPS * gl.num_programs(0)
        if later < num_tiles:
            ask(weight_ptr, stride_row, ring.index(stage), later, (step + NUM_STAGES) % NUM_STEPS, N, K, GROUP)
        commit_copies()
        stage = gl.where(stage == NUM_STAGES - 1, 0, stage + 1)
    pairs = gl.sum(acc, axis=1).reshape([2, BLOCK_N]).permute((1, 0))
    first, second = gl.split(gl.convert_layout(pairs, PAIRS))
    return first, second, stage


@gluon.jit
def silu_times(gate, up, dtype: gl.constexpr):
    gate = gate.to(dtype).to(gl.float32)
    return gate / (1.0 + gl.exp(-gate)) * up.to(dtype).to(gl.float32)


@gluon.jit
def _row_linear_kernel(
    x_ptr,
    residual_ptr,
    gain_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    r_ptr,
    eps,
    stride_weight_row,
    N: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_NORM: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """N: rows of W, gates and ups together."""
    if PDL:
        gdc_launch_dependents()
    PAIRS: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 2], [32, 1], [gl.num_warps(), 1], [1, 0]))
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    num_tiles = (N + 2 * BLOCK_N - 1) // (2 * BLOCK_N)
    ring = gl.allocate_shared_memory(dtype, [NUM_STAGES, 2 * BLOCK_N, BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    x_shared = gl.allocate_shared_memory(dtype, [STEPS, BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    begin(weight_ptr, stride_weight_row, ring, num_tiles, N, K, GROUP, NUM_STAGES)
    if HAS_NORM:
        gain = load_row(gain_ptr, K, STEPS, WARPS).to(gl.float32)
    if PDL:
        gdc_wait()
    x = load_row(x_ptr, K, STEPS, WARPS)
    if HAS_NORM:
        x = normalised(x, residual_ptr, gain, r_ptr, eps, K, HAS_RESIDUAL, STEPS, WARPS)
    x_shared.store(x)
    stage = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first, second, stage = sums_of_tile(
            weight_ptr, stride_weight_row, ring, x_shared, tile, num_tiles, stage, N, K, GROUP, NUM_STAGES
        )
        pairs = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=PAIRS)
        rows = pairs // GROUP * (2 * GROUP) + pairs % GROUP
        if HAS_BIAS:
            first += gl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(gl.float32)
            second += gl.load(bias_ptr + rows + GROUP, mask=rows + GROUP < N, other=0.0).to(gl.float32)
        if GATED:
            gl.store(y_ptr + pairs, silu_times(first, second, dtype).to(dtype), mask=pairs < GROUP)
        else:
            gl.store(y_ptr + rows, first.to(dtype), mask=rows < N)
            gl.store(y_ptr + rows + GROUP, second.to(dtype), mask=rows + GROUP < N)


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether one of these layers can be asked for."""
    k, n = weight.shape
    has_rows = weight.stride(0) == 1 and weight.stride(1) % 16 == 0 and weight.data_ptr() % 16 == 0
    return has_rows and takes_hopper_row(x.shape[0], k, n, x.element_size(), is_hopper=is_hopper(x.device))


def launch_choices(k: int, n: int, device: torch.device) -> tuple[int, dict[str, int]]:
    """(programs, what a kernel of one row is compiled for beside its layer) of a weight [k, n]."""
    config = hopper_row_config(k)
    steps = next_power_of_2(ceil_div(k, BLOCK_K.value))
    constants = {
        "NUM_STAGES": config.num_stages,
        "STEPS": steps,
        "WARPS": min(steps, config.num_warps),
        "num_warps": config.num_warps,
    }
    return min(ceil_div(n, 2 * BLOCK_N.value), num_sms(device)), constants


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [1, in_features], fp16|bf16, contiguous, 16-byte aligned; in_features a multiple of 16, at most 16384
    weight: [in_features, out_features], x's dtype, contiguous along in_features (the transpose of a stored [out, in]), columns 32-byte
        aligned; out_features even
    bias: [out_features], contiguous, or None

    Returns [1, out_features], new, contiguous, in x's dtype.
    """
    return _launch(x, None, None, 0.0, weight, bias, gated=False)[0]


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `linear` of rms_norm(x + residual); residual: [1, in_features], as x, or None; gain: [in_features], contiguous.

    Returns (y: [1, out_features], r: [1, in_features]); without a residual r is x itself.
    """
    return _launch(x, residual, gain, eps, weight, bias, gated=False)


def norm_gate_up(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `norm_linear` with weight [in_features, 2 inter], columns [gate | up], and silu(gate) * up: y is [1, inter]."""
    return _launch(x, residual, gain, eps, weight, bias, gated=True)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gain: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a gain there is no norm."""
    k, n = weight.shape
    assert x.shape == (1, k), f"x is {tuple(x.shape)}, not {(1, k)}"
    assert x.stride(1) == weight.stride(0) == 1, "x and the weight must be contiguous along in_features"
    y = torch.empty((1, n // 2 if gated else n), dtype=x.dtype, device=x.device)
    r = x if residual is None else torch.empty((1, k), dtype=x.dtype, device=x.device)
    num_programs, constants = launch_choices(k, n, x.device)
    _row_linear_kernel[(num_programs,)](
        x,
        residual,
        gain,
        weight,
        bias,
        y,
        None if residual is None else r,
        eps,
        weight.stride(1),
        N=n,
        K=k,
        GROUP=n // 2 if gated else BLOCK_N.value,
        HAS_NORM=gain is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        GATED=gated,
        **constants,
        **launch_options(has_pdl(x.device)),
    )
    return y, r
