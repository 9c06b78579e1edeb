"""RMSNorm with an optional residual sum (Zhang and Sennrich 2019, arXiv:1910.07467).

    r = x                       without residual
    r = round(x + residual)     to x's dtype, otherwise; x = round(sum of its parts) where it is SplitSums,
                                and r = x where it is Added
    y = round(r * rsqrt(mean(r^2) + eps) * weight)      in fp32, rounded once

Tiling: a program holds BLOCK_M whole rows in registers, so each element is read once and written once.

    x [num_tokens, hidden]      +-------- BLOCK_N = hidden padded --------+
                    BLOCK_M     | program 0                               |
                                +-----------------------------------------+
                    BLOCK_M     | program 1                               |
"""

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import Added, Projected, SplitSums, parts_of

from .fast_launch import launch
from .launch import chosen, has_pdl, launch_options, wait_for_previous
from .split_sum import load_sum
from .tuning import ceil_div, rms_norm_config

__all__ = ["rms_norm"]


@triton.jit(do_not_specialize=["num_tokens"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    r_ptr,
    num_tokens,
    eps,
    stride_x_row,
    stride_residual_row,
    stride_y_row,
    HIDDEN: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # int64: num_tokens * hidden may pass 2^31
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < HIDDEN
    mask = (offs_m < num_tokens) & mask_n
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0)  # while the kernel before still runs
    wait_for_previous(PDL)

    dtype: tl.constexpr = y_ptr.dtype.element_ty
    r = load_sum(x_ptr + offs_m * stride_x_row + offs_n, mask, num_tokens.to(tl.int64) * HIDDEN, NUM_PARTS, dtype)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs_m * stride_residual_row + offs_n, mask=mask, other=0.0)
        r = (r.to(tl.float32) + residual.to(tl.float32)).to(dtype)  # the rounding of the residual stream
        tl.store(r_ptr + offs_m * stride_y_row + offs_n, r, mask=mask)
    wide = r.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1, keep_dims=True) / HIDDEN
    y = wide * tl.rsqrt(mean_square + eps) * weight.to(tl.float32)
    tl.store(y_ptr + offs_m * stride_y_row + offs_n, y.to(dtype), mask=mask)


def rms_norm(
    x: Projected, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on the current device and stream.

    x, residual: [num_tokens, hidden], fp16|bf16|fp32, rows of any stride, contiguous inside a row; SplitSums only beside a residual
    weight: [hidden], contiguous; num_tokens may be 0

    Returns (y, r), both new, [num_tokens, hidden] in x's dtype; without a residual r is x itself, and the total of Added.
    Raises ConfigError when hidden > 32768.
    """
    num_tokens, hidden = x.shape
    config = chosen(rms_norm_config, hidden)
    dtype = x.dtype
    if isinstance(x, Added):
        x, residual = x.total, None
    assert residual is not None or not isinstance(x, SplitSums), "sums are split beside a residual only"
    x, num_parts = parts_of(x)
    assert x.stride(-1) == 1 or hidden == 1, "x must be contiguous inside a row"
    assert residual is None or residual.stride(1) == 1 or hidden == 1, "residual must be contiguous inside a row"
    y = torch.empty((num_tokens, hidden), dtype=dtype, device=x.device)
    r = x if residual is None else torch.empty_like(y)
    if num_tokens == 0:
        return y, r
    launch(
        _rms_norm_kernel,
        (ceil_div(num_tokens, config.block_m),),
        x,
        residual,
        weight,
        y,
        None if residual is None else r,
        num_tokens,
        eps,
        x.stride(-2),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        HIDDEN=hidden,
        NUM_PARTS=num_parts,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return y, r
