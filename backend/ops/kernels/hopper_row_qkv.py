"""All that stands before attention for one row, for Hopper: norm, q, k and v, rotary, and the write into the paged cache, in one launch.

As skinny_qkv.py, with the weights of hopper_row_linear.py: a tile's pairs are the dims i and i + head_dim / 2 that rotary turns.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import hopper_row_linear
from .hopper_row_linear import BLOCK_K, BLOCK_N, begin, launch_choices, load_row, normalised, sums_of_tile
from .launch import has_pdl, launch_options

__all__ = ["norm_qkv_rotary_store", "takes"]


@gluon.jit
def _row_qkv_kernel(
    x_ptr,
    residual_ptr,
    gain_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    q_scale_ptr,
    slot_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    r_ptr,
    eps,
    stride_weight_row,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    K: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HALF: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_Q_SCALE: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    PAIRS: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 2], [32, 1], [gl.num_warps(), 1], [1, 0]))
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    N: gl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF
    num_tiles = N // (2 * BLOCK_N)
    ring = gl.allocate_shared_memory(dtype, [NUM_STAGES, 2 * BLOCK_N, BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    x_shared = gl.allocate_shared_memory(dtype, [STEPS, BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    begin(weight_ptr, stride_weight_row, ring, num_tiles, N, K, HALF, NUM_STAGES)
    gain = load_row(gain_ptr, K, STEPS, WARPS).to(gl.float32)
    if PDL:
        gdc_wait()
    x = load_row(x_ptr, K, STEPS, WARPS)
    x_shared.store(normalised(x, residual_ptr, gain, r_ptr, eps, K, HAS_RESIDUAL, STEPS, WARPS))
    slot = gl.load(slot_ptr)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    stage = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head = (tile * BLOCK_N // HALF).to(gl.int64)  # BLOCK_N divides HALF: a tile lies in one head
        dims = tile * BLOCK_N % HALF + gl.arange(0, BLOCK_N, layout=PAIRS)
        # read while the weights are on their way, also where a value head does not turn
        cos = gl.load(cos_ptr + dims)
        sin = gl.load(sin_ptr + dims)
        if HAS_BIAS:
            bias_a = gl.load(bias_ptr + head * 2 * HALF + dims).to(gl.float32)
            bias_b = gl.load(bias_ptr + head * 2 * HALF + HALF + dims).to(gl.float32)
        a, b, stage = sums_of_tile(weight_ptr, stride_weight_row, ring, x_shared, tile, num_tiles, stage, N, K, HALF, NUM_STAGES)
        if HAS_BIAS:
            a += bias_a
            b += bias_b
        a = a.to(dtype).to(gl.float32)
        b = b.to(dtype).to(gl.float32)
        if head < NUM_HEADS + NUM_KV_HEADS:
            turned_a = a * cos - b * sin
            turned_b = b * cos + a * sin
            if head < NUM_HEADS:
                if HAS_Q_SCALE:
                    scale = gl.load(q_scale_ptr)
                    turned_a = turned_a * scale
                    turned_b = turned_b * scale
                target_ptr = q_ptr + head * (2 * HALF) + dims
                gl.store(target_ptr, turned_a.to(dtype))
                gl.store(target_ptr + HALF, turned_b.to(dtype))
            else:
                target = block * stride_k_block + (head - NUM_HEADS) * stride_k_head + offset * stride_k_token
                target_ptr = k_cache_ptr + target + dims
                gl.store(target_ptr, turned_a.to(dtype), mask=slot >= 0)
                gl.store(target_ptr + HALF, turned_b.to(dtype), mask=slot >= 0)
        else:
            target = block * stride_v_block + (head - NUM_HEADS - NUM_KV_HEADS) * stride_v_head + offset * stride_v_token
            target_ptr = v_cache_ptr + target + dims
            gl.store(target_ptr, a.to(dtype), mask=slot >= 0)
            gl.store(target_ptr + HALF, b.to(dtype), mask=slot >= 0)


def takes(x: torch.Tensor, weight: torch.Tensor, head_dim: int) -> bool:
    """Whether `norm_qkv_rotary_store` can be asked for; the whole head turns."""
    return head_dim % (2 * BLOCK_N.value) == 0 and hopper_row_linear.takes(x, weight)


def norm_qkv_rotary_store(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `skinny_qkv`'s of one row; x and weight as `hopper_row_linear.linear` takes them, head_dim a multiple of 16."""
    k, n = weight.shape
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    half = head_dim // 2
    assert x.shape == (1, k), f"x is {tuple(x.shape)}, not {(1, k)}"
    assert cos.shape == sin.shape == (1, half), f"the whole head turns: {cos.shape} is not {(1, half)}"
    assert half % BLOCK_N.value == 0, f"half a head of {head_dim} is no multiple of {BLOCK_N.value}"
    assert 1 == x.stride(1) == weight.stride(0) == cos.stride(1) == sin.stride(1) == k_cache.stride(3) == v_cache.stride(3)
    num_heads = n // head_dim - 2 * num_kv_heads
    q = torch.empty((1, num_heads, head_dim), dtype=x.dtype, device=x.device)
    r = x if residual is None else torch.empty((1, k), dtype=x.dtype, device=x.device)
    num_programs, constants = launch_choices(k, n, x.device)
    _row_qkv_kernel[(num_programs,)](
        x,
        residual,
        gain,
        weight,
        bias,
        cos,
        sin,
        q_scale,
        slot_mapping,
        q,
        k_cache,
        v_cache,
        None if residual is None else r,
        eps,
        weight.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        K=k,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=half,
        BLOCK_SIZE=block_size,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        HAS_Q_SCALE=q_scale is not None,
        **constants,
        **launch_options(has_pdl(x.device)),
    )
    return q, r
