"""Chat answers: messages as a chat template takes them in, OpenAI's messages and tool calls out, whole or in chunks."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from turbotriton.client.text_door import Delta

from .answers import Answer, Choice, sampling_options, seeded
from .errors import ApiError
from .fleet import Fleet
from .schema import ChatRequest
from .tools import ToolCallParser, ToolFormat

__all__ = ["ChatAnswer", "plain_message"]

#: Fields of OpenAI's messages that would be lost on the way to the model.
UNSHOWN = ("audio", "function_call", "refusal")


class ChatAnswer(Answer):
    """/v1/chat/completions. `tool_format`: how this model writes tool calls; None: the request has no tools."""

    kind = "chatcmpl"
    _object, _chunk_object = "chat.completion", "chat.completion.chunk"
    _plain_chunk = ('"delta": {"content": ', "}")

    def __init__(self, fleet: Fleet, request: ChatRequest, tool_format: ToolFormat | None) -> None:
        options = sampling_options(request)
        options["max_tokens"] = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        options["num_logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
        prompt: dict[str, Any]
        if isinstance(request.messages, str):
            prompt = {"prompt": request.messages}
        else:
            prompt = {"messages": [plain_message(index, message) for index, message in enumerate(request.messages)]}
        template_options: dict[str, Any] = dict(request.chat_template_kwargs or {})
        if tool_format is not None:
            template_options["tools"] = [tool.model_dump(exclude_unset=True) for tool in request.tools or ()]
            options["skip_special_tokens"] = options["skip_special_tokens"] and not tool_format.is_special
        if template_options:
            options["chat_template_kwargs"] = template_options
        choices = [Choice(index, prompt, seeded(options, request.seed, index)) for index in range(request.n)]
        if tool_format is not None:
            is_forced = request.tool_choice not in (None, "auto")
            for choice in choices:
                max_calls = None if request.parallel_tool_calls else 1
                choice.parser = ToolCallParser(tool_format, is_forced=is_forced, max_calls=max_calls)
        self._began: set[int] = set()
        super().__init__(fleet, request, choices)

    def _keep(self, choice: Choice, delta: Delta) -> None:
        content, calls = self._parsed(choice, delta)
        choice.parts.append(content)
        for call in calls:
            if "id" in call:
                choice.tool_calls.append({name: value for name, value in call.items() if name != "index"})
            else:
                choice.tool_calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        choice.logprobs += delta.logprobs or []

    def _parsed(self, choice: Choice, delta: Delta) -> tuple[str, list[dict[str, Any]]]:
        if choice.parser is None:
            return delta.text, []
        content, calls = choice.parser.push(delta.text)
        if delta.finish_reason is not None:
            rest, more = choice.parser.flush()
            content, calls = content + rest, calls + more
            if choice.parser.num_calls and choice.finish_reason == "stop":
                choice.finish_reason = "tool_calls"
        return content, calls

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        content = "".join(choice.parts)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if choice.tool_calls:
            message |= {"content": content.strip() or None, "tool_calls": choice.tool_calls}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _choice_chunks(self, choice: Choice, delta: Delta) -> Sequence[dict[str, Any]]:
        def chunk(content: dict[str, Any], finish_reason: str | None, entries: list[dict[str, Any]]) -> dict[str, Any]:
            return {"index": choice.index, "delta": content, "logprobs": self._logprobs(entries), "finish_reason": finish_reason}

        content, calls = self._parsed(choice, delta)
        chunks = []
        if choice.index not in self._began:
            self._began.add(choice.index)
            chunks.append(chunk({"role": "assistant", "content": ""}, None, []))
        if content or delta.logprobs:
            chunks.append(chunk({"content": content}, None, delta.logprobs or []))
        chunks += [chunk({"tool_calls": [call]}, None, []) for call in calls]
        if choice.finish_reason is not None:
            chunks.append(chunk({}, choice.finish_reason, []))
        return chunks

    def _is_plain(self, choice: Choice, delta: Delta) -> bool:
        has_begun = choice.index in self._began and choice.finish_reason is None
        return has_begun and choice.parser is None and bool(delta.text) and delta.logprobs is None and not self._shows_logprobs

    @property
    def _shows_logprobs(self) -> bool:
        assert isinstance(self._request, ChatRequest)
        return self._request.logprobs

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not self._shows_logprobs:
            return None
        content = [_token(entry) | {"top_logprobs": [_token(one) for one in entry.get("top_logprobs", ())]} for entry in entries]
        return {"content": content, "refusal": None}


def _token(entry: Mapping[str, Any]) -> dict[str, Any]:
    """bytes is null for a token that is a part of a character."""
    text = entry["token"]
    return {"token": text, "logprob": entry["logprob"], "bytes": None if "\ufffd" in text else list(text.encode())}


def _plain_call(call: Any) -> Any:
    """A call with its arguments as an object: chat templates write them themselves, OpenAI's clients send JSON text."""
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (TypeError, KeyError, ValueError):
        return call


def plain_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """content as one text. Raises ApiError for parts that are no text, and for what no chat template would show the model."""
    content = message.get("content")
    for name in UNSHOWN:
        if message.get(name) is not None:
            raise ApiError(400, f"messages[{index}].{name} is not supported; leave it out", param="messages")
    if message.get("tool_calls"):
        message = {**message, "tool_calls": [_plain_call(call) for call in message["tool_calls"]]}
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ApiError(400, f"messages[{index}].content has a part of type {kind!r}; only text is served", param="messages")
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}
