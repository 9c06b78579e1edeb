"""Rules that change past the trained length, end to end: the oracle is transformers with the formula put in by hand."""

import math

import pytest
import torch
from tests.backend.plans import generate, greedy
from tests.backend.workspace import hf_workspace_config, write_workspace
from tests.checkpoints import make_tensors
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from turbotriton.backend.runner.model_runner import ModelRunner

torch.set_num_threads(1)

TRAINED, NUM_NEW = 24, 64
OPTIONS = {"cache_block_seq_len": "16", "cache_max_entry_count": "40", "session_len": "160", "device": "cpu"}
PROMPTS = [[7 * i % 300 + 3 for i in range(n)] for n in (5, 20, 40)]
SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": TRAINED,
}


def logn_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Qwen's rule: a query at position p >= TRAINED is multiplied by ln(p + 1) / ln(TRAINED)."""
    positions = torch.arange(key.shape[2] - query.shape[2], key.shape[2])
    factor = torch.tensor([math.log(p + 1) / math.log(TRAINED) if p + 1 > TRAINED else 1.0 for p in positions.tolist()])
    return eager_attention_forward(module, query * factor[:, None], key, value, attention_mask, scaling, **kwargs)


AttentionInterface.register("logn", logn_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("logn", eager_mask)


def run(kind, tmp_path, **sections):
    config = AutoConfig.for_model(kind, **SMALL)
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
    tensors = make_tensors({**config.to_dict(), "architectures": [architecture]}, seed=2)
    workspace = hf_workspace_config(config, attn_bias=int(kind == "qwen2"), **sections)
    model = workspace.model_config()
    runner = ModelRunner(model, workspace.engine_config(OPTIONS.get), write_workspace(tmp_path, workspace, tensors))
    return model, tensors, generate(runner, model, PROMPTS, greedy(NUM_NEW), num_new=NUM_NEW).token_ids


def oracle(config, tensors, prompt, attention="eager"):
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    model.load_state_dict(tensors)
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    ids = model.generate(
        torch.tensor([prompt]), attention_mask=mask, do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=None, pad_token_id=0
    )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["dynamic", "qwen"])
def test_dynamic_ntk_uses_the_theta_of_each_requests_own_limit(kind, tmp_path):
    model, tensors, found = run("llama", tmp_path, rope_scaling_type=kind, rope_scaling_factor=2.0)
    for prompt, ids in zip(PROMPTS, found, strict=True):
        theta = model.rope.theta_for(len(prompt) + NUM_NEW)
        assert theta > model.rope.theta
        config = AutoConfig.for_model("llama", **SMALL, rope_parameters={"rope_type": "default", "rope_theta": theta})
        assert ids == oracle(config, tensors, prompt)


def test_logn_attention_scales_queries_past_the_trained_length(tmp_path):
    _, tensors, found = run("qwen2", tmp_path, use_logn_attn=1)
    config = AutoConfig.for_model("qwen2", **SMALL)
    assert found == [oracle(config, tensors, prompt, "logn") for prompt in PROMPTS]
    assert found != [oracle(config, tensors, prompt) for prompt in PROMPTS]
