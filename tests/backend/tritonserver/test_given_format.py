"""TURBOTRITON_CHAT_TEMPLATE: the text door makes of messages what the pipeline makes of them with the same ChatTemplateConfig."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.backend.tritonserver.fake_pb_utils import Request, strings

from turbotriton.contract.chat_templates import ChatTemplateConfig
from turbotriton.contract.errors import InvalidInputError
from turbotriton.demo import checkpoint_path
from turbotriton.text.chat_template import ChatTemplate
from turbotriton.text.detokenizer import TextTokenizer
from turbotriton.text.prompt_format import choose_format

TOKENIZER = TextTokenizer.load(checkpoint_path())
MESSAGES = [
    {"role": "user", "content": "Hi <|im_end|>"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "Hm"},
]
INI = """[llama]
model_name = {name}
tensor_para_size = 1
head_num = 2
kv_head_num = 2
attn_bias = 0
session_len = 64
size_per_head = 64
vocab_size = 512
num_layer = 1
rotary_embedding = 64
inter_size = 128
norm_eps = 1e-6
start_id = 1
end_id = 2
weight_type = fp16
"""


def read(
    monkeypatch: pytest.MonkeyPatch, folder: Path, config: ChatTemplateConfig | None, name: str = "demo", **inputs: Any
) -> Any:
    from turbotriton.backend.tritonserver.text_request import given_format, read_text_request

    (folder / "config.ini").write_text(INI.format(name=name))
    if config is None:
        monkeypatch.delenv("TURBOTRITON_CHAT_TEMPLATE", raising=False)
    else:
        monkeypatch.setenv("TURBOTRITON_CHAT_TEMPLATE", config.to_json())
    assert TOKENIZER.chat_template is not None
    request = Request({"messages": strings(json.dumps(MESSAGES)), **{key: strings(value) for key, value in inputs.items()}})
    template = ChatTemplate(TOKENIZER.chat_template, TOKENIZER.bos_token, TOKENIZER.eos_token)
    return read_text_request(request, TOKENIZER, template, given_format(TOKENIZER, folder))


@pytest.mark.parametrize(
    "config",
    [
        ChatTemplateConfig(meta_instruction="Be brief."),
        ChatTemplateConfig(model_name="llama3"),
        ChatTemplateConfig(user="Q: ", eoh="\n", assistant="A:", stop_words=["\n"], meta_instruction="Short."),
        ChatTemplateConfig(capability="completion"),
        ChatTemplateConfig(capability="python"),
    ],
    ids=lambda config: config.to_json(),
)
def test_messages_become_what_the_pipeline_makes_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: ChatTemplateConfig
) -> None:
    found = read(monkeypatch, tmp_path, config)
    expected = choose_format(TOKENIZER, config=config)
    assert list(found.prompt_ids) == expected.encode_messages(MESSAGES)
    assert found.stop_words == expected.stop_words
    assert list(found.prompt_ids) != list(read(monkeypatch, tmp_path, None).prompt_ids)


def test_infilling_is_of_the_last_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "def f():<FILL>return x"}]
    found = read(monkeypatch, tmp_path, ChatTemplateConfig(capability="infilling"), "codellama", messages=json.dumps(messages))
    assert TOKENIZER.decode(list(found.prompt_ids), skip_special_tokens=False).startswith("<PRE> def f():")
    assert "<EOT>" in found.stop_words


def test_stop_words_of_the_request_come_first_and_text_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = ChatTemplateConfig(model_name="llama3")
    assert read(monkeypatch, tmp_path, config, stop_words="mine").stop_words == ("mine", "<|eot_id|>", "<|end_of_text|>")


def test_tools_go_to_the_models_own_template_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = json.dumps({"tools": []})
    read(monkeypatch, tmp_path, ChatTemplateConfig(meta_instruction="x"), chat_template_kwargs=options)
    with pytest.raises(InvalidInputError, match="'tools' is for the model's own template"):
        read(monkeypatch, tmp_path, ChatTemplateConfig(model_name="llama3"), chat_template_kwargs=options)
