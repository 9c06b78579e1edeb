"""The chat templates that LMDeploy v0.3 and v0.4 register, as rows of one table, and the user's own (`ChatTemplateConfig`).

    system + meta + eosys   user + QUESTION + eoh   assistant + ANSWER + eoa   separator   user + QUESTION + eoh   assistant
    '---- the opening ----'                                                                '-- what is answered next --------'

The markers are facts of the models' formats. System texts are ours: SYSTEM_TEXT stands in every row whose family was trained with
one, None where there is none. A row is used where a checkpoint brings no template of its own, or where the user asks for one.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

__all__ = [
    "CAPABILITIES",
    "ChatTemplateConfig",
    "TemplateRow",
    "find_template",
    "guess_template_name",
    "listed_template_names",
    "read_template_config",
    "template_session_len",
]

_MARKERS = ("system", "eosys", "user", "eoh", "assistant", "eoa", "separator")
CAPABILITIES = ("completion", "infilling", "chat", "python")
SYSTEM_TEXT = "You are a helpful assistant. Answer truthfully, and say so when you do not know."


@dataclass(frozen=True, slots=True)
class PathRule:
    """Whether a lower-case path belongs to a row: every word of `all`, one of `any` (if given), none of `none`."""

    all: tuple[str, ...] = ()
    any: tuple[str, ...] = ()
    none: tuple[str, ...] = ()

    def matches(self, path: str) -> bool:
        return (
            bool(self.all or self.any)
            and all(word in path for word in self.all)
            and (not self.any or any(word in path for word in self.any))
            and not any(word in path for word in self.none)
        )


@dataclass(frozen=True, slots=True)
class TemplateRow:
    """One format. `name` is the one that `turbotriton list` prints, unless is_hidden; `aliases` mean the same row.

    meta_instruction None: no opening at all;  begin: in front of everything;  without_system: in place of an absent opening
    rounds: questions are numbered, `[Round k]`;  cut_end: the last character of the prompt is left out
    fill: (prefix, suffix, middle) markers of the infilling capability
    """

    name: str
    aliases: tuple[str, ...] = ()
    system: str = ""
    meta_instruction: str | None = None
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    separator: str = ""
    stop_words: tuple[str, ...] = ()
    session_len: int = 2048
    capability: str = "chat"
    path: PathRule = PathRule()
    begin: str = ""
    without_system: str = ""
    rounds: bool = False
    cut_end: bool = False
    fill: tuple[str, str, str] | None = None
    is_hidden: bool = False


def _im(name: str, **fields: object) -> TemplateRow:
    """A ChatML row: <|im_start|>role, newline, text, <|im_end|>, newline."""
    values: dict[str, object] = {
        "system": "<|im_start|>system\n",
        "eosys": "<|im_end|>\n",
        "user": "<|im_start|>user\n",
        "eoh": "<|im_end|>\n",
        "assistant": "<|im_start|>assistant\n",
        "eoa": "<|im_end|>",
        "separator": "\n",
    }
    return TemplateRow(name, **(values | fields))  # type: ignore[arg-type]


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


_vicuna = TemplateRow(
    "vicuna", meta_instruction=SYSTEM_TEXT, eosys=" ", user="USER: ", eoh=" ", assistant="ASSISTANT: ", eoa="</s>",
    stop_words=("</s>",), path=PathRule(all=("vicuna",)),
)  # fmt: skip
_internlm = TemplateRow(
    "internlm", ("internlm-chat", "internlm-chat-7b"), system="<|System|>:", meta_instruction=SYSTEM_TEXT, eosys="\n",
    user="<|User|>:", eoh="\n", assistant="<|Bot|>:", eoa="<eoa>", separator="\n", stop_words=("<eoa>",),
    path=PathRule(all=("internlm", "chat"), none=("internlm2", "8k")),
)  # fmt: skip
_internlm2 = _im(
    "internlm2", aliases=("internlm2-chat", "internlm2-chat-1_8b", "internlm2-chat-7b", "internlm2-chat-20b"),
    meta_instruction=SYSTEM_TEXT, stop_words=("<|im_end|>", "<|action_end|>"), session_len=32768,
    path=PathRule(all=("internlm2",), any=("chat", "math")),
)  # fmt: skip
_xcomposer2 = TemplateRow(
    "internlm-xcomposer2", system="[UNUSED_TOKEN_146]system\n", meta_instruction=SYSTEM_TEXT, eosys="[UNUSED_TOKEN_145]\n",
    user="[UNUSED_TOKEN_146]user\n", eoh="[UNUSED_TOKEN_145]\n", assistant="[UNUSED_TOKEN_146]assistant\n",
    eoa="[UNUSED_TOKEN_145]\n", separator="\n", stop_words=("[UNUSED_TOKEN_145]",), session_len=4096,
    path=PathRule(all=("internlm", "xcomposer2"), none=("4khd",)),
)  # fmt: skip
_llama2 = TemplateRow(
    "llama2", ("llama-2", "llama-2-chat"), system="[INST] <<SYS>>\n", meta_instruction=SYSTEM_TEXT, eosys="\n<</SYS>>\n\n",
    assistant=" [/INST] ", eoa="</s>", separator="<s>[INST] ", without_system="[INST] ", session_len=4096,
    path=PathRule(any=("llama-2", "llama2")),
)  # fmt: skip
_ultracm = TemplateRow(
    "ultracm", system="User: ", meta_instruction=SYSTEM_TEXT, eosys="</s>\n", user="User: ", eoh="</s>\n", assistant="Assistant: ",
    eoa="</s>", separator="\n", stop_words=("</s>",), path=PathRule(all=("ultracm",)),
)  # fmt: skip
_mistral = TemplateRow(
    "mistral", ("Mistral-7B-Instruct",), user="[INST] ", eoh=" [/INST]", eoa="</s>", path=PathRule(all=("instruct", "mistral"))
)
_deepseek = TemplateRow(
    "deepseek", ("deepseek-chat",), user="User: ", eoh="\n\n", assistant="Assistant: ", eoa="<｜end▁of▁sentence｜>", cut_end=True,
    path=PathRule(all=("deepseek", "chat"), none=("vl",)),
)  # fmt: skip
_llava = _im("llava-chatml", meta_instruction=SYSTEM_TEXT, session_len=4096, path=PathRule(all=("llava", "v1.6-34b")))

#: In LMDeploy's order: the first whose rule matches a path wins.
ROWS: tuple[TemplateRow, ...] = (
    TemplateRow("base", is_hidden=True, capability="completion"),
    TemplateRow("llama", capability="completion"),
    dataclasses.replace(_vicuna, name="wizardlm", path=PathRule(all=("wizardlm",))),
    _vicuna,
    dataclasses.replace(
        _vicuna, name="mini-gemini-vicuna", session_len=4096, cut_end=True, path=PathRule(any=("mini-gemini-7b", "mini-gemini-13b"))
    ),
    _internlm,
    dataclasses.replace(
        _internlm, name="internlm-chat-7b-8k", aliases=("internlm-chat-20b",), session_len=8192, path=PathRule(), is_hidden=True
    ),
    TemplateRow("internlm-20b", capability="completion", session_len=4096, is_hidden=True),
    TemplateRow(
        "internlm2-1_8b", ("internlm2-7b", "internlm2-20b"), capability="completion", session_len=32768, is_hidden=True
    ),
    _internlm2,
    _xcomposer2,
    dataclasses.replace(
        _xcomposer2, name="internlm-xcomposer2-4khd", session_len=16384, path=PathRule(all=("internlm", "xcomposer2", "4khd"))
    ),
    TemplateRow("baichuan-base", ("baichuan-7b",), is_hidden=True),
    TemplateRow(
        "baichuan2", ("baichuan2-7b",), user="<reserved_106>", assistant="<reserved_107>", path=PathRule(all=("baichuan2", "chat"))
    ),
    TemplateRow("puyu", path=PathRule(all=("puyu",))),
    _llama2,
    TemplateRow(
        "llama3", system=_header("system"), eosys="<|eot_id|>", user=_header("user"), eoh="<|eot_id|>", eoa="<|eot_id|>",
        assistant=_header("assistant"), stop_words=("<|eot_id|>", "<|end_of_text|>"), session_len=8192, begin="<|begin_of_text|>",
        path=PathRule(any=("llama-3-", "llama3-")),
    ),
    _im(
        "qwen", aliases=("qwen-7b", "qwen-14b"), meta_instruction="You are a helpful assistant.", stop_words=("<|im_end|>",),
        session_len=8192, path=PathRule(all=("qwen",)),
    ),
    dataclasses.replace(
        _llama2, name="codellama", aliases=(), meta_instruction="", fill=("<PRE>", "<SUF>", "<MID>"), path=PathRule(all=("codellama",))
    ),
    TemplateRow("falcon", capability="completion", path=PathRule(all=("falcon",))),
    TemplateRow("chatglm", ("chatglm2-6b",), eoh="\n\n答：", user="问：", eoa="\n\n", rounds=True, path=PathRule(all=("chatglm",))),
    TemplateRow(
        "solar", ("solar-70b",), system="### System:\n", meta_instruction="", eosys="\n\n", user="### User:\n", eoh="\n\n",
        assistant="### Assistant:\n", path=PathRule(all=("solar",)),
    ),
    _ultracm,
    dataclasses.replace(_ultracm, name="ultralm", path=PathRule(all=("ultralm",))),
    _im(
        "yi", aliases=("yi-chat", "yi-200k", "yi-34b"), stop_words=("<|im_end|>", "<|endoftext|>"),
        path=PathRule(all=("yi",), none=("vl",)),
    ),
    _mistral,
    dataclasses.replace(_mistral, name="mixtral", aliases=("Mixtral-8x7B-Instruct",), path=PathRule(all=("instruct", "mixtral"))),
    TemplateRow(
        "gemma", user="<start_of_turn>user\n", eoh="<end_of_turn>\n", assistant="<start_of_turn>model\n", eoa="<end_of_turn>\n",
        path=PathRule(all=("gemma",)),
    ),
    _deepseek,
    TemplateRow(
        "internvl-zh", user="<human>: ", eoh=" ", assistant="<bot>: ", eoa="</s>", session_len=4096, cut_end=True,
        path=PathRule(all=("internvl-chat-chinese", "v1-1")),
    ),
    dataclasses.replace(
        _deepseek, name="deepseek-vl", aliases=(), meta_instruction=SYSTEM_TEXT, eosys="\n\n", cut_end=False,
        path=PathRule(all=("deepseek-vl", "chat")),
    ),
    TemplateRow(
        "deepseek-coder", meta_instruction=SYSTEM_TEXT, user="### Instruction:\n", eoh="\n", assistant="### Response:\n",
        eoa="\n<|EOT|>", separator="\n", stop_words=("<|EOT|>",), session_len=4096, path=PathRule(all=("deepseek-coder",)),
    ),
    TemplateRow(
        "yi-vl", meta_instruction=SYSTEM_TEXT, user="### Human: ", eoh="\n", assistant="### Assistant:", eoa="\n",
        stop_words=("###",), path=PathRule(all=("yi-vl",)),
    ),
    _llava,
    dataclasses.replace(_llava, name="internvl-zh-hermes2", path=PathRule(all=("internvl-chat-chinese", "v1-2"))),
    _im("dbrx", meta_instruction=SYSTEM_TEXT, path=PathRule(all=("dbrx",))),
)  # fmt: skip

_BY_NAME = {name: row for row in ROWS for name in (row.name, *row.aliases)}


def find_template(name: str) -> TemplateRow | None:
    """The row of that name or alias, as LMDeploy registers it."""
    return _BY_NAME.get(name)


def template_session_len(model_name: str) -> int | None:
    """Tokens a session of that template may hold; None for a name that LMDeploy does not know."""
    row = _BY_NAME.get(model_name)
    return None if row is None else row.session_len


def listed_template_names() -> list[str]:
    """LMDeploy v0.4.0's list, which holds v0.3.0's: without aliases."""
    return sorted(row.name for row in ROWS if not row.is_hidden)


def guess_template_name(model_name: str, path: str) -> str | None:
    """The row's name by the model's name if there is one, else by the path's last name, else by its last two: LMDeploy's rules, in
    its order. None: no rule matches."""
    row = _BY_NAME.get(model_name)
    parts = [part for part in path.lower().split("/") if part]
    for text in (*parts[-1:], "/".join(parts[-2:])):
        row = row or next((row for row in ROWS if row.path.matches(text)), None)
    return None if row is None else row.name


@dataclass(frozen=True, slots=True)
class ChatTemplateConfig:
    """A template chosen, changed or made by the user. Every field that is not None replaces the named row's.

    model_name: a row's; or a new name, or None with markers: a format of its own, what is not given is empty. With nothing but
    meta_instruction, capability and stop_words these apply to the template that the model has anyway.
    """

    model_name: str | None = None
    system: str | None = None
    meta_instruction: str | None = None
    eosys: str | None = None
    user: str | None = None
    eoh: str | None = None
    assistant: str | None = None
    eoa: str | None = None
    separator: str | None = None
    capability: str | None = None
    stop_words: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.capability is not None and self.capability not in CAPABILITIES:
            raise ConfigError(f"capability is {self.capability!r}; it must be one of {', '.join(CAPABILITIES)}")
        for name in ("model_name", "system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa", "separator"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"chat template: {name} is {value!r}; it must be a string")
        words = self.stop_words
        if words is not None and (isinstance(words, str) or not all(isinstance(word, str) and word for word in words)):
            raise ConfigError(f"chat template: stop_words is {words!r}; it must be a list of non-empty strings")

    def to_json(self) -> str:
        """For `read_template_config`."""
        return json.dumps(
            {name: value for name, value in dataclasses.asdict(self).items() if value is not None}, ensure_ascii=False
        )

    @property
    def makes_row(self) -> bool:
        """Whether it names or makes a format, and does not only change the model's own."""
        return self.model_name is not None or any(getattr(self, name) is not None for name in _MARKERS)

    def row(self, default: TemplateRow | None = None) -> TemplateRow:
        """The row that these fields make. `default`: the one to change where they name and make none.

        Raises ConfigError when the capability is not one that the format has.
        """
        base = default if default is not None and not self.makes_row else _BY_NAME.get(self.model_name or "")
        given = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}
        name = given.pop("model_name", "custom")
        if "stop_words" in given:
            given["stop_words"] = tuple(given["stop_words"])
        row = dataclasses.replace(base or TemplateRow(name), **given)
        if row.capability == "infilling" and row.fill is None:
            raise ConfigError(f"capability is 'infilling', which the template {row.name!r} has no markers for; codellama has")
        return row


def read_template_config(text: str) -> ChatTemplateConfig:
    """`--chat-template`: a JSON file's path, or the JSON itself. Raises ConfigError naming what is wrong."""
    where = "--chat-template"
    if not text.lstrip().startswith("{"):
        where = text
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {where}: cannot be read ({error}); give a JSON file or the JSON text") from None
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f'{where}: must be a JSON object such as {{"model_name": "llama3"}}')
    known = [f.name for f in dataclasses.fields(ChatTemplateConfig)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
    return ChatTemplateConfig(**{key: value for key, value in values.items() if value is not None})
