"""Tool calls in a model's text: which families write them how, and a parser that follows a stream.

    qwen       <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them
    mistral    [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
    llama3     {"name": ..., "parameters": {...}} as the whole answer, perhaps after <|python_tag|>; several with "; " between
    internlm2  <|action_start|><|plugin|>{"name": ..., "parameters": {...}}<|action_end|>

Text before the first call is content. What looks like a call and is none (no JSON, no name) is content, too: nothing is lost.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ApiError

__all__ = ["TOOL_FORMATS", "ToolCallParser", "ToolFormat", "find_tool_format", "forced_call_schema"]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`begin`: what opens a call (empty: an answer that begins with a brace); `end`: what closes it (empty: the answer's end).

    `marker`: text that only this family's chat template has. `is_special`: the markers are special tokens and must be shown.
    """

    name: str
    begin: str
    end: str
    marker: str
    is_special: bool = False


TOOL_FORMATS = {
    row.name: row
    for row in (
        ToolFormat("internlm2", "<|action_start|><|plugin|>", "<|action_end|>", "<|plugin|>", is_special=True),
        ToolFormat("mistral", "[TOOL_CALLS]", "", "[TOOL_CALLS]", is_special=True),
        ToolFormat("qwen", "<tool_call>", "</tool_call>", "<tool_call>"),
        ToolFormat("llama3", "", "", "<|start_header_id|>"),
    )
}
#: Special tokens that end an answer; shown when the markers have to be.
_ENDS = ("<|im_end|>", "</s>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>")
_PYTHON_TAG = "<|python_tag|>"


def find_tool_format(chat_template: str | None) -> ToolFormat | None:
    """By the markers in the model's template; None when it knows no tools."""
    if chat_template is None or "tools" not in chat_template:
        return None
    return next((row for row in TOOL_FORMATS.values() if row.marker in chat_template), None)


class ToolCallParser:
    """Fed with an answer's text as it comes. A call is given on when its JSON is complete."""

    def __init__(self, form: ToolFormat, *, is_forced: bool = False) -> None:
        self._form = form
        self._is_forced = is_forced  # the whole answer is one call's JSON
        self._held = ""
        self._in_call = is_forced
        self._is_first = True
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """-> content and calls that are certain now."""
        self._held += text
        content = ""
        calls: list[dict[str, Any]] = []
        while not self._is_forced:
            if not self._in_call:
                before, self._held, self._in_call = self._until_call(self._held)
                content += before
            if not self._in_call or not self._form.end or self._form.end not in self._held:
                break
            body, self._held = self._held.split(self._form.end, 1)
            self._in_call = False
            rest, made = self._calls_of(body)
            content, calls = content + rest, calls + made
        return content, calls

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """The end of the answer: what was held is a call or content."""
        held, self._held = self._held, ""
        for end in _ENDS:
            held = held.removesuffix(end)
        return self._calls_of(held) if self._in_call else (held, [])

    def _until_call(self, text: str) -> tuple[str, str, bool]:
        """-> (content before a call, what is held, whether a call has begun)."""
        begin = self._form.begin
        if not begin:  # decided by the answer's first sign
            start = text.lstrip().removeprefix(_PYTHON_TAG).lstrip()
            if self._is_first and (not start or _PYTHON_TAG.startswith(start)):
                return "", text, False
            is_call = self._is_first and start.startswith("{")
            self._is_first = False
            return ("", start, True) if is_call else (text, "", False)
        if begin in text:
            before, after = text.split(begin, 1)
            return before, after, True
        held = next((size for size in range(min(len(begin) - 1, len(text)), 0, -1) if text.endswith(begin[:size])), 0)
        return text[: len(text) - held], text[len(text) - held :], False

    def _calls_of(self, body: str) -> tuple[str, list[dict[str, Any]]]:
        calls = _read_calls(body)
        if calls is None:
            return (body if self._is_forced else self._form.begin + body + self._form.end), []
        made = []
        for name, arguments in calls:
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            made.append(
                {"index": self.num_calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            )
            self.num_calls += 1
        return "", made


def _read_calls(body: str) -> list[tuple[str, Any]] | None:
    """(name, arguments) of each call in a JSON object, a list of them, or several objects in a row; None: these are no calls."""
    decoder, found, at = json.JSONDecoder(), [], 0
    text = body.strip()
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            found += value if isinstance(value, list) else [value]
            while at < len(text) and text[at] in "; \n\t":
                at += 1
    except (ValueError, RecursionError):
        return None
    calls = []
    for value in found:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        calls.append((value["name"], value.get("arguments", value.get("parameters", {}))))
    return calls or None


def forced_call_schema(tools: Sequence[Mapping[str, Any]], choice: object) -> dict[str, Any]:
    """JSON schema of exactly one call of one of the tools, or of the named one. Raises ApiError for a name that is not there."""
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), dict)]
    if isinstance(choice, dict):
        function = choice.get("function")
        wanted = function.get("name") if isinstance(function, dict) else None
        functions = [one for one in functions if one.get("name") == wanted]
        if not functions:
            raise ApiError(400, f"tool_choice names the function {wanted!r}, which is not among tools", param="tool_choice")
    if not functions:
        raise ApiError(400, "tools has no entry with a 'function' object", param="tools")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": one.get("name")}, "arguments": one.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in functions
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}
