"""An engine that launches steps ahead gives what one gives that waits for each: every way to sample, with preemption and stops."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.backend.scheduling.fakes import model_config
from tests.backend.workspace import hf_workspace_config, write_workspace
from transformers import AutoConfig

from turbotriton.backend.engine.engine import Engine, prefill_beside_decodes
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.contract.errors import ConfigError
from turbotriton.contract.ini import read_workspace_config
from turbotriton.contract.wire import GenerateRequest, SamplingParams, TokenDelta

OPTIONS = {
    "device": "cpu",
    "session_len": "128",
    "cache_block_seq_len": "8",
    "cache_max_entry_count": "17",  # blocks: too few for all, so that some are preempted
    "num_tokens_per_iter": "24",
    "max_batch_size": "5",
}
GREEDY = {"temperature": 0.0}
REQUESTS = [
    ([1, 300, 20], {**GREEDY, "max_new_tokens": 60}),
    ([1, 40, 41, 42], {**GREEDY, "max_new_tokens": 40, "repetition_penalty": 1.3, "presence_penalty": 0.2}),
    ([1, 7], {"temperature": 0.9, "top_p": 0.9, "seed": 3, "max_new_tokens": 50}),
    ([1, 300, 20], {**GREEDY, "max_new_tokens": 60, "bad_sequences": ((13,), (338, 261)), "ignore_eos": True}),
    ([1, *range(5, 40)], {**GREEDY, "max_new_tokens": 30, "num_logprobs": 2}),
    ([1, 99], {"temperature": 1.2, "top_k": 20, "frequency_penalty": 0.5, "seed": 8, "max_new_tokens": 45, "min_new_tokens": 20}),
    ([1, 300, 20], {**GREEDY, "max_new_tokens": 50, "stop_sequences": ((261, 378),), "min_new_tokens": 4}),
    ([1, 300], {**GREEDY, "max_new_tokens": 0}),
    ([1, 12], {**GREEDY, "max_new_tokens": 1}),
]


@pytest.fixture(scope="module")
def weights(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = assets / "models" / "stories260K"
    config = hf_workspace_config(AutoConfig.from_pretrained(folder), session_len=512)
    return write_workspace(tmp_path_factory.mktemp("stories"), config, load_file(folder / "model.safetensors"))


def run(weights: Path, *, overlap: bool) -> tuple[dict[int, list[TokenDelta]], int, int]:
    workspace = read_workspace_config(weights / "config.ini")
    model, config = workspace.model_config(), workspace.engine_config(OPTIONS.get)
    engine = Engine(model, config, ModelRunner(model, config, weights), overlap=overlap)
    for request_id, (prompt, sampling) in enumerate(REQUESTS):
        engine.add("test", GenerateRequest(request_id, tuple(prompt), SamplingParams(**sampling)))
    found: dict[int, list[TokenDelta]] = {request_id: [] for request_id in range(len(REQUESTS))}
    num_steps = 0
    while engine.has_work:
        num_steps += 1
        for deltas in engine.step().values():
            for delta in deltas:
                found[delta.request_id].append(delta)
    stats = engine.stats()
    assert stats.num_used_blocks == 0
    return found, stats.preemptions_total, num_steps


def test_overlapped_steps_give_the_same_tokens(weights: Path) -> None:
    one_by_one, preemptions, _ = run(weights, overlap=False)
    ahead, preemptions_ahead, _ = run(weights, overlap=True)
    assert preemptions
    assert preemptions_ahead
    for request_id in one_by_one:
        expected, deltas = one_by_one[request_id], ahead[request_id]
        assert [d.token_ids for d in deltas if d.token_ids] == [d.token_ids for d in expected if d.token_ids], request_id
        assert (deltas[-1].finish_reason, deltas[-1].stop_token_matched) == (
            expected[-1].finish_reason,
            expected[-1].stop_token_matched,
        )
        for ours, theirs in zip(deltas, expected, strict=True):
            assert [entry is None for entry in ours.logprobs] == [entry is None for entry in theirs.logprobs]
    assert all(len(entry.top) == 2 for delta in ahead[4] for entry in delta.logprobs)


def test_what_changes_the_model_itself_is_taken_from_the_environment_too(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from turbotriton.backend.engine.engine import load_engine
    from turbotriton.backend.runner import model_runner

    made = []

    def record(model: object, config: object, folder: Path, *, reference_ops: bool, **more: Any) -> ModelRunner:
        made.append((model, reference_ops))
        return ModelRunner(model, config, folder, reference_ops=reference_ops, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(model_runner, "ModelRunner", record)
    changed = {"rope_scaling_factor": "2.5", "use_logn_attn": "1", "backend": "pytorch"}
    for options in ({}, changed, {"rope_scaling_factor": "0.0"}):
        load_engine(weights, (OPTIONS | options).get).close()
    found = [(model.rope.factor, model.rope.scaling_type, model.use_logn_attn, reference) for model, reference in made]
    assert found == [(1.0, "none", False, False), (2.5, "linear", True, True), (1.0, "none", False, False)]
    with pytest.raises(ConfigError, match="rope_scaling_factor is 'x'"):
        load_engine(weights, {"rope_scaling_factor": "x"}.get)


def test_a_small_model_takes_more_prompt_tokens_beside_decodes() -> None:
    """As long a step as 2048 tokens of a model of 1.75 G elements, or of 7 G without graphs, and never fewer tokens than those."""

    def tokens(hidden: int, layers: int, inter: int, heads: int, *, in_pieces: bool = True, weight_type: str = "bf16") -> int:
        shape = {"hidden_size": hidden, "num_layers": layers, "inter_size": inter, "num_heads": heads, "num_kv_heads": 8}
        model = dataclasses.replace(model_config(), head_dim=128, weight_type=weight_type, group_size=128, **shape)
        return prefill_beside_decodes(model, in_pieces=in_pieces)

    assert tokens(4096, 32, 14336, 32) == 2048
    assert tokens(2048, 24, 8192, 16) == 2048
    assert tokens(1024, 24, 2816, 16) == 4 * 2048
    assert tokens(4096, 32, 14336, 32, in_pieces=False) == tokens(8192, 80, 28672, 64) == 2048
    assert tokens(2048, 24, 8192, 16, in_pieces=False) == tokens(2048, 24, 8192, 16, weight_type="int4") == 4 * 2048
