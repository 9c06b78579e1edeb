"""What a prompt or messages become before the model sees them: which template, which special tokens, which stop words.

1. a ChatTemplateConfig or template name that the user gave       the row's markers
2. the checkpoint's own Jinja template, when its tokenizer has one
3. the row that the model's name or path stands for               the row's markers
4. none of these                                                  the text as it is
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from turbotriton.contract.chat_templates import ChatTemplateConfig, TemplateRow, find_template
from turbotriton.contract.errors import ConfigError, InvalidInputError

from .chat_template import ChatTemplate, check_messages
from .detokenizer import TextTokenizer
from .row_template import RowTemplate

__all__ = ["PromptFormat", "choose_format", "encode_messages"]

FILL = "<FILL>"
INFILLING_STOP_WORD = "<EOT>"


class Template(Protocol):
    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **extra: Any) -> str: ...


def encode_messages(
    tokenizer: TextTokenizer,
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_special_tokens: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of rendered messages. Special tokens that a message's content spells stay text; only the template's are control tokens.

    template_options: more names for a Jinja template, such as tools.
    """
    check_messages(messages)
    protected = [
        message if message.get("content") is None else {**message, "content": tokenizer.protect(message["content"])}
        for message in messages
    ]
    return tokenizer.encode(template.render(protected, **template_options or {}), add_special_tokens=add_special_tokens)


class PromptFormat:
    """`name`: for people;  `template` None: texts go as they are;  `system`: first message of conversations that bring none."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        name: str,
        template: Template | None,
        *,
        capability: str = "chat",
        system: str | None = None,
        stop_words: Sequence[str] = (),
        is_jinja: bool = False,
        fill: tuple[str, str, str] | None = None,
    ) -> None:
        self.name = name
        self.capability = capability
        self.stop_words = tuple(stop_words)
        self._tokenizer = tokenizer
        self._template = template
        self._system = system
        self._adds_special_tokens = not is_jinja  # a Jinja template writes BOS itself
        self._fill = fill

    @property
    def has_chat(self) -> bool:
        return self._template is not None and self.capability == "chat"

    def encode_prompt(self, prompt: str) -> list[int]:
        """One question, or the text that the capability asks for. Raises InvalidInputError."""
        if self.capability == "infilling":
            return self._tokenizer.encode(self._infilling(prompt))
        if not self.has_chat:
            return self.encode_text(prompt)
        return self.encode_messages([{"role": "user", "content": prompt}])

    @property
    def has_jinja(self) -> bool:
        """Whether the template takes more than messages."""
        return self.has_chat and not self._adds_special_tokens

    def encode_messages(
        self, messages: Sequence[Mapping[str, Any]], template_options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """A conversation. Without a chat template its contents follow each other as they are. template_options: see `has_jinja`."""
        check_messages(messages)
        if not self.has_chat:
            return self.encode_text("".join(message["content"] for message in messages))
        assert self._template is not None
        if self._system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        ids = encode_messages(
            self._tokenizer,
            self._template,
            messages,
            add_special_tokens=self._adds_special_tokens,
            template_options=template_options,
        )
        bos = self._tokenizer.bos_token_id
        return (
            ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
        )  # the row begins with the BOS that the tokenizer adds

    def encode_text(self, text: str) -> list[int]:
        """The text as it is, with what the tokenizer itself puts in front; special tokens in it are control tokens."""
        return self._tokenizer.encode(text)

    def _infilling(self, prompt: str) -> str:
        assert self._fill is not None
        before, found, after = prompt.partition(FILL)
        if not found:
            raise InvalidInputError(f"capability infilling: the prompt has no {FILL}; write it where the text is missing")
        prefix, suffix, middle = self._fill
        return f"{prefix} {before} {suffix}{after} {middle}"


def choose_format(
    tokenizer: TextTokenizer,
    *,
    config: ChatTemplateConfig | None = None,
    template_name: str | None = None,
    guessed_name: str | None = None,
) -> PromptFormat:
    """`template_name`: given by the user;  `guessed_name`: by the model's name or path. Raises ConfigError, WorkspaceError."""
    if template_name is not None and find_template(template_name) is None:
        raise ConfigError(f"model_name is {template_name!r}, no chat template's name; 'turbotriton list' prints them")
    config = config or ChatTemplateConfig()
    named = find_template(template_name or "")
    guessed = find_template(guessed_name or "")
    if not config.makes_row and named is None and tokenizer.chat_template is not None:
        return _jinja_format(tokenizer, config, guessed)
    row = config.row(named or guessed or find_template("base"))
    stop_words = (*row.stop_words, INFILLING_STOP_WORD) if row.capability == "infilling" else row.stop_words
    template = None if row.capability in ("completion", "python") else RowTemplate(row)
    return PromptFormat(tokenizer, row.name, template, capability=row.capability, stop_words=stop_words, fill=row.fill)


def _jinja_format(tokenizer: TextTokenizer, config: ChatTemplateConfig, guessed: TemplateRow | None) -> PromptFormat:
    source = tokenizer.chat_template
    assert source is not None
    capability = config.capability or "chat"
    fill = guessed.fill if guessed is not None else None
    if capability == "infilling" and fill is None:
        raise ConfigError("capability is 'infilling', which this model has no markers for; codellama has")
    return PromptFormat(
        tokenizer,
        "the checkpoint's own template",
        ChatTemplate(source, tokenizer.bos_token, tokenizer.eos_token),
        capability=capability,
        system=config.meta_instruction,
        stop_words=(*(config.stop_words or ()), *([INFILLING_STOP_WORD] if capability == "infilling" else [])),
        is_jinja=True,
        fill=fill,
    )
