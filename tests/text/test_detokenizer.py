"""Text that grows token by token is the text of all tokens, and no part of it is ever a broken character."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.text.tokenizers import released_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from turbotriton.contract.errors import WorkspaceError
from turbotriton.text.detokenizer import REPLACEMENT, IncrementalDetokenizer, TextTokenizer

FOLDERS = ("mistral_v03", "internlm", "internlm2", "yi", "qwen2")

TEXTS = st.text(
    alphabet=st.one_of(
        st.characters(codec="utf-8", exclude_categories=["Cs", "Cn", "Co"], exclude_characters="\ufffd\u2581"),
        st.sampled_from(" \n\t,.aeßé中文🎉👩‍👧"),
    ),
    max_size=40,
)


def load(folder: Path) -> TextTokenizer:
    """Four releases share one vocabulary in qwen2."""
    return released_tokenizer(folder, "tokenizer_config.qwen2.json" if folder.name == "qwen2" else None)


def pushed(tokenizer: TextTokenizer, ids: list[int], **options: object) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, **options)  # type: ignore[arg-type]
    return [*(stream.push([token_id]) for token_id in ids), stream.flush()]


@pytest.mark.parametrize("name", FOLDERS)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_deltas_join_to_the_whole_and_hold_no_broken_character(assets: Path, name: str, text: str) -> None:
    tokenizer = load(assets / "tokenizers" / name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    deltas = pushed(tokenizer, ids)
    assert "".join(deltas) == whole
    if REPLACEMENT not in whole:
        assert not any(REPLACEMENT in delta for delta in deltas)


@pytest.mark.parametrize("name", FOLDERS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ids_split_anywhere_give_one_text(assets: Path, name: str, data: st.DataObject) -> None:
    """A model may draw any token: however the ids are cut into pushes, the same text comes out, and it ends."""
    tokenizer = load(assets / "tokenizers" / name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    cut = data.draw(st.integers(0, len(ids)))
    stream = IncrementalDetokenizer(tokenizer)
    in_two = stream.push(ids[:cut]) + stream.push(ids[cut:]) + stream.flush()
    assert in_two == "".join(pushed(tokenizer, ids))


@pytest.mark.parametrize("name", ["mistral_v03", "internlm2", "yi"])
def test_the_space_after_a_prompt_is_kept(assets: Path, name: str) -> None:
    tokenizer = load(assets / "tokenizers" / name)
    prompt = tokenizer.encode("Once upon a", add_special_tokens=False)
    ids = tokenizer.encode("Once upon a time", add_special_tokens=False)
    assert ids[: len(prompt)] == prompt
    assert "".join(pushed(tokenizer, ids[len(prompt) :], prompt_ids=prompt)) == " time"


def byte_tokenizer(folder: Path) -> TextTokenizer:
    """256 byte tokens and one special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextTokenizer.load(folder)


def test_a_character_comes_out_with_its_last_byte(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    assert pushed(tokenizer, tokenizer.encode("é🎉")) == ["", "é", "", "", "", "🎉", ""]


def test_bytes_that_never_become_a_character_come_at_the_end(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    ids = tokenizer.encode("ok🎉")[:-1]
    assert pushed(tokenizer, ids) == ["o", "k", "", "", "", REPLACEMENT]


def test_special_tokens_are_left_out_or_shown(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    ids = [*tokenizer.encode("a"), 256, *tokenizer.encode("b")]
    assert "".join(pushed(tokenizer, ids)) == "ab"
    assert "".join(pushed(tokenizer, ids, skip_special_tokens=False)) == "a<|end|>b"


def test_ids_outside_the_vocabulary_give_nothing(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    assert tokenizer.decode([300, *tokenizer.encode("a"), -1]) == "a"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"tokenizer\.json is missing"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WorkspaceError, match="cannot be read"):
        TextTokenizer.load(tmp_path)
