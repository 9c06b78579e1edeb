"""The rotary_store_kv kernel against float64, with caches full of NaN so that every write and every non-write shows.

Tolerance of q and k: fp32 arithmetic, rounded once, so half a unit in the last place (eps / 2, RMS eps / sqrt(12)) plus fp32
noise (1e-6; an element where a cos and b sin cancel is judged by the size of its neighbours). v is copied: exact.
"""

from typing import NamedTuple

import pytest
import torch

from turbotriton.backend.ops.kernels.rotary_store_kv import rotary_store_kv
from turbotriton.contract.errors import ConfigError


class Shape(NamedTuple):
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int


SHAPES = [
    Shape(1, 1, 1, 2, 2, 1),
    Shape(7, 6, 3, 40, 24, 5),  # partial rotary, nothing a power of two
    Shape(9, 8, 1, 80, 80, 16),
    Shape(4, 5, 5, 96, 48, 8),
    Shape(2, 2, 1, 256, 256, 64),
    Shape(3, 32, 8, 128, 128, 64),
]


def rotate(heads, cos, sin):
    """[num_tokens, heads, head_dim] float64, half-split pairs."""
    half = cos.shape[1]
    heads = heads.double().clone()
    a, b = heads[..., :half].clone(), heads[..., half : 2 * half].clone()
    c, s = cos.double()[:, None], sin.double()[:, None]
    heads[..., :half], heads[..., half : 2 * half] = a * c - b * s, b * c + a * s
    return heads


def inputs(target, shape, num_blocks=6):
    num_columns = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    angle = target.randn_fp32(shape.num_tokens, shape.rotary_dim // 2)
    cache_shape = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
    caches = [torch.full(cache_shape, float("nan"), dtype=target.dtype, device=target.device) for _ in "kv"]
    slots = torch.randperm(num_blocks * shape.block_size, generator=target.generator)[: shape.num_tokens].to(target.device)
    return target.randn(shape.num_tokens, num_columns), angle.cos(), angle.sin(), *caches, slots


def check(target, shape, assert_close, qkv, cos, sin, q_scale, k_cache, v_cache, slots):
    q = rotary_store_kv(qkv, cos, sin, q_scale, k_cache, v_cache, slots, shape.num_heads, shape.num_kv_heads)
    tolerance = {"max_error": 0.5 * target.eps + 1e-6, "rms_error": 0.3 * target.eps + 1e-6}
    heads = qkv.reshape(shape.num_tokens, -1, shape.head_dim)
    wide_q, wide_k = (
        rotate(heads[:, : shape.num_heads], cos, sin),
        rotate(heads[:, shape.num_heads : -shape.num_kv_heads], cos, sin),
    )
    if q_scale is not None:
        wide_q = wide_q * q_scale.double()[:, None, None]
    assert_close(q, wide_q, **tolerance)
    untouched = torch.ones(k_cache.shape[0], k_cache.shape[2], dtype=torch.bool, device=target.device)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, shape.block_size)
            untouched[block, offset] = False
            assert_close(k_cache[block, :, offset], wide_k[token], **tolerance)
            assert torch.equal(v_cache[block, :, offset], heads[token, -shape.num_kv_heads :])
    for cache in (k_cache, v_cache):
        assert cache.transpose(1, 2)[untouched].isnan().all(), "a slot that no token names was written"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("has_q_scale", [False, True], ids=["", "q_scale"])
def test_q_is_rotated_and_k_v_land_in_their_slots(target, shape, has_q_scale, assert_close, guarded_outputs):
    qkv, cos, sin, k_cache, v_cache, slots = inputs(target, shape)
    q_scale = target.randn_fp32(shape.num_tokens).abs() + 0.5 if has_q_scale else None
    check(target, shape, assert_close, qkv, cos, sin, q_scale, k_cache, v_cache, slots)


def test_slot_minus_one_stores_nothing(target, assert_close, guarded_outputs):
    shape = SHAPES[1]
    qkv, cos, sin, k_cache, v_cache, slots = inputs(target, shape)
    slots[1] = slots[4] = slots[6] = -1
    check(target, shape, assert_close, qkv, cos, sin, None, k_cache, v_cache, slots)


def test_all_inputs_may_be_strided(target, assert_close, guarded_outputs):
    """qkv a slice of a wider row, every second row of cos and sin, one cache of k and v with tokens before heads."""
    shape = Shape(5, 4, 2, 24, 16, 8)
    qkv, cos, sin, k_cache, v_cache, slots = inputs(target, shape)
    qkv = torch.cat([target.randn(5, 3), qkv, target.randn(5, 9)], dim=1)[:, 3:-9]
    cos, sin = cos.repeat_interleave(2, 0)[::2], sin.repeat_interleave(2, 0)[::2]
    joint = torch.full((6, 8, 2, 2, 24), float("nan"), dtype=target.dtype, device=target.device)
    k_cache, v_cache = (joint[:, :, i].transpose(1, 2) for i in range(2))
    q_scale = target.randn_fp32(10).abs()[::2]
    slots = torch.stack([slots, slots], dim=1)[:, 0]
    check(target, shape, assert_close, qkv, cos, sin, q_scale, k_cache, v_cache, slots)


def test_v_with_infinities_is_copied_exactly(target):
    shape = SHAPES[1]
    qkv, cos, sin, k_cache, v_cache, slots = inputs(target, shape)
    qkv[:, -shape.num_kv_heads * shape.head_dim :: 3] = float("inf")
    rotary_store_kv(qkv, cos, sin, None, k_cache, v_cache, slots, shape.num_heads, shape.num_kv_heads)
    v = qkv.view(shape.num_tokens, -1, shape.head_dim)[:, -shape.num_kv_heads :]
    assert torch.equal(v_cache[slots // shape.block_size, :, slots % shape.block_size], v)


def test_no_tokens_write_nothing(target):
    shape = SHAPES[1]._replace(num_tokens=0)
    qkv, cos, sin, k_cache, v_cache, slots = inputs(target, shape)
    q = rotary_store_kv(qkv, cos, sin, None, k_cache, v_cache, slots, shape.num_heads, shape.num_kv_heads)
    assert q.shape == (0, shape.num_heads, shape.head_dim)
    assert k_cache.isnan().all()
    assert v_cache.isnan().all()


def test_rotary_dim_past_the_head_is_refused():
    cache, cos = torch.zeros(1, 1, 1, 16), torch.zeros(1, 9)
    with pytest.raises(ConfigError, match="rotary_dim 18 with head_dim 16"):
        rotary_store_kv(torch.zeros(1, 48), cos, cos, None, cache, cache.clone(), torch.zeros(1, dtype=torch.int64), 1, 1)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31_reach_their_rows(assert_close):
    """A qkv of 2.2e9 elements and caches of 2.6e9: the last token goes to the last slot."""
    num_tokens, num_heads, num_kv_heads, head_dim, block_size, num_blocks = 360_000, 32, 8, 128, 64, 40_000
    qkv = torch.empty(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=torch.bfloat16, device="cuda").normal_()
    angle = torch.randn(num_tokens, head_dim // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    caches = [torch.zeros(num_blocks, num_kv_heads, block_size, head_dim, dtype=qkv.dtype, device="cuda") for _ in "kv"]
    slots = torch.arange(num_tokens, device="cuda") + num_blocks * block_size - num_tokens
    q = rotary_store_kv(qkv, cos, sin, None, *caches, slots, num_heads, num_kv_heads)
    eps = torch.finfo(qkv.dtype).eps
    tail = qkv[-block_size:].view(block_size, -1, head_dim)
    expected = rotate(tail[:, : num_heads + num_kv_heads], cos[-block_size:], sin[-block_size:])
    tolerance = {"max_error": 0.5 * eps + 1e-6, "rms_error": 0.3 * eps + 1e-6}
    assert_close(q[-block_size:], expected[:, :num_heads], **tolerance)
    assert_close(caches[0][-1].transpose(0, 1), expected[:, num_heads:], **tolerance)
    assert torch.equal(caches[1][-1].transpose(0, 1), tail[:, -num_kv_heads:])
    assert not caches[1][: num_blocks - num_tokens // block_size - 1].any()
