"""config.ini: LMDeploy's keys, order and values in [llama], the rest in [turbotriton]."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import make_checkpoint
from tests.converter.conftest import LLAMA, Workspace

from turbotriton.contract.chat_templates import template_session_len
from turbotriton.contract.errors import CheckpointError
from turbotriton.contract.ini import ModelConfig, read_workspace_config

INTERNLM2 = """[llama]
model_name = internlm2-chat-7b
tensor_para_size = 2
head_num = 4
kv_head_num = 2
vocab_size = 320
num_layer = 1
inter_size = 96
norm_eps = 1e-05
attn_bias = 0
start_id = 1
end_id = 2
session_len = 32776
weight_type = bf16
rotary_embedding = 128
rope_theta = 1000000.0
size_per_head = 128
group_size = 0
max_batch_size = 64
max_context_token_num = 1
step_length = 1
cache_max_entry_count = 0.8
cache_block_seq_len = 64
cache_chunk_size = -1
num_tokens_per_iter = 0
max_prefill_iters = 1
extra_tokens_per_iter = 0
use_context_fmha = 1
quant_policy = 0
max_position_embeddings = 512
rope_scaling_factor = 0.0
use_dynamic_ntk = 0
use_logn_attn = 0
lora_policy = 
lora_r = 0
lora_scale = 0.0
lora_max_wo_r = 0
lora_rank_pattern = 
lora_scale_pattern = 

"""


def model(ws: Workspace) -> ModelConfig:
    return read_workspace_config(ws.weights / "config.ini").model_config()


def changed(folder: Path, **changes: Any) -> Path:
    """The checkpoint in `folder` with other values in config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_llama_section_is_lmdeploys_text(convert: Any, released: Any, tmp_path: Path) -> None:
    config = released("internlm2-chat-7b", num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128)
    ws = convert(make_checkpoint(config, tmp_path / "m", dtype=torch.bfloat16), "internlm2-chat-7b", tp=2)
    text = (ws.weights / "config.ini").read_text()
    assert text[: text.index("[turbotriton]")] == INTERNLM2


@pytest.mark.parametrize(
    ("name", "session_len"),
    [
        ("llama2", 4096),
        ("internlm", 2048),
        ("internlm2", 32768),
        ("internlm-chat-20b", 8192),
        ("qwen", 8192),
        ("llama3", 8192),
        ("codellama", 4096),
        ("internlm-xcomposer2-4khd", 16384),
        ("Mistral-7B-Instruct", 2048),
        ("my-model", None),
    ],
)
def test_template_session_len(name: str, session_len: int | None) -> None:
    assert template_session_len(name) == session_len


def test_session_len_is_the_templates_plus_8_else_the_models(convert: Any, llama: Path) -> None:
    assert convert(llama, "llama2").llama["session_len"] == "4104"
    assert convert(llama, "my-model", dst="other").llama["session_len"] == "256"


@pytest.mark.parametrize(
    ("torch_dtype", "asked", "written"),
    [
        ("float16", "auto", "fp16"),
        ("bfloat16", "auto", "bf16"),
        ("float32", "auto", "fp16"),
        (None, "auto", "fp16"),
        ("bfloat16", "fp16", "fp16"),
        ("float16", "fp32", "fp32"),
        ("float16", "bf16", "bf16"),
    ],
)
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_weight_type(convert: Any, llama: Path, key: str, torch_dtype: str | None, asked: str, written: str) -> None:
    changed(llama, torch_dtype=None)
    changed(llama, **{key: torch_dtype})
    assert convert(llama, dtype=asked).llama["weight_type"] == written


def test_fixed_token_ids_of_qwen(convert: Any, released: Any, tmp_path: Path) -> None:
    first = convert(make_checkpoint(released("qwen-14b-chat"), tmp_path / "1"), dst="q1")
    assert (first.llama["start_id"], first.llama["end_id"]) == ("0", "151643")
    assert (first.llama["use_dynamic_ntk"], first.llama["use_logn_attn"]) == ("1", "1")
    assert first.llama["max_position_embeddings"] == "512", "its seq_length"
    assert first.llama["rope_scaling_factor"] == "0.0"
    assert model(first).rope.scaling_type == "qwen"
    second = convert(make_checkpoint(released("qwen1.5-4b-chat"), tmp_path / "2"), dst="q2")
    assert (second.llama["start_id"], second.llama["end_id"]) == ("151643", "151645")


def test_all_ends_of_a_turn_come_from_generation_config(convert: Any, llama: Path) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    ws = convert(llama)
    assert ws.llama["end_id"] == "2", "the tokenizer's eos"
    assert model(ws).eos_token_ids == (2, 7, 9)


def test_unknown_position_limit_is_written_as_0_as_lmdeploy_does(convert: Any, llama: Path) -> None:
    ws = convert(changed(llama, max_position_embeddings=None))
    assert (ws.llama["max_position_embeddings"], ws.llama["session_len"]) == ("0", "2048")


ROPES = {
    "linear": ({"type": "linear", "factor": 4.0}, {"factor": 4.0}),
    "dynamic": ({"type": "dynamic", "factor": 2.0}, {"factor": 2.0}),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 64,
        },
        {"factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0, "original_max_position_embeddings": 64},
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16, "attention_factor": 1.5},
        {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 1.0, "attention_factor": 1.5},
    ),
    "none": ({"rope_type": "default"}, {"factor": 1.0}),
}


@pytest.mark.parametrize("new_keys", [False, True])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling(convert: Any, llama: Path, kind: str, new_keys: bool) -> None:
    scaling, expected = ROPES[kind]
    if new_keys:
        changed(llama, rope_parameters=scaling | {"rope_theta": 20000.0})
    else:
        changed(llama, rope_scaling=scaling, rope_theta=20000.0)
    ws = convert(llama)
    rope = model(ws).rope
    assert (rope.scaling_type, rope.theta) == (kind, 20000.0)
    assert {name: getattr(rope, name) for name in expected} == expected
    assert ws.llama["use_dynamic_ntk"] == str(int(kind == "dynamic"))
    if kind in ("linear", "dynamic", "none"):
        assert ws.ours["rope_scaling_type"] == "", "[llama] says it; its keys stay the ones to edit"


def test_yarn_magnitude_from_mscale(convert: Any, llama: Path) -> None:
    changed(llama, rope_scaling={"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5})
    expected = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert model(convert(llama)).rope.attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 32}, 32),
        ({"sliding_window": "null"}, 0),
        ({}, 4096),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 16}, 16),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 16}, 0),
    ],
)
def test_mistrals_sliding_window(convert: Any, tmp_path: Path, changes: dict[str, Any], window: int) -> None:
    config = LLAMA | {"architectures": ["MistralForCausalLM"]} | changes
    if config.get("sliding_window") == "null":
        config["sliding_window"] = None
    assert model(convert(make_checkpoint(config, tmp_path / "m"))).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": False}, 0),
        ({"use_sliding_window": True, "max_window_layers": 0}, 32),
        ({"use_sliding_window": True, "max_window_layers": 2}, 0),
    ],
)
def test_qwens_sliding_window(convert: Any, released: Any, tmp_path: Path, changes: dict[str, Any], window: int) -> None:
    config = released("qwen1.5-4b-chat", sliding_window=32, **changes)
    assert model(convert(make_checkpoint(config, tmp_path / "m"))).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "1 of 2 layers"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused_by_key(
    convert: Any, llama: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        convert(changed(llama, **changes))


def test_a_workspace_that_lmdeploy_v03_wrote_is_understood(tmp_path: Path) -> None:
    """No [turbotriton], no lora keys, keys that nobody knows; dynamic NTK implied by the flag and a factor."""
    text = INTERNLM2[: INTERNLM2.index("lora_policy")].replace("use_dynamic_ntk = 0", "use_dynamic_ntk = 1")
    text = text.replace("rope_scaling_factor = 0.0", "rope_scaling_factor = 2.0") + "a_key_of_another_version = 1\n"
    weights = tmp_path / "triton_models" / "weights"
    weights.mkdir(parents=True)
    (weights / "config.ini").write_text(text)
    config = read_workspace_config(weights / "config.ini")
    found = config.model_config()
    assert (found.num_heads, found.num_kv_heads, found.head_dim, found.hidden_size) == (4, 2, 128, 512)
    assert (found.rope.scaling_type, found.rope.factor, found.rope.theta) == ("dynamic", 2.0, 1e6)
    assert (found.eos_token_ids, found.tie_word_embeddings, found.sliding_window, found.qk_norm) == ((2,), False, 0, False)
    assert config.engine_config().session_len == 32776
