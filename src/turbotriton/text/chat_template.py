"""Chat messages to the model's text, by the checkpoint's own Jinja template in a sandbox."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from turbotriton.contract.errors import InvalidInputError, WorkspaceError

__all__ = ["ChatTemplate", "check_messages"]

ROLES = ("system", "user", "assistant", "tool", "developer")


class ChatTemplate:
    """`source`: Jinja as Hugging Face tokenizers carry it; it sees messages, bos_token, eos_token, add_generation_prompt.

    Raises WorkspaceError when the source does not compile.
    """

    def __init__(self, source: str, bos_token: str | None = None, eos_token: str | None = None) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise WorkspaceError(f"the chat template does not compile: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """Raises InvalidInputError: a malformed message, or the template refused them."""
        check_messages(messages)
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens, **extra)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            raise InvalidInputError(f"the model's chat template refuses these messages: {error}") from None


def check_messages(messages: Any) -> None:
    """Raises InvalidInputError naming the message that is malformed."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidInputError('messages must be a non-empty list of {"role": ..., "content": ...}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidInputError(f"messages[{index}] is no object with role and content")
        if message.get("role") not in ROLES:
            raise InvalidInputError(f"messages[{index}].role is {message.get('role')!r}; it must be one of {', '.join(ROLES)}")
        if message.get("content") is None and message.get("role") == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(message.get("content"), str):
            raise InvalidInputError(f"messages[{index}].content must be a string")


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's part for training; here its content only."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """As Hugging Face's: no HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
