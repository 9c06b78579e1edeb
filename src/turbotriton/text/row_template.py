"""Chat messages to the model's text by the markers of a row (`contract/chat_templates.py`), as `ChatTemplate` does by Jinja."""

from collections.abc import Mapping, Sequence
from typing import Any

from turbotriton.contract.chat_templates import TemplateRow
from turbotriton.contract.errors import InvalidInputError

from .chat_template import check_messages

__all__ = ["RowTemplate"]


class RowTemplate:
    def __init__(self, row: TemplateRow) -> None:
        self._row = row

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """The row's own opening stands first unless the first message is a system message. Raises InvalidInputError."""
        check_messages(messages)
        if extra:
            raise InvalidInputError(f"{next(iter(extra))!r} is for Jinja chat templates; this one is the row {self._row.name!r}")
        row = self._row
        parts = [row.begin]
        if messages[0]["role"] != "system":
            has_opening = row.meta_instruction is not None
            parts.append(f"{row.system}{row.meta_instruction}{row.eosys}" if has_opening else row.without_system)
        num_rounds = 0
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "system":
                parts.append(row.system + content + row.eosys)
            elif role == "user":
                num_rounds += 1
                parts.append((f"[Round {num_rounds}]\n\n" if row.rounds else "") + row.user + content + row.eoh)
            elif role == "assistant":
                parts.append(row.assistant + content + row.eoa + row.separator)
            else:
                raise InvalidInputError(
                    f"messages[{index}].role is {role!r}; the template {row.name!r} knows system, user and assistant"
                )
        if add_generation_prompt:
            parts.append(row.assistant)
        text = "".join(parts)
        return text[:-1] if row.cut_end and add_generation_prompt else text
