"""The rows of the template table: names, rendering, and that they agree with the templates that checkpoints bring."""

from pathlib import Path

import pytest
from tests.text.tokenizers import released_tokenizer

from turbotriton.contract.chat_templates import (
    ROWS,
    SYSTEM_TEXT,
    TemplateRow,
    find_template,
    guess_template_name,
    listed_template_names,
)
from turbotriton.contract.errors import InvalidInputError
from turbotriton.contract.row_jinja import row_jinja
from turbotriton.text.chat_template import ChatTemplate
from turbotriton.text.prompt_format import PromptFormat, choose_format
from turbotriton.text.row_template import RowTemplate

# fmt: off
V03 = [
    "baichuan2", "chatglm", "codellama", "dbrx", "deepseek", "deepseek-coder", "deepseek-vl", "falcon", "gemma",
    "internlm", "internlm2", "llama", "llama2", "mistral", "mixtral", "puyu", "qwen", "solar", "ultracm", "ultralm",
    "vicuna", "wizardlm", "yi", "yi-vl",
]
V04 = [
    "internlm-xcomposer2", "internlm-xcomposer2-4khd", "internvl-zh", "internvl-zh-hermes2", "llama3", "llava-chatml",
    "mini-gemini-vicuna",
]
# fmt: on
ONE = [{"role": "user", "content": "Q"}]
TWO = [*ONE, {"role": "assistant", "content": "A"}, {"role": "user", "content": "P"}]
WITH_SYSTEM = [{"role": "system", "content": "S"}, *TWO]

RENDERED = {
    "vicuna": f"{SYSTEM_TEXT} USER: Q ASSISTANT: A</s>USER: P ASSISTANT: ",
    "internlm": f"<|System|>:{SYSTEM_TEXT}\n<|User|>:Q\n<|Bot|>:A<eoa>\n<|User|>:P\n<|Bot|>:",
    "internlm2": f"<|im_start|>system\n{SYSTEM_TEXT}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n",
    "llama2": f"[INST] <<SYS>>\n{SYSTEM_TEXT}\n<</SYS>>\n\nQ [/INST] A</s><s>[INST] P [/INST] ",
    "codellama": "[INST] <<SYS>>\n\n<</SYS>>\n\nQ [/INST] A</s><s>[INST] P [/INST] ",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "A<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nP<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatglm": "[Round 1]\n\n问：Q\n\n答：A\n\n[Round 2]\n\n问：P\n\n答：",
    "solar": "### System:\n\n\n### User:\nQ\n\n### Assistant:\nA### User:\nP\n\n### Assistant:\n",
    "ultracm": f"User: {SYSTEM_TEXT}</s>\nUser: Q</s>\nAssistant: A</s>\nUser: P</s>\nAssistant: ",
    "mistral": "[INST] Q [/INST]A</s>[INST] P [/INST]",
    "gemma": "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>user\nP<end_of_turn>\n"
    "<start_of_turn>model\n",
    "deepseek": "User: Q\n\nAssistant: A<｜end▁of▁sentence｜>User: P\n\nAssistant:",
    "baichuan2": "<reserved_106>Q<reserved_107>A<reserved_106>P<reserved_107>",
    "puyu": "QAP",
}

#: row, tokenizer folder, its tokenizer_config.json there
RELEASED = [
    ("qwen", "qwen2", "tokenizer_config.qwen2.json"),
    ("qwen", "qwen2", "tokenizer_config.qwen1_5.json"),
    ("internlm2", "internlm2", None),
    ("yi", "yi", None),
]


def test_the_names_are_those_of_both_releases() -> None:
    assert listed_template_names() == sorted(V03 + V04)
    assert len(V03) == 24


def test_no_name_stands_for_two_rows() -> None:
    names = [name for row in ROWS for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", RENDERED)
def test_a_conversation_by_its_markers(name: str) -> None:
    row = find_template(name)
    assert row is not None
    assert RowTemplate(row).render(TWO) == RENDERED[name]


def test_a_system_message_takes_the_place_of_the_rows_own() -> None:
    text = RowTemplate(find_template("llama2")).render(WITH_SYSTEM)  # type: ignore[arg-type]
    assert text == "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A</s><s>[INST] P [/INST] "


def test_a_role_that_the_markers_cannot_say_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"messages\[1\].role is 'tool'.*'yi'"):
        RowTemplate(find_template("yi")).render([*ONE, {"role": "tool", "content": "x"}])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("internlm/internlm2-chat-7b", "internlm2"),
        ("internlm/internlm-chat-7b", "internlm"),
        ("internlm/internlm-chat-7b-8k", None),
        ("/models/Llama-2-7b-chat-hf", "llama2"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("codellama/CodeLlama-7b-hf", "codellama"),
        ("Qwen/Qwen1.5-7B-Chat", "qwen"),
        ("01-ai/Yi-34B-Chat", "yi"),
        ("01-ai/Yi-VL-6B", "yi-vl"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral"),
        ("mistralai/Mistral-7B-v0.1", None),
        ("deepseek-ai/deepseek-llm-7b-chat", "deepseek"),
        ("deepseek-ai/deepseek-vl-7b-chat", "deepseek-vl"),
        ("deepseek-ai/deepseek-coder-6.7b-instruct", "deepseek-coder"),
        ("OpenGVLab/InternVL-Chat-Chinese-V1-2", "internvl-zh-hermes2"),
        ("internlm/internlm-xcomposer2-4khd-7b", "internlm-xcomposer2-4khd"),
        ("/home/yifan/models/falcon-7b", "falcon"),
        ("/home/qwen/my-model", "qwen"),
        ("somebody/something", None),
    ],
)
def test_a_path_stands_for_a_row(path: str, name: str | None) -> None:
    assert guess_template_name("", path) == name


def test_the_models_name_goes_before_its_path() -> None:
    assert guess_template_name("internlm2-chat-7b", "Qwen/Qwen1.5-7B-Chat") == "internlm2"


def formats(assets: Path, row: str, folder: str, config: str | None) -> tuple[PromptFormat, PromptFormat]:
    """(by the row, by the checkpoint's own template)"""
    tokenizer = released_tokenizer(assets / "tokenizers" / folder, config)
    return choose_format(tokenizer, template_name=row), choose_format(tokenizer, guessed_name=row)


@pytest.mark.parametrize(("row", "folder", "config"), RELEASED)
@pytest.mark.parametrize("messages", [WITH_SYSTEM, WITH_SYSTEM[:2]])
def test_row_and_released_template_give_the_same_ids(
    assets: Path, row: str, folder: str, config: str | None, messages: list
) -> None:
    by_row, by_template = formats(assets, row, folder, config)
    assert by_row.name == row
    assert by_template.name == "the checkpoint's own template"
    assert by_row.encode_messages(messages) == by_template.encode_messages(messages)


def test_qwens_opening_is_the_one_it_was_released_with(assets: Path) -> None:
    by_row, by_template = formats(assets, "qwen", "qwen2", "tokenizer_config.qwen2.json")
    assert by_row.encode_prompt("Q") == by_template.encode_prompt("Q")


def test_mistrals_markers_are_the_released_ones_but_for_spaces(assets: Path) -> None:
    """The third release, whose tokenizer this is, writes no space before [/INST] and one before an answer; the table's is the first's."""
    tokenizer = released_tokenizer(assets / "tokenizers/mistral_v03", None)
    assert tokenizer.chat_template is not None
    own = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token).render(TWO)
    by_row = "<s>" + RowTemplate(find_template("mistral")).render(TWO)  # type: ignore[arg-type]
    assert by_row.replace(" ", "") == own.replace(" ", "")


@pytest.mark.parametrize("row", [row for row in ROWS if row.capability == "chat"], ids=lambda row: row.name)
@pytest.mark.parametrize("messages", [ONE, TWO, WITH_SYSTEM], ids=["one", "two", "system"])
def test_a_row_as_jinja_renders_alike(row: TemplateRow, messages: list[dict[str, str]]) -> None:
    for ask in (True, False):
        wanted = RowTemplate(row).render(messages, add_generation_prompt=ask)
        assert ChatTemplate(row_jinja(row, adds_bos=False)).render(messages, add_generation_prompt=ask) == wanted
        with_bos = ChatTemplate(row_jinja(row, adds_bos=True), "<|begin_of_text|>").render(messages, add_generation_prompt=ask)
        assert with_bos == (wanted if row.begin else "<|begin_of_text|>" + wanted)


def test_a_row_as_jinja_keeps_contents_as_they_are_and_refuses_other_roles() -> None:
    row = find_template("llama2")
    assert row is not None
    template = ChatTemplate(row_jinja(row, adds_bos=False))
    content = "BEGIN {{ 1 + 1 }} 'quoted' \\n {% raw %}"
    assert content in template.render([{"role": "user", "content": content}])
    with pytest.raises(InvalidInputError, match="knows system, user and assistant"):
        template.render([{"role": "tool", "content": "42"}])
