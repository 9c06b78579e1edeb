"""Linear layers over a few rows, bound by reading the weight once: plain, after RMSNorm, and gated.

    linear            y = round(x W + b)
    norm_linear       r = round(x + residual);   y = round(round(rms_norm(r)) W + b)
    norm_gate_up      the same with W = [gate | up]:   y = round(silu(round(gate)) * round(up))

The weight is read as [out_features, in_features], so a program's loads are whole rows. Sums in fp32.

    W rows      +------ BLOCK_K ------+---------+--- ...
    BLOCK_N     | tile, held times x  |  next   |             x: all rows at once, M x BLOCK_K, from cache
                +---------------------+---------+--- ...

After a norm, BLOCK_K covers the whole row: each program computes the norm for itself, which costs less than another launch, and
program 0 stores r. Programs then take tile after tile with the normalised row in registers, the next tile's weights in flight.

On sm_90 a program reads its first weights before it waits for the kernel before it: they depend on nothing.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import has_pdl, launch_options, num_sms
from .tuning import ceil_div, skinny_linear_config

__all__ = ["MAX_SKINNY_ROWS", "linear", "norm_gate_up", "norm_linear"]

MAX_SKINNY_ROWS = 4


@triton.jit
def _silu_times(gate, up, dtype: tl.constexpr):
    gate = gate.to(dtype).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up.to(dtype).to(tl.float32)


@triton.jit
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stride_x_row,
    stride_weight_row,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    rows_ptr = weight_ptr + offs_n.to(tl.int64)[:, None] * stride_weight_row + offs_k[None, :]
    weight = tl.load(rows_ptr, mask=mask_n[:, None] & (offs_k < K)[None, :], other=0.0)
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        x_mask = (offs_m < M)[:, None] & (k + offs_k < K)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_x_row + k + offs_k[None, :], mask=x_mask, other=0.0)
        acc += weight.to(tl.float32)[None, :, :] * x.to(tl.float32)[:, None, :]
        ahead = k + BLOCK_K + offs_k
        weight = tl.load(rows_ptr + k + BLOCK_K, mask=mask_n[:, None] & (ahead < K)[None, :], other=0.0)
    y = tl.sum(acc, axis=2)  # [BLOCK_M, BLOCK_N]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_tile(
    weight_ptr, first, offs_k, stride_row, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(weights of outputs first .. first + BLOCK_N, those of the same outputs' up projection or the same again); past N zeros."""
    offs_n = first + tl.arange(0, BLOCK_N)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    rows_ptr = weight_ptr + offs_n.to(tl.int64)[:, None] * stride_row + offs_k[None, :]
    weight = tl.load(rows_ptr, mask=mask, other=0.0)
    up = weight
    if GATED:
        up = tl.load(rows_ptr + tl.cast(stride_row, tl.int64) * N, mask=mask, other=0.0)
    return weight, up


@triton.jit
def _normalised(
    x_ptr,
    residual_ptr,
    gain,
    r_ptr,
    eps,
    stride_x_row,
    stride_residual_row,
    M: tl.constexpr,
    K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """rms_norm(x + residual), rounded to x's dtype, in fp32: [BLOCK_M, BLOCK_K]. Program 0 stores x + residual."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_x = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    r = tl.load(x_ptr + offs_m[:, None] * stride_x_row + offs_k[None, :], mask=mask_x, other=0.0)
    dtype: tl.constexpr = r.dtype
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs_m[:, None] * stride_residual_row + offs_k[None, :], mask=mask_x, other=0.0)
        r = (r.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        if tl.program_id(0) == 0:
            tl.store(r_ptr + offs_m[:, None] * K + offs_k[None, :], r, mask=mask_x)
    wide = r.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / K + eps)
    return (wide * scale * gain[None, :]).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["num_programs"])
def _norm_linear_kernel(
    x_ptr,
    residual_ptr,
    gain_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    r_ptr,
    eps,
    stride_x_row,
    stride_residual_row,
    stride_weight_row,
    num_programs,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    offs_k = tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    start = tl.program_id(0) * BLOCK_N
    weight, up = _load_tile(weight_ptr, start, offs_k, stride_weight_row, N, K, GATED, BLOCK_N)
    gain = tl.load(gain_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = _normalised(
        x_ptr, residual_ptr, gain, r_ptr, eps, stride_x_row, stride_residual_row, M, K, HAS_RESIDUAL, BLOCK_M, BLOCK_K
    )
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    for first in range(start, N, num_programs * BLOCK_N):
        ahead, ahead_up = _load_tile(weight_ptr, first + num_programs * BLOCK_N, offs_k, stride_weight_row, N, K, GATED, BLOCK_N)
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        y = tl.sum(weight.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)  # [BLOCK_M, BLOCK_N]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            y_up = tl.sum(up.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)
            if HAS_BIAS:
                y_up += tl.load(bias_ptr + N + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            y = _silu_times(y, y_up, dtype)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
        weight, up = ahead, ahead_up


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert x.shape[0] <= MAX_SKINNY_ROWS, f"{x.shape[0]} rows are more than {MAX_SKINNY_ROWS}"
    assert x.stride(1) == 1 or x.shape[1] == 1, "x must be contiguous inside a row"
    assert weight.stride(0) == 1 or weight.shape[0] == 1, "the weight must be contiguous along in_features"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [num_rows <= 4, in_features], fp16|bf16|fp32, rows of any stride, contiguous inside a row
    weight: [in_features, out_features], x's dtype, contiguous along in_features (the transpose of a stored [out, in])
    bias: [out_features], contiguous, or None

    Returns [num_rows, out_features], new, contiguous, in x's dtype. num_rows may be 0.
    """
    _check(x, weight)
    (num_rows, k), n = x.shape, weight.shape[1]
    y = torch.empty((num_rows, n), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    config = skinny_linear_config(num_rows, k, x.element_size(), whole_rows=False)
    _linear_kernel[(ceil_div(n, config.block_n),)](
        x,
        weight,
        bias,
        y,
        x.stride(0),
        weight.stride(1),
        M=num_rows,
        N=n,
        K=k,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return y


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `linear` of rms_norm(x + residual); residual: [num_rows, in_features] or None; gain: [in_features], contiguous.

    Returns (y: [num_rows, out_features], r: [num_rows, in_features]); without a residual r is x itself.
    """
    return _norm_linear(x, residual, gain, eps, weight, bias, gated=False)


def norm_gate_up(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `norm_linear` with weight [in_features, 2 inter], columns [gate | up], and silu(gate) * up: y is [num_rows, inter]."""
    return _norm_linear(x, residual, gain, eps, weight, bias, gated=True)


def _norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight)
    assert residual is None or residual.stride(1) == 1 or residual.shape[1] == 1, "residual must be contiguous inside a row"
    num_rows, k = x.shape
    n = weight.shape[1] // 2 if gated else weight.shape[1]
    y = torch.empty((num_rows, n), dtype=x.dtype, device=x.device)
    r = x if residual is None else torch.empty((num_rows, k), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y, r
    config = skinny_linear_config(num_rows, k, x.element_size(), whole_rows=True, gated=gated)
    num_programs = min(ceil_div(n, config.block_n), config.programs_per_sm * num_sms(x.device))
    _norm_linear_kernel[(num_programs,)](
        x,
        residual,
        gain,
        weight,
        bias,
        y,
        None if residual is None else r,
        eps,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        weight.stride(1),
        num_programs,
        M=num_rows,
        N=n,
        K=k,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        GATED=gated,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return y, r
