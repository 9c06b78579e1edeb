"""Converted and run, greedy output equals transformers token for token: every family, small, with its released flags, in fp32.

Eight ragged prompts at once, chunks of 16, a pool that forces preemption. Families without a class in transformers are compared
with the same weights renamed into Llama or Qwen2.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.backend.plans import generate, greedy
from tests.checkpoints import as_transformers, make_checkpoint, make_tensors, scaled_config
from transformers import AutoConfig, AutoModelForCausalLM

from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.backend.runner.weights import find_weights_dir
from turbotriton.contract.ini import read_workspace_config
from turbotriton.converter.convert import ConvertOptions, convert_checkpoint

torch.set_num_threads(1)

NUM_NEW = 64
PROMPT_LENGTHS = (3, 17, 33, 40, 1, 16, 25, 50)
OPTIONS = {
    "cache_block_seq_len": "16",
    "cache_max_entry_count": "30",
    "session_len": "128",
    "max_batch_size": "8",
    "device": "cpu",
}


@dataclass(frozen=True)
class Row:
    folder: str
    changes: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)  # what the row is here to exercise, as ModelConfig or its rope says it
    tp: int = 1


def scaling(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, "type": kind, **keys}}


ROWS = {
    "llama1": Row("vicuna-7b-v1.5"),
    "llama2": Row("llama-2-7b-chat"),
    "llama2-70b-gqa-tp2": Row("llama-2-70b", {"vocab_size": 321, "num_key_value_heads": 2}, {"tp": 2, "num_kv_heads": 2}, tp=2),
    "llama2-tp4": Row("llama-2-7b-chat", {"num_heads": 8, "vocab_size": 322}, {"tp": 4, "num_kv_heads": 8}, tp=4),
    "qwen2-tp8": Row(
        "qwen1.5-0.5b-chat", {"num_heads": 16, "head_dim": 8, "vocab_size": 323}, {"tp": 8, "attn_bias": True}, tp=8
    ),
    "llama3": Row("llama3-8b-instruct", flags={"theta": 500000.0}),
    "llama3.1-rope": Row("llama3.1-8b-instruct", flags={"scaling_type": "llama3"}),
    "llama3.2-tied": Row("llama3.2-3b-instruct", flags={"tie_word_embeddings": True}),
    "llama-linear-rope": Row("deepseek-coder-1.3b-instruct", flags={"scaling_type": "linear", "factor": 4.0}),
    "llama-dynamic-rope-within-range": Row(
        "llama-2-7b-chat", scaling("dynamic", factor=2.0), {"scaling_type": "dynamic", "factor": 2.0}
    ),
    "llama-yarn-rope": Row(
        "llama-2-7b-chat",
        scaling("yarn", factor=4.0, original_max_position_embeddings=32) | {"max_position_embeddings": 128},
        {"scaling_type": "yarn", "original_max_position_embeddings": 32},
    ),
    "mistral-window": Row("mistral-7b-v0.1", {"sliding_window": 23}, {"sliding_window": 23}),
    "mistral-no-window": Row("mistral-7b-instruct-v0.3", flags={"sliding_window": 0}),
    "qwen2": Row("qwen2-7b-instruct", flags={"attn_bias": True}),
    "qwen1.5-tied-head-dim-20": Row(
        "qwen1.5-0.5b-chat", {"hidden_size": 80}, {"attn_bias": True, "tie_word_embeddings": True, "head_dim": 20}
    ),
    "qwen3": Row("qwen3-4b", {"head_dim": 24, "hidden_size": 64}, {"qk_norm": True, "head_dim": 24, "hidden_size": 64}),
    "internlm": Row("internlm-chat-7b", flags={"attn_bias": True}),
    "internlm2": Row("internlm2-chat-7b", flags={"num_kv_heads": 1}),
    "qwen": Row("qwen-7b-chat", flags={"attn_bias": True, "use_logn_attn": True}),
    "baichuan": Row("baichuan2-7b", {"architectures": ["BaiChuanForCausalLM"]}),
    "baichuan2": Row("baichuan2-7b"),
}


def oracle_outputs(config: Any, tensors: dict[str, torch.Tensor], prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"} or not config.tie_word_embeddings
    model.tie_weights()
    outputs = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=NUM_NEW,
            min_new_tokens=NUM_NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("name", ROWS)
def test_greedy_output_equals_transformers(name, assets, tmp_path):
    row = ROWS[name]
    released = json.loads((assets / "configs" / row.folder / "config.json").read_text())
    small = scaled_config(released, **row.changes)
    options = ConvertOptions(
        "llama2", make_checkpoint(small, tmp_path / "checkpoint", seed=3), tmp_path / "workspace", tp=row.tp, dtype="fp32"
    )
    convert_checkpoint(options)
    weights_dir = find_weights_dir(options.dst_path)
    workspace = read_workspace_config(weights_dir / "config.ini")
    model = workspace.model_config()
    runner = ModelRunner(model, workspace.engine_config(OPTIONS.get), weights_dir)
    for flag, value in row.flags.items():
        assert getattr(model, flag, None) == value or getattr(model.rope, flag, None) == value

    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, model.vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    output = generate(runner, model, prompts, greedy(NUM_NEW), num_new=NUM_NEW, chunk=16)

    assert output.num_preemptions > 0
    oracle_config, tensors = as_transformers(small, make_tensors(small, seed=3))
    assert output.token_ids == oracle_outputs(AutoConfig.for_model(**oracle_config), tensors, prompts)
    assert len({token for ids in output.token_ids for token in ids}) >= 20
