"""Requests of every endpoint, field by field, with OpenAI's and LMDeploy's names and defaults.

A field that is not listed is refused by name. Fields that are accepted and change no answer are marked so: `IGNORED`.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator, model_validator

from .errors import ApiError
from .tools import forced_call_schema

__all__ = ["IGNORED", "IS_TEXT", "ChatRequest", "CompletionRequest", "EncodeRequest", "InteractiveRequest", "SamplingFields"]

#: Fields that OpenAI's clients may send and that cannot change an answer here.
IGNORED = ("session_id", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")

#: Validation context of a body in which no escape can name half a character.
IS_TEXT = {"is_text": True}

MAX_CHOICES = 128
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _Request(BaseModel):
    """null is as good as leaving a field out: OpenAI's clients write their defaults so."""

    model_config = ConfigDict(extra="forbid", strict=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class _Body(_Request):
    """A whole request."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, values: Any, info: ValidationInfo) -> Any:
        r"""JSON may name half a character (\ud800), which is no text and which no server behind this one takes."""
        if info.context is IS_TEXT:
            return values
        try:
            json.dumps(values, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"the body contains the lone surrogate {half}; send whole characters") from None
        except RecursionError:
            raise ValueError("the body is nested too deeply") from None
        return values


class StreamOptions(_Request):
    include_usage: bool = False


class SamplingFields(_Body):
    """What chat and completions share. None: the door's default."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Probability = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1)] = None
    # LMDeploy's and vLLM's
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 40
    min_p: Probability = 0.0
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stop_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    priority: Annotated[int, Field(ge=-(2**31) + 1, le=2**31 - 1)] = 0
    guided_json: dict[str, JsonValue] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    user_id: str | None = None  # of the _qos endpoints
    # accepted and without effect on an answer
    session_id: int = -1  # LMDeploy's: answers of these endpoints need no session
    user: str | None = None
    metadata: dict[str, JsonValue] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop")
    @classmethod
    def _stop_is_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError("a stop word must not be empty")
        return value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream = true")
        return self

    def guided(self) -> dict[str, Any] | None:
        """The engine's `guided` object. Raises ApiError when the answer is to follow two things."""
        names = {"guided_json": "json_schema", "guided_regex": "regex", "guided_grammar": "grammar", "guided_choice": "choice"}
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ApiError(400, f"{' and '.join(given)} exclude each other; send one", param=given[1])
        return {names[given[0]]: getattr(self, given[0])} if given else None


class ResponseFormat(_Request):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "choice"]
    json_schema: dict[str, JsonValue] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None

    def guided(self) -> dict[str, Any] | None:
        """The engine's `guided` object. Raises ApiError when the format's own field is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"json_object": True}
        value = getattr(self, self.type)
        if value is None:
            raise ApiError(400, f"response_format of type {self.type} needs the field {self.type!r}", param="response_format")
        if self.type == "json_schema":
            if not isinstance(value.get("schema"), dict):
                raise ApiError(400, "response_format.json_schema needs an object in 'schema'", param="response_format")
            return {"json_schema": value["schema"]}
        return {self.type: value}


class ToolFunction(BaseModel):
    """The rest of it goes to the chat template as it is."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(min_length=1)]
    parameters: dict[str, JsonValue] | None = None


class Tool(_Request):
    type: Literal["function"]
    function: ToolFunction


class ChatRequest(SamplingFields):
    messages: str | list[dict[str, JsonValue]]
    max_completion_tokens: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, JsonValue] | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self

    def guided(self) -> dict[str, Any] | None:
        """Also by response_format or a forced tool call."""
        forced = None
        if self.tools and self.tool_choice not in (None, "none", "auto"):
            forced = {"json_schema": forced_call_schema([tool.function.model_dump() for tool in self.tools], self.tool_choice)}
        by_format = None if self.response_format is None else self.response_format.guided()
        given = [one for one in (super().guided(), by_format, forced) if one is not None]
        if len(given) > 1:
            raise ApiError(
                400, "response_format, guided_... and a required tool call exclude each other; send one", param="response_format"
            )
        return given[0] if given else None


class CompletionRequest(SamplingFields):
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    echo: bool = False
    suffix: None = None
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of other than n is not supported")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Each prompt as text or ids. Raises ApiError for an empty one."""
        prompt = self.prompt
        is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        found: list[Any] = [prompt] if is_one else list(prompt)
        if not found or any(len(one) == 0 for one in found):
            raise ApiError(400, "prompt is empty; send at least one character or token id", param="prompt")
        return found


class InteractiveRequest(_Body):
    """LMDeploy's /v1/chat/interactive."""

    prompt: str | list[dict[str, JsonValue]]
    session_id: int = -1
    interactive_mode: bool = False
    stream: bool = False
    stop: str | list[str] | None = None
    request_output_len: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    top_p: Probability = 0.8
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 40
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    cancel: bool = False
    adapter_name: None = None
    user_id: str | None = None

    @field_validator("stop")
    @classmethod
    def _stop_is_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError("a stop word must not be empty")
        return value


class EncodeRequest(_Body):
    input: str | list[str]
    do_preprocess: bool = False
    add_bos: bool = True
