"""The paged_decode_attention kernel against float64. Cache slots that a query must not see hold NaN, also inside its own blocks.

Tolerance: scores and sums are fp32. fp16 and bf16: the weights are rounded before the second product (eps / 2 each, averaged
over the keys: about 0.3 eps of the output's RMS, five deviations 1.5 eps) and the result once (eps / 2); in RMS 0.6 eps.
fp32: exp2 of scores near 10 that carry a few roundings: 2e-5 at most, 2e-6 RMS.
"""

from typing import NamedTuple

import pytest
import torch

from turbotriton.backend.ops.kernels import paged_decode_attention as module
from turbotriton.backend.ops.kernels.paged_decode_attention import paged_decode_attention
from turbotriton.contract.errors import ConfigError


class Case(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_lens: tuple[int, ...]
    sliding_window: int = 0


CASES = [
    Case(1, 1, 16, 16, (1,)),
    Case(6, 3, 40, 5, (1, 5, 33, 17)),  # odd everything
    Case(16, 1, 64, 64, (64, 65, 300)),  # group of 16
    Case(24, 1, 32, 16, (70,)),  # a group past the 16 rows
    Case(7, 7, 128, 8, (129, 2)),  # group of 1
    Case(4, 2, 256, 64, (257,)),
    Case(4, 2, 80, 16, (0, 3, 0)),  # rows of no keys
    Case(4, 2, 32, 16, (1100, 40, 300, 0)),  # rows of five splits, one and two, and none
    Case(4, 2, 32, 16, (1100, 40, 700), 1),  # the query sees itself alone
    Case(4, 2, 32, 16, (1100, 40, 1000), 600),  # windows that start inside a tile, over several splits
    Case(4, 2, 64, 16, (500, 64, 65, 1), 64),
]


def tolerance(dtype):
    eps = torch.finfo(dtype).eps
    return {"max_error": 2e-5, "rms_error": 2e-6} if dtype == torch.float32 else {"max_error": 2 * eps, "rms_error": 0.6 * eps}


def oracle(q, k_cache, v_cache, block_tables, context_lens, scale, sliding_window):
    """One row and one head after the other, float64."""
    block_size, group_size = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for row, length in enumerate(context_lens.tolist()):
        positions = torch.arange(max(0, length - sliding_window) if sliding_window else 0, length, device=q.device)
        blocks, offsets = block_tables[row].long()[positions // block_size], positions % block_size
        for head in range(q.shape[1] if length else 0):
            keys = k_cache[blocks, head // group_size, offsets].double()
            values = v_cache[blocks, head // group_size, offsets].double()
            out[row, head] = torch.softmax(keys @ q[row, head].double() * scale, dim=0) @ values
    return out


def inputs(target, case):
    """Blocks are dealt in random order; NaN: slots outside [L - window, L) and the block that table entries past L name."""
    batch = len(case.context_lens)
    num_used = [-(-length // case.block_size) for length in case.context_lens]
    max_blocks, nobody = max(num_used) + 2, sum(num_used)
    order = torch.randperm(nobody, generator=target.generator).tolist()
    shape = (nobody + 1, case.num_kv_heads, case.block_size, case.head_dim)
    k_cache, v_cache = target.randn(*shape), target.randn(*shape)
    block_tables = torch.full((batch, max_blocks), nobody, dtype=torch.int32)
    for cache in (k_cache, v_cache):
        cache[nobody] = float("nan")
    for row, length in enumerate(case.context_lens):
        first = max(0, length - case.sliding_window) if case.sliding_window else 0
        for index in range(num_used[row]):
            block = order.pop() if block_tables[row, index] == nobody else int(block_tables[row, index])
            block_tables[row, index] = block
            positions = torch.arange(index * case.block_size, (index + 1) * case.block_size)
            hidden = ((positions < first) | (positions >= length)).to(target.device)
            for cache in (k_cache, v_cache):
                cache[block, :, hidden] = float("nan")
    context_lens = torch.tensor(case.context_lens, dtype=torch.int32)
    return (
        target.randn(batch, case.num_heads, case.head_dim),
        k_cache,
        v_cache,
        block_tables.to(target.device),
        context_lens.to(target.device),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).replace(" ", "") for part in case))
def test_attention_equals_softmax_over_the_keys_it_may_see(target, case, assert_close, guarded_outputs):
    tensors = inputs(target, case)
    scale = case.head_dim**-0.5
    out = paged_decode_attention(*tensors, scale, case.sliding_window)
    assert_close(out, oracle(*tensors, scale, case.sliding_window), **tolerance(target.dtype))


@pytest.mark.parametrize("num_sms", [1, 2, 64], ids="{}_sms".format)
def test_any_number_of_splits_gives_the_same_result(target, num_sms, assert_close, guarded_outputs, monkeypatch):
    case = Case(4, 2, 32, 16, (1100, 40, 300, 0))
    monkeypatch.setattr(module, "num_sms", lambda device: num_sms)
    tensors = inputs(target, case)
    out = paged_decode_attention(*tensors, 0.2)
    assert_close(out, oracle(*tensors, 0.2, 0), **tolerance(target.dtype))


def test_more_splits_than_the_reduction_adds_at_once(target, assert_close, guarded_outputs, monkeypatch):
    case = Case(2, 1, 16, 64, ((module.REDUCE_TILE + 2) * 256 - 3,))
    monkeypatch.setattr(module, "num_sms", lambda device: 64)
    tensors = inputs(target, case)
    _, k_cache, _, block_tables, _ = tensors
    k_cache[block_tables[0, -4:-2].long()] *= 2  # the maximum lies in the last split, so what came before is rescaled
    out = paged_decode_attention(*tensors, 0.25)
    assert_close(out, oracle(*tensors, 0.25, 0), **tolerance(target.dtype))


def test_scores_of_thousands_do_not_overflow(target, assert_close, guarded_outputs):
    case = Case(2, 1, 64, 16, (600,))
    q, *rest = inputs(target, case)
    tensors = (q * 100, *rest)
    out = paged_decode_attention(*tensors, 1.0)
    # one key takes all the weight; scores near 3000 carry fp32 errors of 3e-4, and so do weights that compete
    expected = oracle(*tensors, 1.0, 0)
    assert_close(out, expected, max_error=2 * target.eps + 5e-3, rms_error=0.6 * target.eps + 5e-4)


def test_all_inputs_may_be_strided(target, assert_close, guarded_outputs):
    """q a slice of a qkv row, a joint cache with tokens before heads, a table of wider rows."""
    case = Case(6, 2, 24, 8, (19, 8, 41))
    q, k_cache, v_cache, block_tables, context_lens = inputs(target, case)
    q = torch.cat([target.randn(3, 1, 24), q, target.randn(3, 2, 24)], dim=1)[:, 1:-2]
    joint = torch.stack([k_cache.transpose(1, 2), v_cache.transpose(1, 2)], dim=2).contiguous()
    k_cache, v_cache = (joint[:, :, i].transpose(1, 2) for i in range(2))
    block_tables = torch.cat([block_tables, torch.full_like(block_tables, 10**6)], dim=1)[:, : block_tables.shape[1]]
    tensors = q, k_cache, v_cache, block_tables, context_lens
    assert_close(paged_decode_attention(*tensors, 0.3), oracle(*tensors, 0.3, 0), **tolerance(target.dtype))


def test_a_given_output_is_filled_and_returned(target):
    tensors = inputs(target, Case(6, 2, 24, 8, (19, 8, 41)))
    whole = torch.full((7, 6, 24), float("nan"), dtype=target.dtype, device=target.device)
    assert paged_decode_attention(*tensors, 0.3, 0, out := whole[2:5]) is out
    assert torch.equal(out, paged_decode_attention(*tensors, 0.3))
    assert whole[:2].isnan().all()
    assert whole[5:].isnan().all()


def test_no_rows_give_no_output(target):
    k_cache = target.randn(1, 2, 16, 32)
    empty = torch.zeros((0, 4), dtype=torch.int32, device=target.device)
    out = paged_decode_attention(target.randn(0, 4, 32), k_cache, k_cache.clone(), empty, empty[:, 0].contiguous(), 1.0)
    assert out.shape == (0, 4, 32)


def test_head_dim_that_fits_no_tile_is_refused():
    cache = torch.zeros(1, 1, 16, 257)
    table = torch.zeros((1, 1), dtype=torch.int32)
    with pytest.raises(ConfigError, match="head_dim 257"):
        paged_decode_attention(torch.zeros(1, 1, 257), cache, cache, table, table[0], 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "num_heads", "num_kv_heads", "max_len", "sliding_window"),
    [(64, 32, 8, 4096, 0), (1, 32, 8, 131_072, 0), (8, 32, 32, 3000, 0), (200, 40, 8, 700, 0), (16, 32, 8, 9000, 4096)],
)
def test_large_batches_and_long_contexts(batch, num_heads, num_kv_heads, max_len, sliding_window, dtype, assert_close):
    generator = torch.Generator("cuda").manual_seed(1)
    block_size, head_dim = 64, 128
    max_blocks = -(-max_len // block_size)
    shape = (batch * max_blocks, num_kv_heads, block_size, head_dim)
    k_cache, v_cache = (torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator) for _ in "kv")
    block_tables = torch.randperm(batch * max_blocks, device="cuda", generator=generator).view(batch, max_blocks).int()
    context_lens = torch.randint(1, max_len + 1, (batch,), device="cuda", generator=generator).int()
    context_lens[-1] = max_len
    q = torch.empty(batch, num_heads, head_dim, dtype=dtype, device="cuda").normal_(generator=generator)
    tensors = q, k_cache, v_cache, block_tables, context_lens
    out = paged_decode_attention(*tensors, head_dim**-0.5, sliding_window)
    for rows in (slice(0, 2), slice(-2, None)):
        part = q[rows], k_cache, v_cache, block_tables[rows], context_lens[rows]
        assert_close(out[rows], oracle(*part, head_dim**-0.5, sliding_window), **tolerance(dtype))


@pytest.mark.gpu
def test_cache_offsets_past_two_to_the_31_are_read(assert_close):
    """A pool of 2.6e9 elements whose last blocks hold the sequence."""
    k_cache = torch.zeros(40_000, 8, 64, 128, dtype=torch.bfloat16, device="cuda")
    k_cache[-5:].normal_()
    v_cache = k_cache.flip(3)
    block_tables = torch.arange(39_995, 40_000, device="cuda").int()[None]
    q = torch.randn(1, 32, 128, device="cuda").bfloat16()
    tensors = q, k_cache, v_cache, block_tables, torch.tensor([300], device="cuda").int()
    assert_close(paged_decode_attention(*tensors, 0.1), oracle(*tensors, 0.1, 0), **tolerance(q.dtype))


@pytest.mark.gpu
def test_a_captured_graph_follows_new_lengths_and_tables(assert_close):
    case = Case(8, 2, 64, 16, (500, 30, 700))
    k_cache, v_cache = (torch.randn(200, 2, 16, 64, device="cuda").half() for _ in "kv")
    block_tables = torch.randperm(150, device="cuda").view(3, 50).int()
    context_lens = torch.tensor(case.context_lens, device="cuda").int()
    q = torch.randn(3, 8, 64, device="cuda").half()
    tensors = q, k_cache, v_cache, block_tables, context_lens
    paged_decode_attention(*tensors, 0.1)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode_attention(*tensors, 0.1)
    block_tables.copy_(torch.randperm(200, device="cuda")[:150].view(3, 50))
    context_lens.copy_(torch.tensor([1, 800, 0]))
    q.normal_()
    graph.replay()
    assert_close(out, oracle(*tensors, 0.1, 0), **tolerance(q.dtype))
