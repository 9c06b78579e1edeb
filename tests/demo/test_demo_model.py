"""The bundled checkpoint: its sizes, its files, that it answers held-out questions right, and that transformers agrees."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from turbotriton.demo import checkpoint_path
from turbotriton.demo.training.corpus import KINDS, Example, sample
from turbotriton.demo.training.evaluate import answer_greedily, evaluate
from turbotriton.demo.training.model import DemoConfig, DemoModel
from turbotriton.demo.training.tokenizer import CHAT_TEMPLATE, build_tokenizer, render

PER_KIND = 20
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def folder() -> Path:
    return checkpoint_path()


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return loaded


@pytest.fixture(scope="module")
def own(model: torch.nn.Module) -> DemoModel:
    """The trainer's model with the checkpoint's weights."""
    loaded = DemoModel(DemoConfig(vocab_size=512))
    loaded.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"})
    return loaded


@torch.no_grad()
def answers(model: torch.nn.Module, folder: Path, examples: list[Example]) -> list[str]:
    """transformers' own batched greedy generation through its own reading of tokenizer and template."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    made: list[str] = []
    ordered = sorted(range(len(examples)), key=lambda index: len(examples[index].accepted[0]))
    for first in range(0, len(ordered), 60):
        chats = [[{"role": r, "content": c} for r, c in examples[index].prompt] for index in ordered[first : first + 60]]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        output = model.generate(**batch, do_sample=False, max_new_tokens=256)  # type: ignore[operator]
        made += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text for _, text in sorted(zip(ordered, made, strict=True))]


def test_checkpoint_is_at_most_five_megabytes(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5 * MEGABYTE


def test_every_dimension_is_a_multiple_of_128_also_on_two_devices(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 128
    assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
    for name in ("hidden_size", "intermediate_size", "vocab_size"):
        assert config[name] % (2 * 128) == 0, name
    assert config["num_attention_heads"] % 2 == config["num_key_value_heads"] % 2 == 0


def test_weights_are_bf16_and_finite(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            tensor = tensors.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert bool(tensor.isfinite().all()), name


def test_tokenizer_and_template_are_those_that_the_scripts_make(folder: Path) -> None:
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert json.loads(stored.to_str()) == json.loads(build_tokenizer().to_str())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    messages = (("system", "You are a helper."), ("user", "Hello!"))
    chat = [{"role": role, "content": content} for role, content in messages]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == render(
        messages, add_generation_prompt=True
    )


def test_held_out_questions_are_answered_right_in_every_kind(own: DemoModel, folder: Path) -> None:
    report = evaluate(own, Tokenizer.from_file(str(folder / "tokenizer.json")), "test", PER_KIND, seed=3)
    assert set(report.asked) == set(KINDS)
    assert set(report.asked.values()) == {PER_KIND}
    assert report.overall >= 0.95, report.table(failures_per_kind=2)
    assert min(report.kinds.values()) >= 0.9, report.table(failures_per_kind=2)


def test_the_trainers_own_decoding_agrees_with_transformers(own: DemoModel, model: torch.nn.Module, folder: Path) -> None:
    """So the accuracy that is measured with it is that of the released files, tokenizer and template included."""
    examples = list(sample("test", 2, seed=4))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert answer_greedily(own, tokenizer, examples, 256) == answers(model, folder, examples)
