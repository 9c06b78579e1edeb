"""Norm, q, k and v, rotary and store in one launch, against the reference's units in float64 with the roundings that the table names.

Tolerance: q and k are rounded twice, before and after rotary; either may fall to the other side of a tie.
"""

from typing import NamedTuple

import pytest
import torch

from turbotriton.backend.ops.kernels.skinny_qkv import norm_qkv_rotary_store


class Shape(NamedTuple):
    num_rows: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False
    q_scale: bool = False
    residual: bool = True


SHAPES = [
    Shape(1, 256, 4, 2, 64),
    Shape(3, 192, 3, 1, 16, bias=True, q_scale=True),  # rows and inputs that fill no power of two
    Shape(4, 128, 2, 2, 48, residual=False),  # half a head is 24: tiles of 8 pairs at most
    Shape(2, 320, 8, 8, 128, bias=True),
]
BLOCK_SIZE, NUM_BLOCKS = 4, 3
SLOTS = [5, -1, 0, 11]  # the second row stores nothing


def check(function, shape, target, assert_close):
    """That `function`, a kernel's launcher, does it for rows of the target's device and dtype."""
    rows, hidden, heads, kv_heads, dim, *_ = shape
    x = target.randn(rows, hidden + 3)[:, :-3]
    residual = target.randn(rows, hidden) if shape.residual else None
    gain = target.randn(hidden)
    columns = (heads + 2 * kv_heads) * dim
    weight = target.randn(columns, hidden, scale=hidden**-0.5).t()
    bias = target.randn(columns) if shape.bias else None
    angle = target.randn(rows, dim // 2).float()
    cos, sin = angle.cos(), angle.sin()
    q_scale = (target.randn(rows).float().abs() + 1) if shape.q_scale else None
    k_cache, v_cache = (target.randn(NUM_BLOCKS, kv_heads, BLOCK_SIZE, dim) for _ in "kv")
    k_wanted, v_wanted = k_cache.double(), v_cache.double()
    slots = torch.tensor(SLOTS[:rows], device=target.device)

    q, r = function(x, residual, gain, 1e-5, weight, bias, cos, sin, q_scale, k_cache, v_cache, slots)

    def rounded(value):
        return value.to(target.dtype).double()

    wide = rounded(x.double() + (0 if residual is None else residual.double()))
    assert torch.equal(r.double(), wide)
    y = rounded(wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-5) * gain.double())
    qkv = rounded(y @ weight.double() + (0 if bias is None else bias.double())).view(rows, -1, dim)
    a, b = qkv.chunk(2, dim=2)
    cosine, sine = cos.double()[:, None], sin.double()[:, None]
    turned = torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=2)
    q_wanted = turned[:, :heads] * (1 if q_scale is None else q_scale.double()[:, None, None])
    for row, slot in enumerate(SLOTS[:rows]):
        if slot >= 0:
            k_wanted[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = turned[row, heads : heads + kv_heads]
            v_wanted[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = qkv[row, heads + kv_heads :]
    for found, wanted in ((q, q_wanted), (k_cache, k_wanted), (v_cache, v_wanted)):
        assert_close(found, wanted, max_error=8 * target.eps + 8e-6, rms_error=1.5 * target.eps + 2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_one_launch_does_what_its_parts_do(target, shape, assert_close, guarded_outputs):
    check(norm_qkv_rotary_store, shape, target, assert_close)
