"""The generator, the split and the tokenizer of the demo model: no checkpoint needed."""

import random
import re

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from turbotriton.demo.training import splits
from turbotriton.demo.training.corpus import KINDS, Example, draw, sample
from turbotriton.demo.training.examples import TEMPLATE_WORDS
from turbotriton.demo.training.muon import orthogonalised
from turbotriton.demo.training.pool import build_pool, draw_batch, target_ids
from turbotriton.demo.training.tokenizer import CHAT_TEMPLATE, VOCAB_SIZE, build_tokenizer, render


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


def split_of_key(key: str) -> str:
    """The split that a key of an example names, found again from the key alone."""
    name, _, value = key.partition(" ")
    if name == "pair":
        low, high = map(int, value.split())
        return splits.split_of_pair(low, high)
    if name == "number":
        return splits.split_of_number(int(value))
    if name == "list":
        return splits.split_of_numbers([int(number) for number in value.split()])
    return "train" if name == "word" and value in TEMPLATE_WORDS else splits.split_of_text(value)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_operand_and_word_of_an_example_belongs_to_its_split(kind: str, split: splits.Split) -> None:
    rng = random.Random(5)
    for _ in range(100):
        example = draw(kind, split, rng)
        assert example.keys
        assert {split_of_key(key) for key in example.keys} == {split}, example


def test_held_out_questions_share_no_operand_pair_and_no_word_with_training() -> None:
    trained = frozenset().union(*(example.keys for example in sample("train", 800, seed=1)))
    held_out = frozenset().union(*(example.keys for example in sample("test", 100, seed=1)))
    assert len(held_out) > 800
    assert not trained & held_out


def test_no_held_out_word_occurs_anywhere_in_a_training_conversation() -> None:
    held_out = {key[5:] for example in sample("test", 100, seed=1) for key in example.keys if key.startswith("word ")}
    for example in sample("train", 200, seed=2):
        spoken = set(re.findall(r"[a-z]+", " ".join(content for _, content in example.messages).lower()))
        letters_alone = {word for word in spoken if len(word) == 1}
        assert not (spoken - letters_alone) & held_out, example


@pytest.mark.parametrize(
    ("kind", "operation"), [("addition", lambda a, b: a + b), ("subtraction", lambda a, b: a - b), ("comparison", max)]
)
def test_sums_differences_and_comparisons_are_true(kind: str, operation: object) -> None:
    rng = random.Random(2)
    for _ in range(300):
        example = draw(kind, "train", rng)
        (key,) = example.keys
        low, high = map(int, key.split()[1:])
        answer = example.accepted[0]
        if kind == "comparison":
            smaller, larger = (high, low) if answer.startswith(f"{high} is larger") else (low, high)
            assert low == high or "larger" not in answer or (smaller, larger) == (high, low)
            assert low == high or "smaller" not in answer or answer.startswith(f"{low} is smaller than {high}")
        else:
            assert callable(operation)
            assert int(answer.rstrip(".").split()[-1]) == operation(high, low)
            for left, result in re.findall(r"([\d +-]+) = (\d+)", answer):  # every step of the working is true, too
                total = sum(int(term.replace(" ", "")) for term in re.findall(r"(?:- )?\d+", left))
                assert total == int(result), answer


def test_a_wrong_answer_is_not_right() -> None:
    for example in sample("test", 3, seed=3):
        assert example.is_right(example.accepted[0])
        assert not example.is_right(example.accepted[0] + "x")
        assert not example.is_right("")


def test_tokenizer_keeps_digits_and_spelled_words_in_single_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.encode("What is 12").tokens == ["What", "Ġis", "Ġ", "1", "2"]
    assert tokenizer.encode(" giraffe").tokens == ["Ġ", *"giraffe"]
    for example in sample("test", 20, seed=4):
        for key in example.keys:
            if key.startswith("word ") and key[5:].isascii():
                assert tokenizer.encode(key[5:]).tokens == list(key[5:]), key


@pytest.mark.parametrize("text", ["héllo 😀\n\n  日本 \t x", "".join(map(chr, range(1, 0x250))), "", "a" * 500, "12 + 30 = 42."])
def test_tokenizer_gives_any_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_jinja_template_renders_what_the_corpus_trains_on() -> None:
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    messages = (("system", "Be kind."), ("user", "Hi {{ x }}"), ("assistant", "Hello!"), ("user", "Bye"))
    as_dicts = [{"role": role, "content": content} for role, content in messages]
    assert template.render(messages=as_dicts, add_generation_prompt=True) == render(messages, add_generation_prompt=True)
    assert template.render(messages=as_dicts, add_generation_prompt=False) == render(messages)


def test_batch_rows_are_whole_conversations_and_targets_are_the_assistants_words(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    pool = build_pool(tokenizer, 200, "cpu", num_workers=1, seed=1)
    ids = draw_batch(pool, dict.fromkeys(KINDS, 1.0), num_rows=6, row_len=256)
    targets = target_ids(ids, tokenizer.token_to_id("assistant"))
    assert ids.shape == targets.shape == (6, 256)
    for row, target in zip(ids.tolist(), targets.tolist(), strict=True):
        text = tokenizer.decode(row, skip_special_tokens=False).replace("<|endoftext|>", "")
        said = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)\n", text, flags=re.DOTALL)
        assert text.startswith("<|im_start|>")
        assert text.endswith("<|im_end|>\n")
        assert said
        assert tokenizer.decode([token for token in target if token >= 0], skip_special_tokens=False) == "".join(said)


def test_orthogonalised_update_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(3, 64, 64)))
    assert singular.median() > 0.6
    assert singular.max() < 1.3


def test_prompt_ends_before_the_answer_that_is_checked() -> None:
    example = draw("follow-up", "train", random.Random(1))
    assert isinstance(example, Example)
    assert [role for role, _ in example.prompt] == ["user", "assistant", "user"]
