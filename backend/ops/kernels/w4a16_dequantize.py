"""The 4 bit weights of w4a16_linear.py alone, in 16 bits, for products with many rows."""

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.operands import W4A16Tiles

from .fast_launch import launch
from .launch import has_pdl, launch_options, wait_for_previous
from .w4a16_words import load_weights, numbers_of

__all__ = ["dequantize_w4a16"]


@triton.jit
def _dequantize_w4a16_kernel(
    words_ptr,
    params_ptr,
    out_ptr,
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    GATED: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    BLOCK_K: tl.constexpr = 64 * R
    step = tl.program_id(0)
    tile = tl.program_id(1)
    words, params = load_weights(words_ptr, params_ptr, tile * W, step, None, N, K, GROUP_SIZE, W, R)
    weight = numbers_of(words, params, out_ptr.dtype.element_ty, "weights", ASM)
    place = tile * 16 * W + tl.arange(0, 16 * W)
    column = place
    if GATED:
        column = place // 16 * 8 + place % 8 + place % 16 // 8 * (N // 2)
    offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(out_ptr + column.to(tl.int64)[:, None] * K + offs_k[None, :], weight)


def dequantize_w4a16(weight: W4A16Tiles) -> torch.Tensor:
    """[in_features, out_features] in the weight's dtype, new, contiguous along in_features, columns in natural order."""
    n, k = weight.out_features, weight.in_features
    out = torch.empty((n, k), dtype=weight.dtype, device=weight.words.device)
    rounds = 2 if weight.group_size % 128 == 0 else 1
    launch(
        _dequantize_w4a16_kernel,
        (k // (64 * rounds), n // 64),
        weight.words,
        weight.params,
        out,
        n,
        k,
        GROUP_SIZE=weight.group_size,
        GATED=weight.gated,
        W=4,
        R=rounds,
        ASM=out.is_cuda,
        num_warps=4,
        **launch_options(has_pdl(out.device)),
    )
    return out.t()
