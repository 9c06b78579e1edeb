"""SiLU of the gate times the up projection (Shazeer 2020, arXiv:2002.05202).

    y = round(gate / (1 + exp(-gate)) * up)      in fp32, rounded once

Tiling: a program takes BLOCK_M rows of BLOCK_N columns from both halves of x.

    x [num_tokens, 2 inter]     | gate: .. BLOCK_N .. | up: .. BLOCK_N .. |  ->  y [num_tokens, inter]  | .. BLOCK_N .. |
"""

import torch
import triton
import triton.language as tl

from .fast_launch import launch
from .launch import has_pdl, launch_options, wait_for_previous
from .tuning import ceil_div, silu_and_mul_config

__all__ = ["silu_and_mul"]


@triton.jit(do_not_specialize=["num_tokens"])
def _silu_and_mul_kernel(
    x_ptr,
    y_ptr,
    num_tokens,
    stride_x_row,
    INTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # int64: num_tokens * inter may pass 2^31
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (offs_m < num_tokens) & (offs_n < INTER)
    gate_ptrs = x_ptr + offs_m * stride_x_row + offs_n
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + INTER, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up  # exp overflows to inf below -88, and the quotient is then -0 as it should be
    tl.store(y_ptr + offs_m * INTER + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Launch on the current device and stream.

    x: [num_tokens, 2 inter], fp16|bf16|fp32, columns [gate | up], rows of any stride, contiguous inside a row

    Returns y: [num_tokens, inter], new, contiguous, in x's dtype. num_tokens may be 0.
    """
    num_tokens, columns = x.shape
    inter = columns // 2
    assert columns == 2 * inter, f"{columns} columns are not two halves"
    assert x.stride(1) == 1, "x must be contiguous inside a row"
    y = torch.empty((num_tokens, inter), dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return y
    config = silu_and_mul_config(inter)
    launch(
        _silu_and_mul_kernel,
        (ceil_div(num_tokens, config.block_m), ceil_div(inter, config.block_n)),
        x,
        y,
        num_tokens,
        x.stride(0),
        INTER=inter,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        **launch_options(has_pdl(x.device)),
    )
    return y
