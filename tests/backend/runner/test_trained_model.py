"""The runner alone against greedy outputs of trained models: stories260K's recorded ones, and the reference ops' on the bundled demo.

A token may be another one only where the two largest logits are nearer to each other than the dtype's rounding moves them. Every
position is asked for: each continuation of a prompt by what is expected is a prompt of its own.
"""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file
from tests.backend.plans import generate, greedy
from tests.backend.workspace import hf_workspace_config, write_workspace
from transformers import AutoConfig

from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.demo import checkpoint_path

torch.set_num_threads(1)

#: Logits that are nearer than this may change places: rounding moves those of such small models less.
NEAR_TIE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.15}
DEMO_PROMPTS = (
    "What is 12 + 30?", "Hello! What can you do?", "Spell the word kitchen.", "Tell me a story about a fox.", "Count from 3 to 11.",
)  # fmt: skip


@dataclass
class Case:
    prompt_ids: list[int]
    output_ids: list[int]
    margins: list[float]  # between the two largest logits at each output token


@pytest.fixture(scope="module")
def stories(assets, tmp_path_factory):
    folder = assets / "models" / "stories260K"
    config = hf_workspace_config(AutoConfig.from_pretrained(folder), session_len=512)
    recorded = json.loads((assets / "models" / "expected_greedy.json").read_text())["stories260K"]["cases"]
    cases = [Case(case["prompt_ids"], case["output_ids"], case["top1_top2_margin"]) for case in recorded]
    return config, write_workspace(tmp_path_factory.mktemp("stories"), config, load_file(folder / "model.safetensors")), cases


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    from tokenizers import Tokenizer

    from turbotriton.demo.training.tokenizer import render

    folder = checkpoint_path()
    config = hf_workspace_config(AutoConfig.from_pretrained(folder), session_len=512)
    weights = write_workspace(tmp_path_factory.mktemp("demo"), config, load_file(folder / "model.safetensors"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chats = [render([("user", text)], add_generation_prompt=True) for text in DEMO_PROMPTS]
    prompts = [tokenizer.encode(chat, add_special_tokens=False).ids for chat in chats]
    runner = make_runner(config, weights, "cpu")
    found = generate(runner, config.model_config(), prompts, replace(greedy(32), num_logprobs=2), num_new=32)
    margins = [[entry.top[0][1] - entry.top[1][1] for entry in entries] for entries in found.logprobs]
    return config, weights, [Case(*case) for case in zip(prompts, found.token_ids, margins, strict=True)]


def make_runner(config, folder, device, num_blocks=400, **options):
    text = {
        "cache_block_seq_len": "16",
        "cache_max_entry_count": str(num_blocks),
        "session_len": "256",
        "device": device,
        **options,
    }
    return ModelRunner(config.model_config(), config.engine_config(text.get), folder)


@pytest.mark.parametrize("num_blocks", [200, 24])
def test_greedy_output_equals_the_recorded_one(stories, num_blocks):
    config, folder, cases = stories
    runner = make_runner(config, folder, "cpu", num_blocks)
    num_new = len(cases[0].output_ids)
    output = generate(runner, config.model_config(), [case.prompt_ids for case in cases], greedy(num_new), num_new=num_new)
    assert output.token_ids == [case.output_ids for case in cases]
    if num_blocks == 24:
        assert output.num_preemptions > 0


def test_demo_prompts_say_something(demo):
    """What the comparisons below would compare."""
    cases = demo[2]
    assert len({token for case in cases for token in case.output_ids}) > 40
    assert sum(margin > NEAR_TIE["fp16"] for case in cases for margin in case.margins) > 100


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", ["0", "1"])
@pytest.mark.parametrize("dtype", NEAR_TIE)
@pytest.mark.parametrize("model", ["demo", "stories"])
def test_a_gpu_gives_the_same_greedy_tokens_but_for_near_ties(model, dtype, deterministic, request):
    config, folder, cases = request.getfixturevalue(model)
    runner = make_runner(config, folder, "cuda", compute_dtype=dtype, deterministic=deterministic)
    num_new = len(cases[0].output_ids)
    output = generate(runner, config.model_config(), [case.prompt_ids for case in cases], greedy(num_new), num_new=num_new)
    for case, found in zip(cases, output.token_ids, strict=True):  # decoded: up to the first difference
        at = next((i for i, pair in enumerate(zip(found, case.output_ids, strict=True)) if pair[0] != pair[1]), None)
        assert at is None or case.margins[at] < NEAR_TIE[dtype], (at, found, case.output_ids)

    steps = [(case, i) for case in cases for i in range(num_new)]
    prompts = [case.prompt_ids + case.output_ids[:i] for case, i in steps]
    found = generate(runner, config.model_config(), prompts, greedy(1), num_new=1, chunk=64).token_ids
    runner.close()
    other = [(case.margins[i], i) for (case, i), ids in zip(steps, found, strict=True) if ids != [case.output_ids[i]]]
    assert all(margin < NEAR_TIE[dtype] for margin, _ in other), other
    assert len(other) <= len(steps) // 20
