"""Behaviours of execute(plan): mixing, slots, seeds, logprobs, refusals."""

import dataclasses

import pytest
import torch
from tests.backend.plans import generate, greedy
from tests.backend.runner.test_weights import HF
from tests.backend.workspace import hf_workspace_config, write_workspace
from tests.checkpoints import make_tensors
from transformers import LlamaConfig

from turbotriton.backend.runner import model_runner
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.backend.runner.weights import find_weights_dir
from turbotriton.backend.scheduling.plan import JoinedRequest, NewBlocks, ScheduledRow, StepPlan, StepResult
from turbotriton.contract.errors import ConfigError, WorkspaceError
from turbotriton.contract.ini import TurbotritonSection, read_workspace_config
from turbotriton.contract.wire import SamplingParams

torch.set_num_threads(1)

CONFIG = hf_workspace_config(HF, attn_bias=1, session_len=64)
MODEL = CONFIG.model_config()
OPTIONS = {"cache_block_seq_len": "8", "cache_max_entry_count": "24", "max_batch_size": "4", "device": "cpu"}
PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [20, 21], [30, 31, 32, 33, 34]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("weights"), CONFIG, make_tensors(HF.to_dict(), seed=5))


@pytest.fixture
def runner(folder):
    return make_runner(folder)


def make_runner(folder, **options):
    return ModelRunner(MODEL, CONFIG.engine_config({**OPTIONS, **options}.get), folder)


def joined(slot, prompt, blocks, params=None, seed=0):
    return JoinedRequest(slot, tuple(prompt), len(prompt), tuple(blocks), params or greedy(8), seed, 0, MODEL.rope.theta)


def run(runner, prompts, params, **keys):
    return generate(runner, MODEL, prompts, params, num_new=12, num_slots=4, **keys)


def test_it_tells_what_it_has(runner):
    assert (runner.num_blocks, runner.block_size, runner.device, runner.compute_dtype) == (24, 8, "cpu", "fp32")


def test_a_plan_without_rows_gives_nothing(runner):
    assert runner.execute(StepPlan(0)) == StepResult()
    assert runner.execute(StepPlan(1, joined=(joined(0, [5], [0]),))) == StepResult()


def test_a_chunk_that_does_not_reach_the_end_samples_nothing(runner):
    plan = StepPlan(0, joined=(joined(0, PROMPTS[0], [3, 1]),), rows=(ScheduledRow(0, 0, 6, False),))
    assert runner.execute(plan) == StepResult()


def test_one_step_mixes_decodes_and_prefill_chunks_in_the_plans_order(runner):
    alone = run(runner, PROMPTS, greedy(12)).token_ids
    first = runner.execute(StepPlan(0, joined=(joined(2, PROMPTS[1], [9]),), rows=(ScheduledRow(2, 0, 2, True),)))
    mixed = runner.execute(
        StepPlan(
            1,
            joined=(joined(0, PROMPTS[0], [4, 2]), joined(3, PROMPTS[2], [7])),
            rows=(ScheduledRow(0, 0, 6, False), ScheduledRow(3, 0, 5, True), ScheduledRow(2, 2, 1, True)),
        )
    )
    last = runner.execute(StepPlan(2, rows=(ScheduledRow(2, 3, 1, True), ScheduledRow(0, 6, 4, True))))
    assert first.token_ids == (alone[1][0],)
    assert mixed.token_ids == (alone[2][0], alone[1][1])
    assert last.token_ids == (alone[1][2], alone[0][0])


def test_a_cached_prefix_is_not_computed_again(runner):
    """A second request starts at position 8 of the same prompt, on the first one's full block."""
    wanted = run(runner, [PROMPTS[0]], greedy(12)).token_ids[0][0]
    runner.execute(StepPlan(0, joined=(joined(0, PROMPTS[0], [5, 6]),), rows=(ScheduledRow(0, 0, 10, True),)))
    plan = StepPlan(1, joined=(joined(1, PROMPTS[0], [5, 11]),), rows=(ScheduledRow(1, 8, 2, True),))
    assert runner.execute(plan).token_ids == (wanted,)


def test_new_blocks_extend_the_table(runner):
    wanted = run(runner, [PROMPTS[1]], greedy(12)).token_ids[0]
    runner.execute(StepPlan(0, joined=(joined(1, PROMPTS[1], [13]),), rows=(ScheduledRow(1, 0, 2, True),)))
    found = [wanted[0]]
    for position in range(2, 13):
        added = (NewBlocks(1, (20,)),) if position == 8 else ()
        found += runner.execute(StepPlan(position, new_blocks=added, rows=(ScheduledRow(1, position, 1, True),))).token_ids
    assert found == wanted


def test_seeded_draws_survive_preemption_and_batching(folder):
    params = SamplingParams(temperature=1.2, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.3)
    roomy = run(make_runner(folder), PROMPTS, params, seeds=[11, 12, 13])
    tight = run(make_runner(folder, session_len="24", cache_max_entry_count="5"), PROMPTS, params, seeds=[11, 12, 13])
    assert tight.num_preemptions > 0
    assert tight.token_ids == roomy.token_ids
    alone = [run(make_runner(folder), [p], params, seeds=[s]).token_ids[0] for p, s in zip(PROMPTS, (11, 12, 13), strict=True)]
    assert alone == roomy.token_ids
    assert run(make_runner(folder), PROMPTS, params, seeds=[1, 2, 3]).token_ids != roomy.token_ids


def test_logprobs_come_where_they_were_asked_for(runner):
    params = [dataclasses.replace(greedy(12), num_logprobs=n) for n in (None, 0, 3)]
    output = run(runner, PROMPTS, params)
    assert output.logprobs[0] == [None] * 12
    assert all(found.top == () and found.token_logprob < 0 for found in output.logprobs[1])
    for token, found in zip(output.token_ids[2], output.logprobs[2], strict=True):
        assert len(found.top) == 3
        assert found.top[0] == (token, found.token_logprob)  # greedy draws the most likely


def test_a_slot_can_be_used_again_after_leaving(runner):
    wanted = run(runner, [PROMPTS[2]], greedy(12)).token_ids[0][0]
    runner.execute(StepPlan(0, joined=(joined(0, PROMPTS[0], [0, 1]),), rows=(ScheduledRow(0, 0, 10, True),)))
    plan = StepPlan(1, left=(0,), joined=(joined(0, PROMPTS[2], [1]),), rows=(ScheduledRow(0, 0, 5, True),))
    assert runner.execute(plan).token_ids == (wanted,)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_compute_dtype_is_taken_when_asked_for(folder, dtype):
    runner = make_runner(folder, compute_dtype=dtype)
    assert runner.compute_dtype == dtype
    assert len(run(runner, PROMPTS, greedy(12)).token_ids[0]) == 12


def test_an_absent_cuda_device_is_refused(folder):
    with pytest.raises(ConfigError, match=r"device is 'cuda:99'.*set device = cpu or auto"):
        make_runner(folder, device="cuda:99")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(WorkspaceError, match=r"holds no config\.ini"):
        make_runner(tmp_path)


@pytest.mark.parametrize(("limit", "expected"), [(1, 2), (10**9, 1)])
def test_a_small_model_on_a_cpu_runs_on_one_thread(folder, monkeypatch, limit, expected):
    monkeypatch.setattr(model_runner, "ONE_THREAD_ELEMENTS", limit)
    torch.set_num_threads(2)
    try:
        make_runner(folder)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(1)


def test_it_closes(runner):
    runner.close()
    with pytest.raises(AttributeError):
        runner.execute(StepPlan(0, rows=(ScheduledRow(0, 0, 1, True),)))


def test_a_workspace_in_lmdeploys_own_form_loads(tmp_path):
    """No manifest, no [turbotriton] section, weights under triton_models/weights."""
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=301,
        rms_norm_eps=1e-5,
    )
    tensors = make_tensors({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, seed=1)
    ours = hf_workspace_config(config, weight_type="fp16", session_len=64)
    write_workspace(tmp_path / "triton_models" / "weights", ours, tensors)
    ini = tmp_path / "triton_models" / "weights" / "config.ini"
    ini.write_text(ini.read_text().split("[turbotriton]")[0])

    folder = find_weights_dir(tmp_path)
    theirs = read_workspace_config(folder / "config.ini")
    assert theirs.turbotriton == TurbotritonSection()
    outputs = []
    for workspace in (ours, theirs):
        runner = ModelRunner(workspace.model_config(), workspace.engine_config(OPTIONS.get), folder)
        outputs.append(run(runner, PROMPTS, greedy(12)).token_ids)
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_tokens_in_fp32(folder):
    params = [greedy(12), SamplingParams(temperature=1.1, top_p=0.9, repetition_penalty=1.2), greedy(12)]
    outputs = [
        run(make_runner(folder, device=device, compute_dtype="fp32"), PROMPTS, params, chunk=4).token_ids
        for device in ("cpu", "cuda")
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
def test_compute_dtype_auto_is_the_weights_dtype_on_a_gpu(tmp_path):
    config = hf_workspace_config(HF, attn_bias=1, session_len=64, weight_type="bf16", compute_dtype="auto")
    write_workspace(tmp_path, config, make_tensors(HF.to_dict(), seed=5))
    runner = ModelRunner(config.model_config(), config.engine_config({**OPTIONS, "device": "cuda"}.get), tmp_path)
    assert runner.compute_dtype == "bf16"
    assert len(run(runner, PROMPTS, greedy(12)).token_ids[0]) == 12
