"""Attention of decodes that turns q and k itself, beside rotary and attention one after the other in float64. The place of the new token
holds NaN before the launch, as all that a query must not see.

Tolerance: of attention alone (test_kernels_paged_decode_attention.py). Queries and keys are rounded to the dtype before they are
multiplied, as rotary_store_kv rounds them; an element that a last bit of fp32 rounds the other way moves a score by half an eps of one
product of head_dim, which the noise of the weights' rounding covers; in fp32 three roundings more: 3e-5 at most, 3e-6 RMS.
"""

import pytest
import torch
from tests.backend.ops.test_kernels_paged_decode_attention import Case, inputs, oracle, tolerance
from tests.backend.ops.test_kernels_rotary_store_kv import rotate

from turbotriton.backend.ops.kernels import paged_decode_attention as module
from turbotriton.backend.ops.kernels.paged_decode_attention import paged_decode_attention, rotary_decode_attention, takes_rotary
from turbotriton.backend.ops.kernels.rotary_store_kv import rotary_store_kv
from turbotriton.backend.ops.operands import SplitSums, Unadded, whole

CASES = [
    (Case(1, 1, 16, 16, (1,)), 16, 1),
    (Case(6, 3, 40, 5, (1, 5, 33, 17)), 24, 2),  # odd everything, a part of the head turned
    (Case(14, 1, 64, 64, (64, 65, 300)), 64, 4),  # as many as leave room for k and v; the new token alone in its block
    (Case(24, 1, 32, 16, (70,)), 32, 1),  # a group past the 16 rows
    (Case(7, 7, 128, 8, (129, 2)), 128, 3),  # group of 1
    (Case(4, 2, 256, 64, (257,)), 256, 1),
    (Case(4, 2, 80, 16, (0, 3, 0)), 80, 2),  # padding
    (Case(4, 2, 32, 16, (1100, 40, 300, 0)), 32, 2),  # rows of several splits, one, two and none
    (Case(4, 2, 32, 16, (1025, 257, 513)), 32, 1),  # the last split has the new token only
    (Case(4, 2, 32, 16, (1100, 40, 700), 1), 32, 1),  # the query sees itself alone
    (Case(4, 2, 32, 16, (1100, 40, 1000), 600), 32, 2),  # windows that start inside a tile, over several splits
]


class Step:
    """One step's operands; caches as the step finds them."""

    def __init__(self, target, case: Case, rotary_dim: int, num_parts: int, *, has_q_scale: bool = False) -> None:
        batch, self.case = len(case.context_lens), case
        _, k_cache, v_cache, self.tables, self.lens = inputs(target, case)
        self.caches = [k_cache, v_cache]
        places = (self.lens.long() - 1).clamp(min=0)
        slots = self.tables.gather(1, places[:, None] // case.block_size)[:, 0] * case.block_size + places % case.block_size
        self.slots = torch.where(self.lens > 0, slots, -1)
        for slot in self.slots.tolist():
            for cache in self.caches if slot >= 0 else ():
                cache[slot // case.block_size, :, slot % case.block_size] = float("nan")
        columns = (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
        parts = target.randn_fp32(num_parts, batch, columns)
        self.qkv: Unadded = SplitSums(parts, target.dtype) if num_parts > 1 else parts[0].to(target.dtype)
        angle = target.randn_fp32(batch, rotary_dim // 2)
        self.angles = angle.cos(), angle.sin()
        self.q_scale = target.randn_fp32(batch).abs() + 0.5 if has_q_scale else None

    def expected(self, scale: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(attention in float64 over queries and keys that rotary in float64 gave, rounded once; the caches afterwards)."""
        case, dtype = self.case, self.caches[0].dtype
        heads = whole(self.qkv).view(len(case.context_lens), -1, case.head_dim)
        turned = rotate(heads[:, : case.num_heads + case.num_kv_heads], *self.angles)
        q = turned[:, : case.num_heads]
        q = (q if self.q_scale is None else q * self.q_scale.double()[:, None, None]).to(dtype)
        caches = [cache.clone() for cache in self.caches]
        for row, slot in enumerate(self.slots.tolist()):
            if slot >= 0:
                at = slot // case.block_size, slice(None), slot % case.block_size
                caches[0][at] = turned[row, case.num_heads :].to(dtype)
                caches[1][at] = heads[row, -case.num_kv_heads :]
        return oracle(q, *caches, self.tables, self.lens, scale, case.sliding_window), caches

    def run(self, scale: float) -> torch.Tensor:
        return rotary_decode_attention(
            self.qkv,
            *self.angles,
            self.q_scale,
            *self.caches,
            self.slots,
            self.tables,
            self.lens,
            scale,
            self.case.sliding_window,
        )


def attention_bounds(dtype: torch.dtype) -> dict[str, float]:
    return {"max_error": 3e-5, "rms_error": 3e-6} if dtype == torch.float32 else tolerance(dtype)


def check(step: Step, scale: float, assert_close, **bounds: float) -> None:
    wanted, caches = step.expected(scale)
    found, dtype = step.run(scale), step.caches[0].dtype
    assert_close(found, wanted, **(attention_bounds(dtype) | bounds))
    assert torch.equal(step.caches[1].nan_to_num(), caches[1].nan_to_num())
    for mine, expected in zip(step.caches, caches, strict=True):
        assert torch.equal(mine.isnan(), expected.isnan()), "a place was written that no token has, or one was left"
    eps = torch.finfo(dtype).eps
    assert_close(step.caches[0].nan_to_num(), caches[0].nan_to_num().double(), max_error=eps + 1e-6, rms_error=0.1 * eps + 1e-6)


@pytest.mark.parametrize(
    ("case", "rotary_dim", "num_parts"),
    CASES,
    ids=lambda part: "-".join(map(str, part)) if isinstance(part, tuple) else str(part),
)
@pytest.mark.parametrize("has_q_scale", [False, True], ids=["", "q_scale"])
def test_rotary_and_attention_in_one_launch(target, case, rotary_dim, num_parts, has_q_scale, assert_close, guarded_outputs):
    check(Step(target, case, rotary_dim, num_parts, has_q_scale=has_q_scale), case.head_dim**-0.5, assert_close)


@pytest.mark.parametrize("num_sms", [1, 2, 64], ids="{}_sms".format)
def test_any_number_of_splits_gives_the_same_result(target, num_sms, assert_close, guarded_outputs, monkeypatch):
    monkeypatch.setattr(module, "num_sms", lambda device: num_sms)
    check(Step(target, Case(4, 2, 32, 16, (1100, 40, 300, 0)), 32, 2), 0.2, assert_close)


def test_all_inputs_may_be_strided(target, assert_close, guarded_outputs):
    """qkv a slice of a wider row, every second row of cos and sin, a joint cache with tokens before heads, a table of wider rows."""
    step = Step(target, Case(6, 2, 24, 8, (19, 8, 41)), 16, 1, has_q_scale=True)
    assert isinstance(step.qkv, torch.Tensor)
    step.qkv = torch.cat([target.randn(3, 3), step.qkv, target.randn(3, 9)], dim=1)[:, 3:-9]
    step.angles = tuple(angle.repeat_interleave(2, 0)[::2] for angle in step.angles)
    step.q_scale = step.q_scale.repeat_interleave(2, 0)[::2]
    step.slots = torch.stack([step.slots, step.slots], dim=1)[:, 0]
    joint = torch.stack([cache.transpose(1, 2) for cache in step.caches], dim=2).contiguous()
    step.caches = [joint[:, :, i].transpose(1, 2) for i in range(2)]
    step.tables = torch.cat([step.tables, torch.full_like(step.tables, 10**6)], dim=1)[:, : step.tables.shape[1]]
    check(step, 0.3, assert_close)


def test_it_leaves_what_two_launches_leave(target, assert_close):
    """So that prompts and decodes of a sequence see the same keys: but for a last bit, where one adds the products the other way round."""
    step = Step(target, Case(8, 2, 64, 16, (37, 1, 0, 160)), 64, 2)
    caches = [cache.clone() for cache in step.caches]
    q = rotary_store_kv(step.qkv, *step.angles, None, *caches, step.slots, 8, 2)
    wanted = paged_decode_attention(q, *caches, step.tables, step.lens, 0.125)
    found = step.run(0.125)
    assert torch.equal(step.caches[1].nan_to_num(), caches[1].nan_to_num())
    keys = step.caches[0].nan_to_num(), caches[0].nan_to_num().double()
    assert_close(*keys, max_error=target.eps + 1e-6, rms_error=0.1 * target.eps + 1e-6)
    assert_close(found, wanted.double(), max_error=3 * target.eps + 3e-5, rms_error=target.eps + 3e-6)


def test_v_with_infinities_is_stored_exactly(target):
    step = Step(target, Case(4, 2, 32, 16, (37, 1)), 24, 1)
    assert isinstance(step.qkv, torch.Tensor)
    step.qkv[:, -64::3] = float("inf")
    step.run(0.2)
    for row, slot in enumerate(step.slots.tolist()):
        assert torch.equal(step.caches[1][slot // 16, :, slot % 16], step.qkv[row, -64:].view(2, 32))


def test_a_group_that_leaves_no_room_is_refused(target):
    assert not takes_rotary(16)
    with pytest.raises(AssertionError, match="no room for k and v"):
        Step(target, Case(16, 1, 32, 16, (3,)), 32, 1).run(0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("target", [("cuda", torch.float16), ("cuda", torch.bfloat16)], ids=["fp16", "bf16"], indirect=True)
@pytest.mark.parametrize(("batch", "num_parts"), [(2, 4), (16, 2), (20, 2), (32, 2), (40, 2), (64, 1), (130, 1), (256, 1)])
def test_the_sizes_of_a_batch_on_a_device(batch, num_parts, assert_close, target):
    """Every choice of tiles, of 8 kv heads and up to 1,500 keys. Of a million numbers one is seven deviations off."""
    lens = torch.randint(1, 1500, (batch,), generator=torch.Generator().manual_seed(3))
    check(
        Step(target, Case(32, 8, 128, 64, tuple(lens.tolist())), 128, num_parts),
        128**-0.5,
        assert_close,
        max_error=3 * target.eps,
    )
