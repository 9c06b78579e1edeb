"""The runner alone against recorded greedy outputs of a trained model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.backend.plans import generate, greedy
from tests.backend.workspace import hf_workspace_config, write_workspace
from transformers import AutoConfig

from turbotriton.backend.runner.model_runner import ModelRunner

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stories(assets, tmp_path_factory):
    folder = assets / "models" / "stories260K"
    config = hf_workspace_config(AutoConfig.from_pretrained(folder), session_len=512)
    return config, write_workspace(tmp_path_factory.mktemp("stories"), config, load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("num_blocks", [200, 24])
def test_greedy_output_equals_the_recorded_one(stories, assets, num_blocks):
    config, folder = stories
    model = config.model_config()
    text = {"cache_block_seq_len": "16", "cache_max_entry_count": str(num_blocks), "session_len": "256", "device": "cpu"}
    runner = ModelRunner(model, config.engine_config(text.get), folder)
    cases = json.loads((assets / "models" / "expected_greedy.json").read_text())["stories260K"]["cases"]
    num_new = len(cases[0]["output_ids"])
    output = generate(runner, model, [case["prompt_ids"] for case in cases], greedy(num_new), num_new=num_new)
    assert output.token_ids == [case["output_ids"] for case in cases]
    if num_blocks == 24:
        assert output.num_preemptions > 0
