"""Captured decode steps give what the same steps give one launch after the other, and leave everything else alone."""

import pytest
import torch
from tests.backend.plans import generate, greedy
from tests.backend.runner.test_weights import HF
from tests.backend.workspace import hf_workspace_config, write_workspace
from tests.checkpoints import make_tensors

from turbotriton.backend.runner.decode_graphs import batch_buckets
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.backend.scheduling.plan import JoinedRequest, ScheduledRow, StepPlan
from turbotriton.contract.wire import SamplingParams

CONFIG = hf_workspace_config(HF, attn_bias=1, session_len=128)
MODEL = CONFIG.model_config()
OPTIONS = {"cache_block_seq_len": "8", "cache_max_entry_count": "60", "max_batch_size": "6", "compute_dtype": "fp32"}
PROMPTS = [list(range(3, 3 + n)) for n in (10, 2, 5, 1, 17, 8)]


@pytest.mark.parametrize("size", [1, 3, 16, 64, 200, 256, 1000])
def test_buckets_reach_the_largest_batch_and_pad_little(size):
    buckets = batch_buckets(size)
    assert buckets[-1] == size
    assert list(buckets) == sorted(set(buckets))
    for rows in range(1, size + 1):
        bucket = next(b for b in buckets if b >= rows)
        assert bucket <= max(2 * rows, rows + 16, 1.5 * rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("weights"), CONFIG, make_tensors(HF.to_dict(), seed=5))


def make_runner(folder, device, **options):
    return ModelRunner(MODEL, CONFIG.engine_config({**OPTIONS, "device": device, **options}.get), folder)


@pytest.mark.gpu
@pytest.mark.parametrize("num_requests", [1, 3, 6])
def test_graphs_give_the_tokens_of_single_launches_and_of_the_cpu(folder, num_requests):
    params = [greedy(24)] * 4 + [SamplingParams(max_new_tokens=24, temperature=0.8, top_p=0.9), greedy(24)]
    outputs = []
    for device, graphs in (("cuda", "1"), ("cuda", "0"), ("cpu", "1")):
        runner = make_runner(folder, device, cuda_graphs=graphs)
        found = generate(runner, MODEL, PROMPTS[:num_requests], params[:num_requests], num_new=24, chunk=4, num_slots=6)
        outputs.append(found.token_ids)
        runner.close()
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.gpu
@torch.inference_mode()
def test_padding_writes_no_block_and_no_slot(folder):
    """Three rows in the bucket of four: the other slots' tokens and the cache's other blocks keep what they held."""
    runner = make_runner(folder, "cuda")
    assert runner._graphs is not None
    for pages in (*runner._kv.k, *runner._kv.v):
        pages.fill_(7.0)
    joined = tuple(
        JoinedRequest(slot, tuple(PROMPTS[0]), 10, (10 + 2 * slot, 11 + 2 * slot), greedy(8), 0, 0, MODEL.rope.theta)
        for slot in range(3)
    )
    runner.execute(StepPlan(0, joined=joined, rows=tuple(ScheduledRow(slot, 0, 10, True) for slot in range(3))))
    tokens = runner._slots._token_ids.clone()
    runner.execute(StepPlan(1, rows=tuple(ScheduledRow(slot, 10, 1, True) for slot in range(3))))
    others = [block for block in range(60) if not 10 <= block < 16]
    assert all(bool((pages[others] == 7.0).all()) for pages in (*runner._kv.k, *runner._kv.v))
    changed = (runner._slots._token_ids != tokens).nonzero().tolist()
    assert all(slot < 3 and position == 11 for slot, position in changed)
    runner.close()


EVERY_WAY = [
    greedy(8),
    SamplingParams(temperature=0.9, top_p=0.8, top_k=20, num_logprobs=3),
    SamplingParams(temperature=0.0, repetition_penalty=1.2, ignore_eos=True, num_logprobs=0),
    SamplingParams(min_p=0.1, presence_penalty=0.3, frequency_penalty=-0.2, min_new_tokens=8, stop_token_ids=(7, 8)),
    SamplingParams(top_p=0.9, seed=4, logit_bias=((5, 2.0), (6, -100.0)), bad_sequences=((9,), (10,))),
    SamplingParams(temperature=1.5, max_new_tokens=8),
]


@pytest.mark.gpu
def test_no_step_waits_for_the_device(folder):
    """Six ways to draw: decodes in a graph, then a request that joins with a penalty and its prefill among decodes."""
    runner = make_runner(folder, "cuda")
    joined = [
        JoinedRequest(slot, tuple(PROMPTS[0]), 10, (2 * slot, 2 * slot + 1, 20 + slot), params, 0, 0, MODEL.rope.theta)
        for slot, params in enumerate(EVERY_WAY)
    ]
    first, last = joined[:5], joined[5:]
    runner.execute(StepPlan(0, joined=tuple(first), rows=tuple(ScheduledRow(slot, 0, 10, True) for slot in range(5))))

    def plan(step, *more_rows, **changes):
        return StepPlan(step, rows=(*(ScheduledRow(slot, 9 + step, 1, True) for slot in range(5)), *more_rows), **changes)

    again = JoinedRequest(5, tuple(PROMPTS[0]), 10, (10, 11, 25), EVERY_WAY[3], 3, 0, MODEL.rope.theta)
    plans = [plan(2), plan(3), plan(4, ScheduledRow(5, 0, 10, True), joined=tuple(last))]
    plans += [plan(5, left=(5,)), plan(6, ScheduledRow(5, 0, 10, True), joined=(again,)), plan(7, ScheduledRow(5, 10, 1, True))]
    runner.execute(plan(1))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [runner.launch(plan) for plan in plans]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    results = [collect() for collect in pending]
    assert [len(result.token_ids) for result in results] == [5, 5, 6, 5, 6, 6]
    assert all([len(entry.top) if entry else -1 for entry in result.logprobs[:4]] == [-1, 3, 0, -1] for result in results)
    runner.close()
