"""Linear layers over a batch of decodes for Hopper: y = round(x W + b), and silu(gate) * up of W = [gate | up], as `narrow_linear`'s.

The time is that of reading the weight once, so bytes of it must always be under way, also while the kernel before this one ends. A
program's warps, written in Gluon, the layer of triton where layouts, shared memory and waits are explicit:

    fetching    | W0 W1 W2 W3 |  wait for the kernel before  | x0 x1 x2 x3 | W4 x4 | W5 x5 | ...     TMA into a ring of NUM_STAGES steps
    computing                                                | y^T += W0 x0^T | y^T += W1 x1^T | ...

A weight depends on no kernel, so a program fills its ring with it before that wait, and asks for AHEAD steps more to come to the L2 cache.
It takes less than half of a multiprocessor's shared memory and registers: programs of the next layer become resident beside those of this
one and have their rings full when it ends.

    W rows      +-- BLOCK_K --+-------- ...            y^T tile [BLOCK_N, BLOCK_M] += W tile x^T tile; sums in fp32
    BLOCK_N     |             |                        x tiles pass through the L2 cache once for every BLOCK_N outputs
                +-------------+-------- ...

Shares: the steps of all tiles are counted through, and each program takes as many of them, give or take one: a part of a tile, whole
tiles, or the end of one and the beginning of the next. A tile that lies in one share is done; parts of the others meet in a workspace,
where the last program to arrive adds them up in the order of their inputs.

    steps       | tile 0              | tile 1              | tile 2 ...
    programs    | 0           | 1           | 2           | 3 ...         program 1: the end of a tile and the beginning of another

Barriers of a stage: `full`, which the bytes of both its tiles complete, and `free`, which the computing warps arrive at when the products
of the step have read them. Step number n of a program lies in stage n % NUM_STAGES, phase n // NUM_STAGES. Rows of x past the end, and
inputs past K, are zeros that the copy engine writes: nothing is read for them.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import has_pdl, launch_options, num_sms
from .split_sum import is_last_of, workspace
from .tuning import MAX_PARTS, ceil_div, hopper_narrow_config

__all__ = ["MAX_ROWS", "gate_up", "linear", "takes"]

MAX_ROWS = 128  # one tile of rows

load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # renamed after triton 3.6

#: A thread, of 256 threads at launch: two programs have the registers of a multiprocessor. The computing warps have 232 of them.
LAUNCH_REGISTERS = 128
FETCH_REGISTERS = gl.constexpr(24)


@gluon.jit
def _load_weights(
    weight_desc, w_tiles, full, stage, tile, step, N, GATED: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr
):
    """Asks for the W tile of a step; if gated, for that of the gates and that of the ups."""
    if GATED:
        load_tile(weight_desc, [tile * BLOCK_N, step * BLOCK_K], full.index(stage), w_tiles.index(2 * stage))
        load_tile(weight_desc, [N + tile * BLOCK_N, step * BLOCK_K], full.index(stage), w_tiles.index(2 * stage + 1))
    else:
        load_tile(weight_desc, [tile * BLOCK_N, step * BLOCK_K], full.index(stage), w_tiles.index(stage))


@gluon.jit
def _ask_for_rows(weight_ptr, first_row, num_rows, num_bytes, stride_row, BLOCK_N: gl.constexpr):
    """Brings the next `num_bytes` of BLOCK_N rows of W to the L2 cache; nothing waits for them."""
    rows = first_row + gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [1], [0]))
    ptrs = weight_ptr + gl.minimum(rows, num_rows - 1).to(gl.int64) * stride_row
    gl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [ptrs, num_bytes + gl.zeros_like(rows)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _fetch(
    x_desc,
    weight_desc,
    weight_ptr,
    stride_weight_row,
    K,
    work,
    ring,
    touched,
    AHEAD: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """The one warp that brings tiles. touched: the barrier of a first copy that makes the engine know x's descriptor, and reads nothing."""
    STEP_BYTES: gl.constexpr = ((2 if GATED else 1) * BLOCK_N + BLOCK_M) * BLOCK_K * 2
    N, num_steps, begin, end = work
    x_tiles, w_tiles, full, free = ring
    early = gl.minimum(begin + NUM_STAGES, end)
    for at in range(begin, early):
        stage = at - begin
        mbarrier.expect(full.index(stage), STEP_BYTES)
        _load_weights(weight_desc, w_tiles, full, stage, at // num_steps, at % num_steps, N, GATED, BLOCK_N, BLOCK_K)
    if AHEAD > 0 and early < end:
        step = early % num_steps
        stop = gl.minimum(gl.minimum(step + AHEAD, step + end - early), num_steps)
        num_bytes = 2 * (gl.minimum(stop * BLOCK_K, K) - step * BLOCK_K)
        rows_ptr = weight_ptr + step * BLOCK_K
        _ask_for_rows(rows_ptr, early // num_steps * BLOCK_N, N, num_bytes, stride_weight_row, BLOCK_N)
        if GATED:
            _ask_for_rows(rows_ptr, N + early // num_steps * BLOCK_N, 2 * N, num_bytes, stride_weight_row, BLOCK_N)
    if PDL:
        mbarrier.expect(touched, BLOCK_M * BLOCK_K * 2)
        load_tile(x_desc, [BLOCK_M, 0], touched, x_tiles.index(0))
        mbarrier.wait(touched, 0)
        gdc_wait()
    for at in range(begin, early):
        stage = at - begin
        load_tile(x_desc, [0, at % num_steps * BLOCK_K], full.index(stage), x_tiles.index(stage))
    for at in range(early, end):
        number = at - begin
        stage = number % NUM_STAGES
        mbarrier.wait(free.index(stage), number // NUM_STAGES - 1 & 1)
        mbarrier.expect(full.index(stage), STEP_BYTES)
        load_tile(x_desc, [0, at % num_steps * BLOCK_K], full.index(stage), x_tiles.index(stage))
        _load_weights(weight_desc, w_tiles, full, stage, at // num_steps, at % num_steps, N, GATED, BLOCK_N, BLOCK_K)


@gluon.jit
def _add_parts(acc, acc_up, part_ptr, next_ptr, SIZE: gl.constexpr, AT_ONCE: gl.constexpr, GATED: gl.constexpr):
    part = gl.load(part_ptr, cache_modifier=".cg")
    if AT_ONCE == 2:
        after = gl.load(next_ptr, cache_modifier=".cg")
    acc = acc + part
    if AT_ONCE == 2:
        acc = acc + after
    if GATED:
        acc_up, _ = _add_parts(acc_up, acc_up, part_ptr + SIZE, next_ptr + SIZE, SIZE, AT_ONCE, False)
    return acc, acc_up


@gluon.jit
def _sum_of_parts(
    acc,
    acc_up,
    parts_ptr,
    counters_ptr,
    tile,
    num_steps,
    num_all,
    GATED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """(acc, acc_up over all inputs of `tile`, whether this program is the last of those that share it: others have sums of no use)

    A program has two slots of its sums' size: part 0 of a tile lies in the second of its program, unless the program begins with the
    tile, every other part in the first of its program.
    """
    SIZE: gl.constexpr = BLOCK_N * BLOCK_M
    SLOT: gl.constexpr = 2 * SIZE if GATED else SIZE
    AT_ONCE: gl.constexpr = 2 if SLOT <= 8192 else 1  # 64 registers of each; a part takes as long to arrive as to read
    num_programs = gl.num_programs(0)
    first = ((tile * num_steps + 1) * num_programs - 1) // num_all  # the program that has this tile's first step
    part = gl.program_id(0) - first
    num_parts = ((tile + 1) * num_steps * num_programs - 1) // num_all + 1 - first
    is_last = True
    if num_parts > 1:
        offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
        offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LAYOUT))
        offs = offs_n[:, None] * BLOCK_M + offs_m[None, :]
        first_slot = 2 * first + gl.where(first * num_all // num_programs < tile * num_steps, 1, 0)
        mine = gl.where(part == 0, first_slot, 2 * (first + part))
        slot_ptr = parts_ptr + mine * SLOT
        gl.store(slot_ptr + offs, acc)
        if GATED:
            gl.store(slot_ptr + SIZE + offs, acc_up)
        is_last = is_last_of(counters_ptr + tile, num_parts)
        if is_last:
            acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, LAYOUT)
            acc_up = acc
            for at in range(0, num_parts - AT_ONCE + 1, AT_ONCE):
                part_ptr = parts_ptr + gl.where(at == 0, first_slot, 2 * (first + at)) * SLOT + offs
                next_ptr = parts_ptr + 2 * (first + at + AT_ONCE - 1) * SLOT + offs
                acc, acc_up = _add_parts(acc, acc_up, part_ptr, next_ptr, SIZE, AT_ONCE, GATED)
            if AT_ONCE == 2 and num_parts % 2 == 1:
                part_ptr = parts_ptr + 2 * (first + num_parts - 1) * SLOT + offs
                acc, acc_up = _add_parts(acc, acc_up, part_ptr, part_ptr, SIZE, 1, GATED)
    return acc, acc_up, is_last


@gluon.jit
def _anew(value):
    """An integer whose value the compiler takes for another one each time: what follows from it stays where it is used."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _store(
    acc,
    acc_up,
    bias_ptr,
    y_ptr,
    tile,
    num_rows,
    N,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    num_rows, N = _anew(num_rows), _anew(N)  # addresses of all rows, kept over the products, take too many registers
    offs_n = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LAYOUT))
    mask_n = offs_n < N
    if HAS_BIAS:
        acc += gl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(gl.float32)[:, None]
    if GATED:
        if HAS_BIAS:
            acc_up += gl.load(bias_ptr + N + offs_n, mask=mask_n, other=0.0).to(gl.float32)[:, None]
        gate = acc.to(dtype).to(gl.float32)
        acc = gate / (1.0 + gl.exp(-gate)) * acc_up.to(dtype).to(gl.float32)
    mask = mask_n[:, None] & (offs_m < num_rows)[None, :]
    gl.store(y_ptr + offs_m[None, :] * N + offs_n[:, None], acc.to(dtype), mask=mask)


@gluon.jit
def _compute(
    bias_ptr,
    y_ptr,
    parts_ptr,
    counters_ptr,
    num_rows,
    num_all,
    work,
    ring,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    IS_SHARED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Four warps: products, sums and results."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    N, num_steps, begin, end = work
    x_tiles, w_tiles, full, free = ring
    if PDL:
        gdc_wait()
    number = 0
    for tile in range(begin // num_steps, (end + num_steps - 1) // num_steps):
        first = gl.maximum(begin - tile * num_steps, 0)
        last = gl.minimum(end - tile * num_steps, num_steps)
        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, LAYOUT)
        acc_up = acc
        for step in range(first, last):
            stage = number % NUM_STAGES
            mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)
            x = x_tiles.index(stage).permute((1, 0))
            if GATED:
                acc = warpgroup_mma(w_tiles.index(2 * stage), x, acc, is_async=True)
                acc_up = warpgroup_mma(w_tiles.index(2 * stage + 1), x, acc_up, is_async=True)
                acc, acc_up = warpgroup_mma_wait(2, [acc, acc_up])
            else:
                acc = warpgroup_mma(w_tiles.index(stage), x, acc, is_async=True)
                acc = warpgroup_mma_wait(1, [acc])
            mbarrier.arrive(free.index((number + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=step > first)
            number += 1
        if GATED:
            acc, acc_up = warpgroup_mma_wait(0, [acc, acc_up])
        else:
            acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index((number + NUM_STAGES - 1) % NUM_STAGES), count=1)
        is_last = True
        if IS_SHARED:
            # fmt: off
            acc, acc_up, is_last = _sum_of_parts(
                acc, acc_up, parts_ptr, counters_ptr, tile, num_steps, num_all, GATED, BLOCK_M, BLOCK_N, LAYOUT)
            # fmt: on
        if is_last:
            _store(acc, acc_up, bias_ptr, y_ptr, tile, num_rows, N, HAS_BIAS, GATED, BLOCK_M, BLOCK_N, LAYOUT)


@gluon.jit(do_not_specialize=["num_rows", "N", "K", "stride_weight_row", "num_steps", "num_all"])
def _hopper_narrow_kernel(
    x_desc,
    weight_desc,
    weight_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counters_ptr,
    num_rows,
    N,
    K,
    stride_weight_row,
    num_steps,
    num_all,
    AHEAD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    IS_SHARED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    w_tiles = gl.allocate_shared_memory(
        weight_desc.dtype, [NUM_STAGES * (2 if GATED else 1), BLOCK_N, BLOCK_K], weight_desc.layout
    )
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [NUM_STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    touched = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    mbarrier.init(touched, count=1)
    fence_async_shared()
    begin = gl.program_id(0) * num_all // gl.num_programs(0)
    work = (N, num_steps, begin, (gl.program_id(0) + 1) * num_all // gl.num_programs(0))
    ring = (x_tiles, w_tiles, full, free)
    # fmt: off
    gl.warp_specialize(
        [
            (_compute, (bias_ptr, y_ptr, parts_ptr, counters_ptr, num_rows, num_all, work, ring,
                        HAS_BIAS, GATED, IS_SHARED, BLOCK_M, BLOCK_N, NUM_STAGES, PDL)),
            (_fetch, (x_desc, weight_desc, weight_ptr, stride_weight_row, K, work, ring, touched,
                      AHEAD, GATED, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES, PDL)),
        ],
        [1],
        [FETCH_REGISTERS],
    )
    # fmt: on


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` and `gate_up` do: 16 bit, on sm_90, not too many rows, and tensors that the copy engine can read."""
    stored = weight.t()
    return (
        _is_hopper(x.device)
        and x.element_size() == 2
        and x.shape[0] <= MAX_ROWS
        and all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (x, stored))
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Launch on the current device, of compute capability 9.0, and stream.

    x: [num_rows, in_features], fp16|bf16, num_rows at most 128, 16-byte aligned, rows of any stride of whole 16 bytes, contiguous in a row
    weight: [in_features, out_features], x's dtype, the transpose of a stored [out_features, in_features] with strides and alignment as x's
    bias: [out_features], contiguous, or None

    Returns [num_rows, out_features], new, contiguous, in x's dtype. num_rows may be 0. `takes` says whether operands are so.
    """
    return _linear(x, weight, bias, gated=False)


def gate_up(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear` with weight [in_features, 2 inter], columns [gate | up], and silu(gate) * up: [num_rows, inter]."""
    return _linear(x, weight, bias, gated=True)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool) -> torch.Tensor:
    num_rows, k = x.shape
    n = weight.shape[1] // 2 if gated else weight.shape[1]
    y = torch.empty((num_rows, n), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    config = hopper_narrow_config(num_rows, n, k, num_sms(x.device), gated=gated)
    block_n, block_k = config.block_n, config.block_k
    num_tiles, num_steps = ceil_div(n, block_n), ceil_div(k, block_k)
    num_programs = config.num_programs
    assert num_programs <= num_tiles * num_steps < 2**31 // num_programs, "shares of no step, or products that overflow"
    is_shared = num_tiles % num_programs != 0
    parts, counters = workspace(x.device) if is_shared else (None, None)
    if counters is not None:
        assert num_tiles <= counters.numel()
        assert 2 * num_programs * block_n * config.block_m * (2 if gated else 1) <= MAX_PARTS, "no room for the parts"
    layout = gl.NVMMASharedLayout(swizzle_byte_width=min(2 * block_k, 128), element_bitwidth=16, rank=2)
    _hopper_narrow_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(x, [config.block_m, block_k], layout),
        TensorDescriptor.from_tensor(weight.t(), [block_n, block_k], layout),
        weight,
        bias,
        y,
        parts,
        counters,
        num_rows,
        n,
        k,
        weight.stride(1),
        num_steps,
        num_tiles * num_steps,
        AHEAD=config.num_ahead,
        HAS_BIAS=bias is not None,
        GATED=gated,
        IS_SHARED=is_shared,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        NUM_STAGES=config.num_stages,
        num_warps=4,
        maxnreg=LAUNCH_REGISTERS,
        **launch_options(has_pdl(x.device)),
    )
    return y
