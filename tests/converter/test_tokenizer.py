"""tokenizer.json of every source: the ids of SentencePiece and tiktoken, the special tokens and prefix space of each family."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tokenizers import Tokenizer, pre_tokenizers

from turbotriton.contract.errors import CheckpointError
from turbotriton.converter.tokenizer import write_tokenizer
from turbotriton.converter.tokenizer.from_tiktoken import LLAMA3, QWEN
from turbotriton.text.chat_template import ChatTemplate
from turbotriton.text.detokenizer import TextTokenizer

SENTENCEPIECE = ("internlm", "internlm2", "yi", "mistral_v03")


def texts(assets: Path) -> list[str]:
    """Real text: encyclopedia lines (whose "<unk>" is no token) and chat questions with code, tables and other languages."""
    wiki = (assets / "text/wikitext-2/valid.txt").read_text().split("\n")[:120]
    chat = [json.loads(line)["turns"][0] for line in (assets / "text/mt_bench_question.jsonl").read_text().splitlines()]
    return [line.replace("<unk>", "unk").strip() for line in wiki if line.strip()] + chat


@pytest.fixture(scope="module")
def sentencepiece_folders(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tokenizer, Any]]:
    """By name: checkpoint folder, converted tokenizer, `write_tokenizer`'s result. Converted once: it takes seconds."""
    found = {}
    for name in SENTENCEPIECE:
        root = tmp_path_factory.mktemp(name)
        folder = source(assets, name, root / "m")
        found[name] = (folder, *written(folder, root / "t"))
    return found


def source(assets: Path, name: str, folder: Path) -> Path:
    """A checkpoint folder with that tokenizer's SentencePiece file and configuration, without tokenizer.json."""
    folder.mkdir()
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        if (assets / "tokenizers" / name / file).exists():
            shutil.copyfile(assets / "tokenizers" / name / file, folder / file)
    return folder


def written(folder: Path, target: Path, tokenizer_path: Path | None = None) -> tuple[Tokenizer, Any]:
    result = write_tokenizer(folder, tokenizer_path, target, copy_code=False)
    return Tokenizer.from_file(str(target / "tokenizer.json")), result


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_ids_and_back(assets: Path, sentencepiece_folders: Any, name: str) -> None:
    folder, tokenizer, _ = sentencepiece_folders[name]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in texts(assets):
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.get_vocab_size() >= reference.vocab_size()
    for i in range(0, 300):
        assert tokenizer.token_to_id(tokenizer.id_to_token(i)) == i


def test_stories_tokenizer_model_gives_its_own_tokenizer_json(assets: Path, tmp_path: Path) -> None:
    released = assets / "models/stories260K"
    folder = tmp_path / "m"
    folder.mkdir()
    shutil.copyfile(released / "tokenizer.model", folder / "tokenizer.model")
    tokenizer, result = written(folder, tmp_path / "t")
    expected = Tokenizer.from_file(str(released / "tokenizer.json"))
    for text in ["Once upon a time, there was a little girl named Lily.", "ü 你好 👍", *texts(assets)[:50]]:
        assert tokenizer.encode(text).ids == expected.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert (result.bos_token_id, result.eos_token_id, result.chat_template) == (1, 2, None)


@pytest.mark.parametrize(
    ("name", "bos", "eos", "prefixed"),
    [("internlm", 1, 2, True), ("internlm2", 1, 2, True), ("yi", 1, 2, False), ("mistral_v03", 1, 2, True)],
)
def test_bos_is_added_where_the_configuration_says(
    sentencepiece_folders: Any, name: str, bos: int, eos: int, prefixed: bool
) -> None:
    _, tokenizer, result = sentencepiece_folders[name]
    plain = tokenizer.encode("hello", add_special_tokens=False).ids
    assert tokenizer.encode("hello").ids == ([bos, *plain] if prefixed else plain)
    assert (result.bos_token_id, result.eos_token_id) == (bos, eos)


def test_special_tokens_are_single_ids_even_where_the_model_calls_them_unused(sentencepiece_folders: Any) -> None:
    _, tokenizer, result = sentencepiece_folders["internlm2"]
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>", add_special_tokens=False).ids
    assert (ids[0], ids[-1]) == (92543, 92542)
    assert tokenizer.decode(ids) == "user\nhi"
    assert result.chat_template is not None
    folder, internlm, _ = sentencepiece_folders["internlm"]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert internlm.encode("<|User|>:hi<eoh>", add_special_tokens=False).ids == reference.encode("<|User|>:hi<eoh>")


def test_mistrals_ids_around_special_tokens_are_those_of_its_released_tokenizer_json(
    assets: Path, sentencepiece_folders: Any
) -> None:
    """legacy: false puts the prefix space before the first stretch of text only."""
    released = Tokenizer.from_file(str(assets / "tokenizers/mistral_v03/tokenizer.json"))
    for text in ("[INST] hello [/INST] world</s>", "hello [INST]hi", "<s>[INST] a  b[/INST]", "plain"):
        assert sentencepiece_folders["mistral_v03"][1].encode(text).ids == released.encode(text).ids


@pytest.fixture(scope="module")
def qwen_ranks(assets: Path) -> dict[bytes, int]:
    """Qwen's ranks are Qwen2's vocab.json with its printable stand-ins turned back into bytes."""
    vocab = json.loads((assets / "tokenizers/qwen2/vocab.json").read_text())
    stand_ins = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, ord(c)))
    printable = [c for c in stand_ins if ord(c) < 256]
    others = [b for b in range(256) if chr(b) not in printable]
    to_byte = {c: ord(c) for c in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return {bytes(to_byte[c] for c in token): rank for token, rank in vocab.items()}


def test_qwen_tiktoken_ids_and_back(assets: Path, tmp_path: Path, qwen_ranks: dict[bytes, int]) -> None:
    ranks = qwen_ranks
    folder = tmp_path / "m"
    folder.mkdir()
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    tokenizer, result = written(folder, tmp_path / "t")
    special = {token: 151643 + i for i, token in enumerate(QWEN.special_tokens)}
    reference = tiktoken.Encoding("qwen", pat_str=QWEN.pattern, mergeable_ranks=ranks, special_tokens=special)
    for text in [*texts(assets), "<|im_start|>user\n你好<|im_end|>\n"]:
        ids = reference.encode(text, allowed_special="all")
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (result.bos_token_id, result.eos_token_id) == (None, 151643)
    assert tokenizer.get_vocab_size() == 151643 + 208


def test_llama3s_tokenizer_model_of_ranks(assets: Path, tmp_path: Path, qwen_ranks: dict[bytes, int]) -> None:
    """Its first 128000 ranks would do; another family's, cut to that number, stand in for them."""
    ranks = {token: rank for token, rank in qwen_ranks.items() if rank < 128000}
    folder = tmp_path / "m"
    folder.mkdir()
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    tokenizer, result = written(folder, tmp_path / "t")
    reference = tiktoken.Encoding("llama3", pat_str=LLAMA3.pattern, mergeable_ranks=ranks, special_tokens={})
    for text in [*texts(assets), "1234567 e\u0301"]:
        assert tokenizer.encode(text).ids == [128000, *reference.encode(text, disallowed_special=())]
    ids = tokenizer.encode("<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", add_special_tokens=False).ids
    assert (ids[0], ids[2], ids[-1]) == (128006, 128007, 128009)
    assert (result.bos_token_id, result.eos_token_id, tokenizer.get_vocab_size()) == (128000, 128001, 128256)


@pytest.mark.parametrize("version", ["1_5", "3"])
def test_vocab_and_merges_of_qwen2(assets: Path, tmp_path: Path, version: str, qwen_ranks: dict[bytes, int]) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(assets / "tokenizers/qwen2" / file, folder / file)
    shutil.copyfile(assets / f"tokenizers/qwen2/tokenizer_config.qwen{version}.json", folder / "tokenizer_config.json")
    tokenizer, result = written(folder, tmp_path / "t")
    reference = tiktoken.Encoding("qwen", pat_str=QWEN.pattern, mergeable_ranks=qwen_ranks, special_tokens={})
    for text in texts(assets):
        assert tokenizer.encode(text).ids == reference.encode(text, disallowed_special=())
    assert tokenizer.encode("<|im_start|>a<|im_end|>").ids == [151644, 64, 151645]
    assert result.eos_token_id in (151643, 151645)


def test_a_given_file_replaces_the_checkpoints_tokenizer(assets: Path, llama: Path, tmp_path: Path) -> None:
    tokenizer, _ = written(llama, tmp_path / "t", assets / "models/stories260K/tokenizer.model")
    assert tokenizer.get_vocab_size() == 512
    folder, _ = written(llama, tmp_path / "t2", assets / "models/stories260K")
    assert folder.get_vocab_size() == 512


def test_configuration_is_completed_from_its_neighbours(llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    (llama / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<unk>", "eos_token": {"content": "</s>"}}))
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    _, result = written(llama, tmp_path / "t")
    assert (result.bos_token_id, result.eos_token_id, result.chat_template) == (1, 2, "{{ messages }}")
    config = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ({"content": "<s>"}, {"content": "</s>"})
    assert config["chat_template"] == "{{ messages }}"


def test_a_complete_configuration_is_copied_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    written(llama, tmp_path / "t")
    assert (tmp_path / "t/tokenizer_config.json").read_bytes() == (llama / "tokenizer_config.json").read_bytes()


def test_the_default_of_several_chat_templates(llama: Path, tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (llama / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": several}))
    assert written(llama, tmp_path / "t")[1].chat_template == "D"


def test_ids_that_would_differ_are_refused(assets: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "encode", lambda self, text: [0])
    (llama / "tokenizer.json").unlink()
    shutil.copyfile(assets / "models/stories260K/tokenizer.model", llama / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: cannot be converted.*'Hello, world!' expected ids \[0\]"):
        write_tokenizer(llama, None, tmp_path / "t", copy_code=False)


def test_a_model_that_sentencepiece_refuses_is_refused(assets: Path, llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer.json").unlink()
    raw = (assets / "models/stories260K/tokenizer.model").read_bytes()
    (llama / "tokenizer.model").write_bytes(raw.replace(b"<0x41>", b"<0x4_>"))
    with pytest.raises(CheckpointError, match=r"llama/tokenizer\.model: is no SentencePiece model .*<0x4_>"):
        write_tokenizer(llama, None, tmp_path / "t", copy_code=False)


@pytest.fixture
def bare_llama(llama: Path) -> Path:
    """A checkpoint without a chat template."""
    path = llama / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    return llama


def test_a_checkpoint_without_a_template_gets_that_of_its_row(bare_llama: Path, tmp_path: Path) -> None:
    """With BOS where the tokenizer adds it, and the row's stop words that are tokens."""
    result = write_tokenizer(bare_llama, None, tmp_path / "t", copy_code=False, template_name="ultracm")
    config = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    assert config["chat_template"] == result.chat_template
    assert result.stop_token_ids == (2,)  # </s>
    tokenizer = TextTokenizer.load(tmp_path / "t")
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert template.render(messages) == "<s>User: S</s>\nUser: Q</s>\nAssistant: "


@pytest.mark.parametrize("name", [None, "llama", "no-such-row"])
def test_no_row_and_rows_of_base_models_give_no_template(bare_llama: Path, tmp_path: Path, name: str | None) -> None:
    result = write_tokenizer(bare_llama, None, tmp_path / "t", copy_code=False, template_name=name)
    assert (result.chat_template, result.stop_token_ids) == (None, ())
    assert "chat_template" not in json.loads((tmp_path / "t/tokenizer_config.json").read_text())


def test_a_checkpoints_own_template_wins_over_the_row(llama: Path, tmp_path: Path) -> None:
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    result = write_tokenizer(llama, None, tmp_path / "t", copy_code=False, template_name="ultracm")
    assert (result.chat_template, result.stop_token_ids) == ("{{ messages }}", ())
