"""Fields and defaults are LMDeploy's; each does something or is refused by name."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from turbotriton import GenerationConfig, PytorchEngineConfig, Response, TurbomindEngineConfig, pipeline
from turbotriton.backend.pipeline.options import engine_options
from turbotriton.contract.errors import ConfigError, TurbotritonError
from turbotriton.demo import checkpoint_path

TURBOMIND = {
    "model_name": None, "model_format": None, "tp": 1, "session_len": None, "max_batch_size": 128, "cache_max_entry_count": 0.8,
    "cache_block_seq_len": 64, "quant_policy": 0, "rope_scaling_factor": 0.0, "use_logn_attn": False, "download_dir": None,
    "revision": None, "max_prefill_token_num": 8192, "num_tokens_per_iter": 0, "max_prefill_iters": 1,
    "schedule_policy": None,  # ours, behind LMDeploy's
}  # fmt: skip
PYTORCH = {
    "model_name": "", "tp": 1, "session_len": None, "max_batch_size": 128, "cache_max_entry_count": 0.8,
    "eviction_type": "recompute", "prefill_interval": 16, "block_size": 64, "num_cpu_blocks": 0, "num_gpu_blocks": 0,
    "adapters": None, "max_prefill_token_num": 4096, "thread_safe": False, "download_dir": None, "revision": None,
}  # fmt: skip
GENERATION = {
    "n": 1, "max_new_tokens": 512, "top_p": 1.0, "top_k": 1, "temperature": 0.8, "repetition_penalty": 1.0, "ignore_eos": False,
    "random_seed": None, "stop_words": None, "bad_words": None, "min_new_tokens": None, "skip_special_tokens": True, "logprobs": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "defaults"), [(TurbomindEngineConfig, TURBOMIND), (PytorchEngineConfig, PYTORCH), (GenerationConfig, GENERATION)]
)
def test_fields_and_defaults_are_lmdeploys_in_its_order(owner: Any, defaults: dict[str, object]) -> None:
    assert dataclasses.asdict(owner()) == defaults
    assert [field.name for field in dataclasses.fields(owner)] == list(defaults)


def test_a_response_has_lmdeploys_fields() -> None:
    names = ["text", "generate_token_len", "input_token_len", "session_id", "finish_reason", "token_ids", "logprobs"]
    assert [field.name for field in dataclasses.fields(Response)] == names


@pytest.mark.parametrize(
    ("owner", "fields"),
    [
        (TurbomindEngineConfig, {"tp": 2}),
        (TurbomindEngineConfig, {"model_format": "gguf"}),
        (TurbomindEngineConfig, {"rope_scaling_factor": -1.0}),
        (TurbomindEngineConfig, {"num_tokens_per_iter": -1}),
        (TurbomindEngineConfig, {"max_prefill_iters": 4}),
        (TurbomindEngineConfig, {"max_prefill_token_num": 0}),
        (PytorchEngineConfig, {"tp": 4}),
        (PytorchEngineConfig, {"adapters": {"a": "b"}}),
        (PytorchEngineConfig, {"eviction_type": "copy"}),
        (PytorchEngineConfig, {"prefill_interval": 8}),
        (PytorchEngineConfig, {"num_cpu_blocks": 5}),
        (PytorchEngineConfig, {"num_gpu_blocks": -5}),
        (GenerationConfig, {"n": 2}),
        (GenerationConfig, {"stop_words": "stop"}),
        (GenerationConfig, {"stop_words": [5]}),
        (GenerationConfig, {"bad_words": [""]}),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(owner: Any, fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=name) as caught:
        owner(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (TurbomindEngineConfig(session_len=99), "session_len", "99"),
        (TurbomindEngineConfig(max_batch_size=7), "max_batch_size", "7"),
        (TurbomindEngineConfig(cache_max_entry_count=40), "cache_max_entry_count", "40.0"),
        (TurbomindEngineConfig(cache_block_seq_len=32), "cache_block_seq_len", "32"),
        (TurbomindEngineConfig(quant_policy=8), "quant_policy", "8"),
        (TurbomindEngineConfig(schedule_policy="lof"), "schedule_policy", "lof"),
        (TurbomindEngineConfig(), "schedule_policy", None),
        (TurbomindEngineConfig(max_prefill_token_num=256), "num_tokens_per_iter", "256"),
        (TurbomindEngineConfig(max_prefill_token_num=256, num_tokens_per_iter=128), "num_tokens_per_iter", "128"),
        (TurbomindEngineConfig(), "num_tokens_per_iter", None),
        (PytorchEngineConfig(block_size=16), "cache_block_seq_len", "16"),
        (PytorchEngineConfig(num_gpu_blocks=50), "cache_max_entry_count", "50.0"),
        (PytorchEngineConfig(max_prefill_token_num=99), "num_tokens_per_iter", "99"),
    ],
)
def test_engine_fields_reach_the_engines_keys(config: Any, name: str, value: str | None) -> None:
    assert engine_options(config).overrides.get(name) == value


def test_the_pytorch_config_means_the_reference_ops() -> None:
    assert engine_options(PytorchEngineConfig()).reference_ops
    assert not engine_options(TurbomindEngineConfig()).reference_ops


def test_pipelines_own_arguments_win_over_the_configs() -> None:
    options = engine_options(
        TurbomindEngineConfig(revision="a", model_name="yi"), revision="b", download_dir="/d", model_name="qwen"
    )
    assert (options.revision, options.download_dir, options.model_name) == ("b", "/d", "qwen")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_path": "/nowhere/at/all"}, "/nowhere/at/all: is no folder"),
        ({"model_path": ".", "log_level": "LOUD"}, "log_level is 'LOUD'"),
        ({"model_path": ".", "revision": "main"}, "revision is 'main', but . is a local path"),
    ],
)
def test_a_wrong_call_of_pipeline_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TurbotritonError, match=message) as caught:
        pipeline(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (TurbomindEngineConfig(), (1.0, "none", False, False)),
        (TurbomindEngineConfig(rope_scaling_factor=2.5, use_logn_attn=True), (2.5, "linear", True, False)),
        (PytorchEngineConfig(), (1.0, "none", False, True)),
    ],
)
def test_what_a_config_says_of_the_model_reaches_the_runner(
    config: Any, found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbotriton.backend.runner import model_runner

    made = []

    def record(model: Any, engine: Any, folder: Path, *, reference_ops: bool) -> None:
        made.append((model.rope.factor, model.rope.scaling_type, model.use_logn_attn, reference_ops))
        raise ConfigError("far enough")

    monkeypatch.setenv("TURBOTRITON_CACHE", str(tmp_path))
    monkeypatch.setattr(model_runner, "ModelRunner", record)
    with pytest.raises(ConfigError, match="far enough"):
        pipeline(checkpoint_path(), backend_config=config)
    assert made == [found]
