"""The paged_prefill_attention kernel against float64. Cache slots that no query may see hold NaN, also inside a row's own blocks.

Tolerance: as for decode attention, whose arithmetic is the same: the weights are rounded before the second product and the
result once (fp16 and bf16: 2 eps at most, 0.6 eps RMS; the first queries of a row average over few keys, which the maximum over
max(|expected|, RMS) bears); fp32: 2e-5 at most, 2e-6 RMS.
"""

from itertools import accumulate
from typing import NamedTuple

import pytest
import torch

from turbotriton.backend.ops.kernels import paged_prefill_attention as module
from turbotriton.backend.ops.kernels.paged_prefill_attention import paged_prefill_attention
from turbotriton.contract.errors import ConfigError


class Case(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    rows: tuple[tuple[int, int], ...]  # (queries, context)
    sliding_window: int = 0


CASES = [
    Case(1, 1, 16, 16, ((1, 1),)),
    Case(6, 2, 40, 5, ((5, 5), (1, 33), (9, 17))),  # odd everything; chunks with and without a past
    Case(16, 1, 64, 64, ((20, 150),)),  # group of 16; tiles inside a block
    Case(24, 1, 32, 16, ((7, 40),)),  # a group that divides no tile
    Case(2, 2, 80, 8, ((130, 130), (3, 70))),  # group of 1; more than one tile a row
    Case(4, 2, 256, 64, ((40, 100),)),  # the smaller tiles
    Case(14, 2, 32, 128, ((37, 90), (2, 129))),  # 18 queries of 7 heads, two rows of padding; two tiles a block
    Case(4, 4, 16, 16, ((1, 5), (0, 20), (2, 2), (0, 0), (3, 3))),  # short rows, and rows without queries among them
    Case(4, 2, 32, 16, ((40, 200),), 1),  # a query sees itself alone
    Case(4, 2, 32, 64, ((150, 300), (70, 70)), 70),  # windows that start inside a tile, and pass a whole tile of keys by
]


def tolerance(dtype):
    eps = torch.finfo(dtype).eps
    return {"max_error": 2e-5, "rms_error": 2e-6} if dtype == torch.float32 else {"max_error": 2 * eps, "rms_error": 0.6 * eps}


def oracle(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, sliding_window):
    """One row and one head after the other, float64."""
    block_size, group_size = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(context_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        keys_at = torch.arange(length, device=q.device)
        queries_at = keys_at[length - (end - begin) :, None]
        hidden = keys_at > queries_at
        if sliding_window:
            hidden = hidden | (keys_at <= queries_at - sliding_window)
        blocks, offsets = block_tables[row].long()[keys_at // block_size], keys_at % block_size
        for head in range(q.shape[1] if begin < end else 0):
            # what no query of the row sees is NaN, and zero times NaN is NaN
            keys = k_cache[blocks, head // group_size, offsets].double()
            values = v_cache[blocks, head // group_size, offsets].double().nan_to_num(0.0)
            scores = (q[begin:end, head].double() @ keys.T * scale).masked_fill(hidden, float("-inf"))
            out[begin:end, head] = torch.softmax(scores, dim=1) @ values
    return out


def inputs(target, case):
    """Blocks are dealt in random order; NaN: slots that no query of the row sees, and the block of table entries past its end."""
    num_used = [-(-length // case.block_size) for _, length in case.rows]
    nobody = sum(num_used)
    order = torch.randperm(nobody, generator=target.generator).tolist()
    shape = (nobody + 1, case.num_kv_heads, case.block_size, case.head_dim)
    k_cache, v_cache = target.randn(*shape), target.randn(*shape)
    block_tables = torch.full((len(case.rows), max(num_used) + 2), nobody, dtype=torch.int32)
    for cache in (k_cache, v_cache):
        cache[nobody] = float("nan")
    for row, (num_queries, length) in enumerate(case.rows):
        first = max(0, length - num_queries + 1 - case.sliding_window) if case.sliding_window else 0
        for index in range(num_used[row]):
            block = order.pop()
            block_tables[row, index] = block
            positions = torch.arange(index * case.block_size, (index + 1) * case.block_size)
            hidden = ((positions < first) | (positions >= length)).to(target.device)
            for cache in (k_cache, v_cache):
                cache[block, :, hidden] = float("nan")
    num_queries = [queries for queries, _ in case.rows]
    lens, starts = [length for _, length in case.rows], [0, *accumulate(num_queries)]
    return (
        target.randn(sum(num_queries), case.num_heads, case.head_dim),
        k_cache,
        v_cache,
        block_tables.to(target.device),
        torch.tensor(lens, dtype=torch.int32, device=target.device),
        torch.tensor(starts, dtype=torch.int32, device=target.device),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).replace(" ", "") for part in case))
def test_each_query_attends_to_the_keys_it_may_see(target, case, assert_close, guarded_outputs):
    tensors = inputs(target, case)
    scale = case.head_dim**-0.5
    out = paged_prefill_attention(*tensors, scale, case.sliding_window)
    assert_close(out, oracle(*tensors, scale, case.sliding_window), **tolerance(target.dtype))


def test_the_tiles_of_older_chips_give_the_same(target, assert_close, guarded_outputs, monkeypatch):
    monkeypatch.setattr(module, "_compute_capability", lambda device: 80)
    tensors = inputs(target, Case(6, 2, 32, 16, ((45, 100), (2, 7)), 50))
    assert_close(paged_prefill_attention(*tensors, 0.2, 50), oracle(*tensors, 0.2, 50), **tolerance(target.dtype))


def test_many_rows_are_each_found(target, assert_close, guarded_outputs):
    """Bisection over 23 rows of 0 to 5 queries, several of which share what would be one tile."""
    case = Case(4, 2, 16, 16, tuple((index * 7 % 6, index * 7 % 6 + index % 4) for index in range(23)))
    tensors = inputs(target, case)
    assert_close(paged_prefill_attention(*tensors, 0.3), oracle(*tensors, 0.3, 0), **tolerance(target.dtype))


def test_scores_of_thousands_do_not_overflow(target, assert_close, guarded_outputs):
    q, *rest = inputs(target, Case(2, 1, 64, 16, ((20, 90),)))
    tensors = (q * 100, *rest)
    # one key takes all the weight; scores near 3000 carry fp32 errors of 3e-4, and so do weights that compete
    out, expected = paged_prefill_attention(*tensors, 1.0), oracle(*tensors, 1.0, 0)
    assert_close(out, expected, max_error=2 * target.eps + 5e-3, rms_error=0.6 * target.eps + 5e-4)


def test_all_inputs_may_be_strided(target, assert_close, guarded_outputs):
    """q a slice of a qkv row, a joint cache with tokens before heads, tables and lengths that begin after decode rows."""
    case = Case(6, 2, 24, 8, ((4, 19), (8, 8), (1, 41)))
    q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q = inputs(target, case)
    q = torch.cat([q, q * 0], dim=1)[:, :6]
    joint = torch.stack([k_cache.transpose(1, 2), v_cache.transpose(1, 2)], dim=2).contiguous()
    k_cache, v_cache = (joint[:, :, i].transpose(1, 2) for i in range(2))
    block_tables = torch.cat([block_tables, torch.full_like(block_tables, 10**6)], dim=1)
    block_tables = torch.cat([block_tables[:1], block_tables])[1:]
    context_lens = torch.cat([context_lens[:1], context_lens])[1:]
    tensors = q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q
    assert_close(paged_prefill_attention(*tensors, 0.3), oracle(*tensors, 0.3, 0), **tolerance(target.dtype))


def test_a_given_output_is_filled_and_returned(target):
    tensors = inputs(target, Case(6, 2, 24, 8, ((4, 19), (8, 8), (1, 41))))
    whole = torch.full((17, 6, 24), float("nan"), dtype=target.dtype, device=target.device)
    assert paged_prefill_attention(*tensors, 0.3, 0, out := whole[2:15]) is out
    assert torch.equal(out, paged_prefill_attention(*tensors, 0.3))
    assert whole[:2].isnan().all()
    assert whole[15:].isnan().all()


def test_chunks_give_the_same_bits_as_the_whole_prompt_at_tile_borders(target, guarded_outputs):
    """A prompt in chunks that end where tiles end runs the same programs, so nothing may differ."""
    case = Case(4, 2, 32, 16, ((96, 96),))
    q, k_cache, v_cache, block_tables, context_lens, _ = inputs(target, case)

    def run(begin, end):
        bounds = torch.tensor([0, end - begin], dtype=torch.int32, device=target.device)
        lens = context_lens * 0 + end
        return paged_prefill_attention(q[begin:end], k_cache, v_cache, block_tables, lens, bounds, 0.2)

    step = module.prefill_attention_config(2, 32, q.element_size(), module._compute_capability(q.device)).block_m // 2
    whole = run(0, 96)
    chunks = torch.cat([run(begin, min(begin + step, 96)) for begin in range(0, 96, step)])
    assert torch.equal(whole, chunks)


def test_no_tokens_give_no_output(target):
    cache = target.randn(1, 2, 16, 32)
    lens = torch.zeros(1, dtype=torch.int32, device=target.device)
    out = paged_prefill_attention(target.randn(0, 4, 32), cache, cache, lens[:0, None], lens[:0], lens, 1.0)
    assert out.shape == (0, 4, 32)


def test_head_dim_that_fits_no_tile_is_refused():
    cache, table = torch.zeros(1, 1, 16, 257), torch.zeros((1, 1), dtype=torch.int32)
    with pytest.raises(ConfigError, match="head_dim 257"):
        paged_prefill_attention(torch.zeros(1, 1, 257), cache, cache, table, table[0], torch.tensor([0, 1]).int(), 1.0)


def large_inputs(rows, num_heads, num_kv_heads, dtype, num_spare_blocks=0, block_size=64, head_dim=128):
    generator = torch.Generator("cuda").manual_seed(1)
    max_blocks = max(-(-length // block_size) for _, length in rows)
    num_blocks = len(rows) * max_blocks + num_spare_blocks
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    k_cache, v_cache = (torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator) for _ in "kv")
    block_tables = num_blocks - 1 - torch.randperm(len(rows) * max_blocks, device="cuda", generator=generator)
    num_queries = [queries for queries, _ in rows]
    q = torch.empty(sum(num_queries), num_heads, head_dim, dtype=dtype, device="cuda").normal_(generator=generator)
    bounds = torch.tensor([0, *accumulate(num_queries)], device="cuda").int()
    lens = torch.tensor([length for _, length in rows], device="cuda").int()
    return q, k_cache, v_cache, block_tables.view(len(rows), max_blocks).int(), lens, bounds


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "num_heads", "num_kv_heads", "sliding_window"),
    [
        (((4096, 4096),), 32, 8, 0),
        (((512, 33_000),), 16, 8, 0),
        (tuple((64 + 37 * index, 64 + 37 * index) for index in range(20)), 32, 8, 0),
        (((2000, 3000), (1, 4097)), 40, 40, 0),
        (((3000, 7000), (777, 1000)), 28, 4, 1000),
    ],
    ids=["prompt", "chunk-of-a-long-context", "many-prompts", "group-of-1", "window"],
)
def test_long_prompts_and_contexts(rows, num_heads, num_kv_heads, sliding_window, dtype, assert_close):
    q, k_cache, v_cache, *tables = large_inputs(rows, num_heads, num_kv_heads, dtype)
    out = paged_prefill_attention(q, k_cache, v_cache, *tables, 128**-0.5, sliding_window)
    # the first kv head's query heads: a float64 score matrix of all of them would not fit
    group = num_heads // num_kv_heads
    for heads, kv in ((slice(group), slice(1)), (slice(-group, None), slice(-1, None))):
        expected = oracle(q[:, heads], k_cache[:, kv], v_cache[:, kv], *tables, 128**-0.5, sliding_window)
        # an average over thousands of keys is far smaller than one over three: each query is measured by its own size
        size = expected.square().mean(dim=(1, 2), keepdim=True).sqrt()
        assert_close(out[:, heads].double() / size, expected / size, **tolerance(dtype))


@pytest.mark.gpu
def test_cache_offsets_past_two_to_the_31_are_read(assert_close):
    """A pool of 2.6e9 elements whose last blocks hold the row."""
    tensors = large_inputs(((100, 300),), 16, 8, torch.bfloat16, num_spare_blocks=40_000)
    assert_close(paged_prefill_attention(*tensors, 0.1), oracle(*tensors, 0.1, 0), **tolerance(torch.bfloat16))


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    tensors = large_inputs(((100, 300), (7, 7)), 16, 8, torch.bfloat16)
    paged_prefill_attention(*tensors, 0.1)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        paged_prefill_attention(*tensors, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_slices_after_any_number_of_decode_rows_use_one_compiled_kernel(monkeypatch):
    """Their addresses are not all multiples of 16, which must not compile anew on the request path."""
    import triton

    q, k_cache, v_cache, block_tables, lens, bounds = large_inputs(((20, 30),) * 5, 16, 8, torch.bfloat16)
    paged_prefill_attention(q, k_cache, v_cache, block_tables, lens, bounds, 0.1)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **facts: compiled.append(facts) and None)
    for skip in (1, 2, 3, 4):
        rest = block_tables[skip:], lens[skip:], bounds[skip:] - bounds[skip]
        paged_prefill_attention(q[20 * skip :], k_cache, v_cache, *rest, 0.1)
    assert not compiled
