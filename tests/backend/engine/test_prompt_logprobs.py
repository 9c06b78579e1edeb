"""Log-probabilities of prompt tokens: those of transformers' model, however the prompt is cut, cached or preempted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.backend.workspace import hf_workspace_config, write_workspace
from transformers import AutoConfig, AutoModelForCausalLM

from turbotriton.backend.engine.engine import Engine
from turbotriton.backend.engine.ipc import decode_deltas, encode_deltas
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.contract.errors import InvalidInputError
from turbotriton.contract.ini import read_workspace_config
from turbotriton.contract.wire import FinishReason, GenerateRequest, SamplingParams, TokenDelta

PROMPT = (1, 403, 407, 261, 378, 13, 9, 300, 20, 21, 44, 350, 41, 7, 99, 100, 101, 8, 15)


@pytest.fixture(scope="module")
def weights(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = assets / "models" / "stories260K"
    config = hf_workspace_config(AutoConfig.from_pretrained(folder), session_len=512)
    return write_workspace(tmp_path_factory.mktemp("stories"), config, load_file(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def expected(assets: Path) -> torch.Tensor:
    """[len(PROMPT) - 1, vocab_size]: log-probabilities of what follows each prompt token but the last."""
    model = AutoModelForCausalLM.from_pretrained(assets / "models" / "stories260K", torch_dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, :-1].double(), dim=-1)


def make_engine(weights: Path, *, overlap: bool = True, **options: str) -> Engine:
    given = {
        "device": "cpu",
        "session_len": "128",
        "cache_block_seq_len": "4",
        "cache_max_entry_count": "64",
        "max_batch_size": "4",
    }
    workspace = read_workspace_config(weights / "config.ini")
    model, config = workspace.model_config(), workspace.engine_config((given | options).get)
    return Engine(model, config, ModelRunner(model, config, weights), overlap=overlap)


def run(engine: Engine, *requests: tuple[tuple[int, ...], SamplingParams]) -> list[list[TokenDelta]]:
    for request_id, (prompt, sampling) in enumerate(requests):
        engine.add("test", GenerateRequest(request_id, prompt, sampling))
    found: list[list[TokenDelta]] = [[] for _ in requests]
    while engine.has_work:
        for deltas in engine.step().values():
            for delta in decode_deltas(encode_deltas(deltas)):
                found[delta.request_id].append(delta)
    return found


def assert_scored(deltas: list[TokenDelta], expected: torch.Tensor, num_top: int) -> None:
    first, *others = deltas
    assert not any(delta.prompt_logprobs for delta in others)
    assert len(first.prompt_logprobs) == len(expected)
    for token_id, entry, row in zip(PROMPT[1:], first.prompt_logprobs, expected, strict=True):
        assert entry.token_logprob == pytest.approx(float(row[token_id]), abs=2e-4)
        best = row.topk(num_top)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=2e-4)


def asked(num_top: int, max_new_tokens: int, **fields: float) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens, prompt_logprobs=num_top, ignore_eos=True, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("budget", ["1", "5", "512"])
@pytest.mark.parametrize("max_new_tokens", [0, 1, 6])
def test_they_come_with_the_first_delta_however_the_prompt_is_cut(
    weights: Path, expected: torch.Tensor, budget: str, overlap: bool, max_new_tokens: int
) -> None:
    engine = make_engine(weights, overlap=overlap, num_tokens_per_iter=budget)
    (deltas,) = run(engine, (PROMPT, asked(3, max_new_tokens)))
    assert_scored(deltas, expected, 3)
    assert sum(len(delta.token_ids) for delta in deltas) == max_new_tokens
    assert deltas[-1].finish_reason is FinishReason.LENGTH


def test_logits_of_a_long_prompt_are_held_a_part_at_a_time(
    weights: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbotriton.backend.runner.model_runner.SCORED_TOKENS", 7)
    (deltas,) = run(make_engine(weights), (PROMPT, asked(0, 1)))
    assert_scored(deltas, expected, 0)


def test_a_cached_prompt_is_computed_again_and_others_go_on_beside_it(weights: Path, expected: torch.Tensor) -> None:
    engine = make_engine(weights, num_tokens_per_iter="8")
    plain = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    (before,) = run(engine, (PROMPT, plain))
    beside, scored, again = run(engine, (PROMPT, plain), (PROMPT, asked(2, 3)), ((1, 5), asked(1, 2)))
    assert_scored(scored, expected, 2)
    assert scored[-1].num_cached_tokens == 0
    assert beside[-1].num_cached_tokens > 0
    tokens = [[token for delta in deltas for token in delta.token_ids] for deltas in (before, beside, scored)]
    assert tokens[0] == tokens[1]
    assert tokens[2] == tokens[0][:3]
    assert len(again[0].prompt_logprobs) == 1


def test_they_come_once_when_the_request_is_preempted(weights: Path, expected: torch.Tensor) -> None:
    engine = make_engine(weights, cache_max_entry_count="14", session_len="56", enable_prefix_caching="0")
    found = run(engine, *[(PROMPT, asked(1, 24))] * 3)
    assert engine.stats().preemptions_total > 0
    for deltas in found:
        assert_scored(deltas, expected, 1)


def test_one_token_has_none(weights: Path) -> None:
    ((only,),) = run(make_engine(weights), ((5,), asked(2, 1)))
    assert only.prompt_logprobs == ()
    assert only.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("count", [-1, 1025, True, 1.5])
def test_a_wrong_count_is_refused(count: object) -> None:
    with pytest.raises(InvalidInputError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=count)  # type: ignore[arg-type]
