"""The warp-specialised prefill kernel against float64, as `paged_prefill_attention` launches it on sm_90.

On the CPU in an emulation of its barriers and rings (gluon_emulation.py), compiled ahead for sm_90, and on a GPU. Cache slots that no query
may see hold NaN. Tolerances as in test_kernels_paged_prefill_attention.py.
"""

import pytest
import torch
from tests.backend.ops.conftest import Target
from tests.backend.ops.gluon_emulation import emulate, plant
from tests.backend.ops.hopper_code import compiled_for_hopper, loops_of, ptxas_report
from tests.backend.ops.test_kernels_compile_ahead import SHARED_LIMIT_BYTES, Recorder
from tests.backend.ops.test_kernels_paged_prefill_attention import Case, inputs, large_inputs, oracle, tolerance

from turbotriton.backend.ops.kernels import hopper_prefill_attention as module
from turbotriton.backend.ops.kernels import paged_prefill_attention as launcher
from turbotriton.backend.ops.kernels.paged_prefill_attention import paged_prefill_attention

BF16, FP16 = torch.bfloat16, torch.float16
KERNEL = "_hopper_prefill_kernel"

CASES = [
    Case(1, 1, 128, 64, ((1, 1),)),  # one key
    Case(4, 4, 64, 64, ((64, 64),)),  # a group of 1: the upper half sees nothing of the last tile
    Case(4, 2, 128, 64, ((130, 130), (3, 70), (64, 128))),  # ends inside a block, and at its end
    Case(8, 2, 64, 64, ((200, 333), (1, 65), (31, 31))),  # a chunk after a past
    Case(8, 1, 128, 64, ((70, 400),)),
    Case(4, 1, 64, 64, ((1, 5), (0, 20), (2, 2), (0, 0), (3, 3), (0, 64), (33, 130))),  # rows without queries among others
    Case(64, 1, 64, 64, ((5, 100),)),  # two queries a tile
    Case(14, 2, 64, 64, ((37, 90), (2, 129))),  # 18 queries of 7 heads, two rows of padding
]


def run(case, dtype, monkeypatch, *, seed=0, num_stages=3, num_sms=2, scale=None):
    """(result, float64 result), emulated on `num_sms` multiprocessors, with few stages so that rings go round."""
    tensors = inputs(Target("cpu", dtype, torch.Generator().manual_seed(seed)), case)
    scale = scale or case.head_dim**-0.5
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "_compute_capability", lambda device: 90)
        patch.setattr(launcher, "HOPPER_PREFILL_STAGES", num_stages)
        patch.setattr(module, "num_sms", lambda device: num_sms)
        emulate(module, KERNEL, patch, seed)
        return paged_prefill_attention(*tensors, scale), oracle(*tensors, scale, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).replace(" ", "") for part in case))
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_each_query_attends_to_the_keys_it_may_see(case, dtype, monkeypatch, assert_close, guarded_outputs):
    assert_close(*run(case, dtype, monkeypatch), **tolerance(dtype))


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("num_sms", [1, 3, pytest.param(100, marks=pytest.mark.slow)])
def test_rings_go_round_over_the_items_of_a_program(num_stages, num_sms, monkeypatch, assert_close):
    """Items of one tile, of as many as there are stages, of more; many in a program and one."""
    case = Case(4, 2, 64, 64, ((40, 40), (65, 200), (0, 7), (9, 300), (64, 64), (1, 128)))
    for seed in range(3):
        options = {"seed": seed, "num_stages": num_stages, "num_sms": num_sms}
        assert_close(*run(case, FP16, monkeypatch, **options), **tolerance(FP16))


def test_many_rows_are_each_found(monkeypatch, assert_close):
    case = Case(8, 2, 64, 64, tuple((index * 7 % 6, index * 7 % 6 + index % 4) for index in range(23)))
    assert_close(*run(case, FP16, monkeypatch), **tolerance(FP16))


def test_scores_of_thousands_do_not_overflow(monkeypatch, assert_close):
    out, expected = run(Case(2, 1, 64, 64, ((20, 90),)), FP16, monkeypatch, scale=100.0)
    assert_close(out, expected, max_error=2 * torch.finfo(FP16).eps + 5e-3, rms_error=0.6 * torch.finfo(FP16).eps + 5e-4)


FREE_V = "    mbarrier.arrive(v_free.index(last), count=1)\n"
FREE_K = "    mbarrier.arrive(k_free.index(stage), count=1)\n"
MISTAKES = {
    "V read before it is there": [("    mbarrier.wait(v_full.index(last), (number - 1) // NUM_STAGES & 1)\n", "")],
    "K read before it is there": [(", pred=tile + 1 < num_tiles)", ", pred=False)")],
    "V freed while it is read": [(FREE_V, ""), (FREE_K, FREE_K + FREE_V)],
    "V never freed": [(FREE_V, "")],
    "scores used too early": [("warpgroup_mma_wait(1, [scores])", "warpgroup_mma_wait(2, [scores])")],
    "sums used too early": [("warpgroup_mma_wait(0, [acc])", "warpgroup_mma_wait(1, [acc])")],
    "another phase of V": [("(number - 1) // NUM_STAGES & 1", "number // NUM_STAGES & 1")],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulation_finds_what_a_kernel_may_not_do(mistake, monkeypatch):
    plant(module, "_step", MISTAKES[mistake], monkeypatch)

    def is_found(seed):
        try:
            out, _ = run(Case(4, 1, 64, 64, ((40, 700),)), FP16, monkeypatch, seed=seed, num_stages=2, num_sms=1)
        except (AssertionError, AttributeError, RuntimeError, TypeError):
            return True
        return bool(out.isnan().any())

    assert any(is_found(seed) for seed in range(20))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "sliding_window", "capability", "expected"),
    [
        (BF16, 128, 64, 0, 90, KERNEL),
        (FP16, 64, 64, 0, 90, KERNEL),
        (BF16, 128, 64, 0, 100, "_prefill_kernel"),
        (BF16, 128, 64, 0, 80, "_prefill_kernel"),
        (BF16, 128, 64, 4096, 90, "_prefill_kernel"),
        (BF16, 128, 16, 0, 90, "_prefill_kernel"),
        (BF16, 80, 64, 0, 90, "_prefill_kernel"),
        (torch.float32, 128, 64, 0, 90, "_prefill_kernel"),
    ],
)
def test_what_it_does_not_take_is_the_plain_kernels(
    dtype, head_dim, block_size, sliding_window, capability, expected, monkeypatch
):
    launches = []
    for owner, name in ((module, KERNEL), (launcher, "_prefill_kernel")):
        monkeypatch.setattr(owner, name, Recorder(getattr(owner, name), launches))
    monkeypatch.setattr(launcher, "_compute_capability", lambda device: capability)
    cache = torch.empty((4, 2, block_size, head_dim), dtype=dtype)
    tables, lens = torch.empty((3, 8), dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    q, bounds = torch.empty((20, 8, head_dim), dtype=dtype), torch.empty(4, dtype=torch.int32)
    paged_prefill_attention(q, cache, cache, tables, lens, bounds, 0.1, sliding_window)
    assert [kernel.__name__ for kernel, _ in launches] == [expected]


def launched(dtype, num_heads, num_kv_heads, head_dim, monkeypatch):
    """The kernel, and what a call over blocks of 64 gives it on sm_90."""
    launches = []
    monkeypatch.setattr(module, KERNEL, Recorder(getattr(module, KERNEL), launches))
    monkeypatch.setattr(launcher, "_compute_capability", lambda device: 90)
    cache = torch.empty((4, num_kv_heads, 64, head_dim), dtype=dtype)
    tables, lens = torch.empty((16, 128), dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    bounds = torch.empty(17, dtype=torch.int32)
    paged_prefill_attention(torch.empty((256, num_heads, head_dim), dtype=dtype), cache, cache, tables, lens, bounds, 0.1)
    ((kernel, arguments),) = launches
    return kernel, arguments


def product_loops(compiled, num_products, folder):
    """The loops of the machine code with so many matrix instructions, each from its first one on."""
    code, ranges = loops_of(compiled, folder)
    loops = [code[begin:end] for begin, end in ranges]
    places = [[index for index, each in enumerate(loop) if "HGMMA" in each] for loop in loops]
    own = [
        (loop, at)
        for loop, at in zip(loops, places, strict=True)
        if len(at) == num_products and not any("STG" in each for each in loop)  # those store: loops over items
    ]
    return [loop[at[0] :] + loop[: at[0]] for loop, at in own]


@pytest.mark.parametrize(
    ("dtype", "num_heads", "num_kv_heads", "head_dim"),
    [
        *((BF16, 32, 8, 128), (BF16, 64, 8, 64)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((FP16, 16, 8, 128), (BF16, 40, 40, 128), (BF16, 28, 4, 128))),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_the_softmax_runs_under_a_product(dtype, num_heads, num_kv_heads, head_dim, monkeypatch, tmp_path):
    """Of each loop: nothing spilled, exponentials between the two waits, products not serialised by ptxas; room for the rings."""
    compiled = compiled_for_hopper(*launched(dtype, num_heads, num_kv_heads, head_dim, monkeypatch))
    assert compiled.metadata.shared <= SHARED_LIMIT_BYTES[90]
    said = ptxas_report(compiled, tmp_path)
    assert "registers" in said
    assert "serialized" not in said
    loops = product_loops(compiled, head_dim // 16 + 64 // 16, tmp_path)
    assert len(loops) == 4  # unmasked and masked, of each half
    for loop in loops:
        assert not any(each.split()[0].startswith(("LDL", "STL")) for each in loop)
        waits = [index for index, each in enumerate(loop) if "DEPBAR" in each and "gsb0" in each]
        last_product = max(index for index, each in enumerate(loop) if "HGMMA" in each)
        exponentials = [index for index, each in enumerate(loop) if "MUFU.EX2" in each]
        assert len(waits) == 2
        assert len(exponentials) == 34
        assert last_product < waits[0] < min(exponentials) < max(exponentials) < waits[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(
    ("rows", "num_heads", "num_kv_heads", "head_dim"),
    [
        (((4096, 4096),), 32, 8, 128),
        (((512, 33_000),), 16, 8, 128),
        (tuple((64 + 37 * index, 64 + 37 * index) for index in range(20)), 32, 8, 128),
        (((2000, 3000), (1, 4097)), 40, 40, 128),
        (((3000, 7000), (0, 40), (777, 1000), (1, 1)), 64, 8, 64),
        (((1500, 1500), (300, 2000)), 28, 4, 128),
    ],
    ids=["prompt", "chunk-of-a-long-context", "many-prompts", "group-of-1", "heads-of-64", "group-of-7"],
)
def test_long_prompts_and_contexts(rows, num_heads, num_kv_heads, head_dim, dtype, assert_close):
    q, k_cache, v_cache, *tables = large_inputs(rows, num_heads, num_kv_heads, dtype, head_dim=head_dim)
    for row, (_, length) in enumerate(rows):  # what stands past a context's end must not matter
        for cache in (k_cache, v_cache) if length % 64 else ():
            cache[tables[0][row, length // 64], :, length % 64 :] = float("nan")
    out = paged_prefill_attention(q, k_cache, v_cache, *tables, head_dim**-0.5)
    group = num_heads // num_kv_heads
    for heads, kv in ((slice(group), slice(1)), (slice(-group, None), slice(-1, None))):
        expected = oracle(q[:, heads], k_cache[:, kv], v_cache[:, kv], *tables, head_dim**-0.5, 0)
        size = expected.square().mean(dim=(1, 2), keepdim=True).sqrt()
        assert_close(out[:, heads].double() / size, expected / size, **tolerance(dtype))


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits():
    """A race in the rings would show as a difference between runs."""
    tensors = large_inputs(((4096, 4096), (300, 5000), (65, 65)), 32, 8, BF16)
    first = paged_prefill_attention(*tensors, 0.1)
    assert not first.isnan().any()
    for _ in range(100):
        assert torch.equal(paged_prefill_attention(*tensors, 0.1), first)


@pytest.mark.gpu
def test_a_graph_replays_it_with_other_lengths(assert_close):
    """Descriptors are values of the launch, tables and lengths are read anew."""
    q, k_cache, v_cache, tables, lens, bounds = large_inputs(((100, 700), (28, 30)), 32, 8, BF16)
    paged_prefill_attention(q, k_cache, v_cache, tables, lens, bounds, 0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_prefill_attention(q, k_cache, v_cache, tables, lens, bounds, 0.1)
    lens -= torch.tensor([150, 1], dtype=torch.int32, device="cuda")
    bounds[1] = 101
    graph.replay()
    assert_close(out, oracle(q, k_cache, v_cache, tables, lens, bounds, 0.1, 0), **tolerance(BF16))
