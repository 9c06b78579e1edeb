"""The warp-specialised prefill kernel against float64, as `paged_prefill_attention` launches it when its configuration says so.

On the CPU in an emulation of its barriers and rings (gluon_emulation.py), compiled ahead for sm_90, and on a GPU. Cache slots that no query
may see hold NaN. Tolerances as in test_kernels_paged_prefill_attention.py.
"""

import dataclasses
import inspect
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.backend.ops import test_kernels_paged_prefill_attention as plain
from tests.backend.ops.conftest import Target
from tests.backend.ops.gluon_emulation import emulate
from tests.backend.ops.test_kernels_compile_ahead import POINTERS, SHARED_LIMIT_BYTES, Recorder
from tests.backend.ops.test_kernels_paged_prefill_attention import Case, inputs, large_inputs, oracle, tolerance
from turbotriton.backend.ops.kernels import hopper_prefill_attention as module
from turbotriton.backend.ops.kernels import paged_prefill_attention as launcher
from turbotriton.backend.ops.kernels.paged_prefill_attention import paged_prefill_attention
from turbotriton.backend.ops.kernels.tuning import takes_warp_specialized_prefill

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
]


@pytest.fixture(autouse=True)
def warp_specialized(monkeypatch):
    chosen = launcher.prefill_attention_config
    monkeypatch.setattr(
        launcher, "prefill_attention_config", lambda *shape: dataclasses.replace(chosen(*shape), warp_specialized=True)
    )


def run(case, dtype, monkeypatch, *, seed=0, num_stages=3, num_sms=2, scale=None):
    """(result, float64 result), emulated on `num_sms` multiprocessors, with few stages so that rings go round."""
    chosen = launcher.prefill_attention_config
    tensors = inputs(Target("cpu", dtype, torch.Generator().manual_seed(seed)), case)
    scale = scale or case.head_dim**-0.5
    with monkeypatch.context() as patch:
        patch.setattr(
            launcher, "prefill_attention_config", lambda *shape: dataclasses.replace(chosen(*shape), num_stages=num_stages)
        )
        patch.setattr(module, "num_sms", lambda device: num_sms)
        emulate(module, KERNEL, patch, seed)
        return paged_prefill_attention(*tensors, scale), oracle(*tensors, scale, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).replace(" ", "") for part in case))
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_each_query_attends_to_the_keys_it_may_see(case, dtype, monkeypatch, assert_close, guarded_outputs):
    assert_close(*run(case, dtype, monkeypatch), **tolerance(dtype))


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("num_sms", [1, 3, 100])
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
    source = inspect.getsource(module._step.fn).removeprefix("@gluon.jit\n")
    for old, new in MISTAKES[mistake]:
        assert source.count(old) == 1
        source = source.replace(old, new)
    names: dict[str, object] = {}
    exec(source, dict(vars(module)), names)
    monkeypatch.setattr(module._step, "fn", names["_step"])

    def is_found(seed):
        try:
            out, _ = run(Case(4, 1, 64, 64, ((40, 700),)), FP16, monkeypatch, seed=seed, num_stages=2, num_sms=1)
        except (AssertionError, AttributeError, RuntimeError, TypeError):
            return True
        return bool(out.isnan().any())

    assert any(is_found(seed) for seed in range(20))
