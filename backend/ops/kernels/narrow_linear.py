"""Linear layers over a batch of decodes, on the matrix units: y = round(x W + b), and silu(gate) * up of W = [gate | up].

The time is that of reading the weight once. It is the left operand, so that 64 of its outputs fill an instruction and the rows of x,
padded to 16 or more, are the short side:

    W rows      +-- BLOCK_K --+-------- ...            y^T tile [BLOCK_N, BLOCK_M] += W tile x^T tile
    BLOCK_N     |             |                        NUM_SPLITS programs share the columns of W; sums in fp32
                +-------------+-------- ...

Programs that share a tile add up what they have in a workspace (split_sum.py), or leave it to what comes next, a norm or rotary
(SplitSums): the last of them would wait for the others, and its parts for the L2 cache.

On Hopper, layers that leave parts or have a gate are handed on to hopper_narrow_linear.py.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turbotriton.backend.ops.operands import SplitSums, Unadded

from . import hopper_narrow_linear
from .fast_launch import launch
from .hopper_tuning import takes_hopper_narrow
from .launch import chosen, has_pdl, is_hopper, launch_options, num_sms
from .split_sum import sum_of_splits, workspace
from .tuning import NarrowLinearConfig, ceil_div, narrow_linear_config

__all__ = ["gate_up", "linear", "split_linear"]


@triton.jit(do_not_specialize=["num_rows"])
def _narrow_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counters_ptr,
    num_rows,
    N,
    K,
    stride_x_row,
    stride_weight_row,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    LEAVES_PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.static_assert(not GATED or not LEAVES_PARTS, "gates come after the sum")
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    num_steps = tl.cdiv(K, BLOCK_K)
    steps = tl.cdiv(num_steps, NUM_SPLITS)
    begin = split * steps
    end = tl.minimum(begin + steps, num_steps)
    # Outputs past the end repeat the last, and are not stored. Rows past it are zeros, for all programs would ask the L2 cache for one row.
    rows_ptr = weight_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[:, None] * stride_weight_row + offs_k[None, :]
    up_ptr = rows_ptr + tl.cast(stride_weight_row, tl.int64) * N
    x_rows_ptr = x_ptr + offs_m[None, :] * stride_x_row + offs_k[:, None]
    mask_m = (offs_m < num_rows)[None, :]
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(begin, end, num_stages=NUM_STAGES):
        k = step * BLOCK_K
        if EVEN_K:
            x = tl.load(x_rows_ptr + k, mask=mask_m, other=0.0)
            weight = tl.load(rows_ptr + k)
        else:
            mask_k = k + offs_k < K
            x = tl.load(x_rows_ptr + k, mask=mask_m & mask_k[:, None], other=0.0)
            weight = tl.load(rows_ptr + k, mask=mask_k[None, :], other=0.0)
        acc = tl.dot(weight, x, acc=acc, input_precision=PRECISION)
        if GATED:
            up = tl.load(up_ptr + k) if EVEN_K else tl.load(up_ptr + k, mask=(k + offs_k < K)[None, :], other=0.0)
            acc_up = tl.dot(up, x, acc=acc_up, input_precision=PRECISION)
    is_last = True
    if LEAVES_PARTS:
        y_ptr += split.to(tl.int64) * num_rows * N
    elif NUM_SPLITS > 1:
        tl.static_assert(not GATED, "a gated layer is not split")
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        acc, is_last = sum_of_splits(acc, parts_ptr, counters_ptr, tile, split, NUM_SPLITS)
    if is_last:
        mask_n = offs_n < N
        if HAS_BIAS:
            adds_bias = mask_n & (offs_n * 0 + split == 0) if LEAVES_PARTS else mask_n  # & takes tensors, not a scalar
            acc += tl.load(bias_ptr + offs_n, mask=adds_bias, other=0.0).to(tl.float32)[:, None]
        if GATED:
            if HAS_BIAS:
                acc_up += tl.load(bias_ptr + N + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
            gate = acc.to(dtype).to(tl.float32)
            acc = gate / (1.0 + tl.exp(-gate)) * acc_up.to(dtype).to(tl.float32)
        y_rows_ptr = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
        tl.store(y_rows_ptr, acc.to(dtype), mask=mask_m & mask_n[:, None])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [num_rows, in_features], fp16|bf16|fp32, rows of any stride, contiguous inside a row
    weight: [in_features, out_features], x's dtype, contiguous along in_features (the transpose of a stored [out, in])
    bias: [out_features], contiguous, or None

    Returns [num_rows, out_features], new, contiguous, in x's dtype. num_rows may be 0.
    """
    return _linear(x, weight, bias, gated=False)


def split_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Unadded:
    """As `linear`; where several programs share a tile's inputs, what each of them has, not yet added up. The first part has the bias."""
    if _is_for_hopper(x, weight):
        return hopper_narrow_linear.split_linear(x, weight, bias)
    config = _config(x, weight, gated=False)
    if config.num_splits == 1 or x.shape[0] == 0:
        return linear(x, weight, bias)
    parts = torch.empty((config.num_splits, x.shape[0], weight.shape[1]), dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, parts, None, None, config, gated=False)
    return SplitSums(parts, x.dtype)


def gate_up(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear` with weight [in_features, 2 inter], columns [gate | up], and silu(gate) * up: [num_rows, inter]."""
    if _is_for_hopper(x, weight, gated=True):
        return hopper_narrow_linear.gate_up(x, weight, bias)
    return _linear(x, weight, bias, gated=True)


def _is_for_hopper(x: torch.Tensor, weight: torch.Tensor, *, gated: bool = False) -> bool:
    """Whether a layer that leaves parts, or a gated one, is handed on to `hopper_narrow_linear`."""
    is_aligned = weight.stride(0) == 1 and weight.stride(1) % 8 == 0 and weight.data_ptr() % 16 == 0 and x.stride(1) == 1
    if not is_aligned:
        return False
    (num_rows, k), n, device = x.shape, weight.shape[1] // 2 if gated else weight.shape[1], x.device
    return chosen(
        takes_hopper_narrow, num_rows, k, n, x.element_size(), num_sms(device), gated=gated, is_hopper=is_hopper(device)
    )


def _config(x: torch.Tensor, weight: torch.Tensor, *, gated: bool) -> NarrowLinearConfig:
    k, n = weight.shape
    return narrow_linear_config(x.shape[0], n // 2 if gated else n, k, x.element_size(), num_sms(x.device), gated=gated)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool) -> torch.Tensor:
    num_rows, n = x.shape[0], weight.shape[1] // 2 if gated else weight.shape[1]
    y = torch.empty((num_rows, n), dtype=x.dtype, device=x.device)
    if num_rows:
        config = _config(x, weight, gated=gated)
        parts, counters = workspace(x.device) if config.num_splits > 1 else (None, None)
        _launch(x, weight, bias, y, parts, counters, config, gated=gated)
    return y


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    parts: torch.Tensor | None,
    counters: torch.Tensor | None,
    config: NarrowLinearConfig,
    *,
    gated: bool,
) -> None:
    """y: [num_rows, n] in x's dtype, or [num_splits, num_rows, n], fp32, for the parts of a sum."""
    assert x.stride(1) == 1 or x.shape[1] == 1, "x must be contiguous inside a row"
    assert weight.stride(0) == 1 or weight.shape[0] == 1, "the weight must be contiguous along in_features"
    (num_rows, k), n = x.shape, y.shape[-1]
    launch(
        _narrow_linear_kernel,
        (ceil_div(n, config.block_n), ceil_div(num_rows, config.block_m), config.num_splits),
        x,
        weight,
        bias,
        y,
        parts,
        counters,
        num_rows,
        n,
        k,
        x.stride(0),
        weight.stride(1),
        HAS_BIAS=bias is not None,
        GATED=gated,
        LEAVES_PARTS=y.dim() == 3,
        EVEN_K=k % config.block_k == 0,
        NUM_SPLITS=config.num_splits,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_STAGES=config.num_stages,
        PRECISION="ieee",
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
