"""The key `guided` of the sampling JSON: what the output must match. Checked for shape here; the engine compiles it.

Exactly one of {"json_schema": object or its text}, {"json_object": true}, {"regex": text}, {"grammar": Lark text},
{"choice": [text, ...]}.
"""

import json
from typing import Any

from turbotriton.contract.errors import InvalidInputError
from turbotriton.contract.wire import GUIDED_KINDS

__all__ = ["read_guided"]


def read_guided(value: Any) -> tuple[str, str]:
    """(kind, text) as `SamplingParams.guided` has it. Raises InvalidInputError naming what is wrong."""
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in GUIDED_KINDS:
        given = ", ".join(map(repr, list(value)[:5])) if isinstance(value, dict) else repr(value)[:80]
        raise InvalidInputError(
            f"sampling_parameters: guided is {given or 'empty'}; it must have one of {', '.join(GUIDED_KINDS)}"
        )
    ((kind, content),) = value.items()
    if kind == "json_schema":
        return kind, _schema(content)
    if kind == "json_object":
        if content is not True:
            raise InvalidInputError(f"sampling_parameters: guided: json_object is {str(content)[:80]!r}; it must be true")
        return kind, ""
    if kind == "choice":
        is_list = isinstance(content, list) and len(content) > 0
        if not is_list or not all(isinstance(word, str) and word for word in content):
            raise InvalidInputError("sampling_parameters: guided: choice must be a list of one or more texts, none of them empty")
        return kind, json.dumps(content)
    if not isinstance(content, str) or not content:
        raise InvalidInputError(f"sampling_parameters: guided: {kind} must be a text that is not empty")
    return kind, content


def _schema(content: Any) -> str:
    """As compact text; the order of its properties is the order that the output has them in."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"sampling_parameters: guided: json_schema is no JSON: {error}") from None
    if not isinstance(content, (dict, bool)):
        raise InvalidInputError("sampling_parameters: guided: json_schema must be an object, or its JSON as text")
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
