"""Chat messages to the text that a model was trained on, by the Jinja template that its tokenizer carries.

Renders as transformers' `apply_chat_template` does (same environment options, filters and functions), without importing it.
A template is foreign code: it runs in Jinja's immutable sandbox. Knows no tokenizer; the special tokens are plain text.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from turbotriton.contract.errors import InvalidInputError

__all__ = ["ChatTemplate"]


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's part for training; here its content only."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, **unused: Any) -> str:
    """JSON for a model to read: Jinja's own filter would escape < and & for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class ChatTemplate:
    """A compiled template. Raises InvalidInputError, from here and from `render`, with the template's own reason."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidInputError(f"the model's chat template cannot be parsed: {_line(error)}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The conversation's text, ending where the assistant is to speak when `add_generation_prompt`. `extra` are further
        variables that the template may read (tools, enable_thinking ...)."""
        variables = {**self._special_tokens, **extra, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise InvalidInputError(f"the model's chat template refuses these messages: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
