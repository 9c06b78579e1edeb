"""The text door's request: from tensors and the sampling JSON to token ids, sampling and what to answer with.

Flat tensors win over `sampling_parameters`. What is named in neither has the default of `SamplingParams`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbotriton.contract import env
from turbotriton.contract.chat_templates import find_template, read_template_config
from turbotriton.contract.errors import InvalidInputError
from turbotriton.contract.ini import read_workspace_config
from turbotriton.contract.wire import MAX_LOGPROBS, MAX_SEED, SamplingParams
from turbotriton.text.chat_template import ChatTemplate, check_messages
from turbotriton.text.detokenizer import TextTokenizer
from turbotriton.text.prompt_format import PromptFormat, choose_format, encode_messages

from .guided_key import read_guided
from .inputs import check_parameters, read_array, read_bool, read_float, read_int, read_string, read_strings

__all__ = ["TextRequest", "given_format", "read_text_request"]

INT32 = 2**31 - 1
MAX_SAMPLES = 16
MAX_STOP_WORDS = 64
MAX_INTERVAL = 1024
MAX_DEADLINE_MS = 86_400_000

#: Name in vLLM's JSON -> our name (the flat tensor's).
JSON_NAMES = {
    "max_tokens": "max_tokens",
    "min_tokens": "min_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop_words",
    "bad_words": "bad_words",
    "stop_token_ids": "stop_token_ids",
    "logit_bias": "logit_bias",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "include_stop_str_in_output": "include_stop_words",
    "n": "n",
    "logprobs": "num_logprobs",
    "prompt_logprobs": "prompt_logprobs",
    "guided": "guided",
    "stream_interval": "stream_interval",
}
#: What the server itself gives a chat template.
TEMPLATE_NAMES = ("messages", "bos_token", "eos_token")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTS = {
    "max_tokens": (0, INT32),
    "min_tokens": (0, INT32),
    "top_k": (-1, INT32),
    "seed": (0, MAX_SEED),
    "n": (1, MAX_SAMPLES),
    "num_logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "stream_interval": (1, MAX_INTERVAL),
}
_BOOLS = ("ignore_eos", "skip_special_tokens", "include_stop_words")
_STRING_LISTS = ("stop_words", "bad_words")


@dataclass(frozen=True, slots=True)
class TextRequest:
    """prompt_text: what `exclude_input_in_output = false` puts in front; empty for messages.

    stream_interval: new tokens that a response after the first waits for; fewer responses, less work for everyone behind them.
    """

    prompt_ids: tuple[int, ...]
    prompt_text: str
    sampling: SamplingParams
    num_samples: int
    stream: bool
    stream_interval: int
    stop_words: tuple[str, ...]
    include_stop_words: bool
    skip_special_tokens: bool
    exclude_input: bool
    priority: int
    deadline_ms: int | None
    returns: frozenset[
        str
    ]  # of finish_reason, num_input_tokens, num_output_tokens, logprobs, cumulative_logprob, prompt_logprobs


def given_format(tokenizer: TextTokenizer, weights: Path) -> PromptFormat | None:
    """What the server's user wants messages to become (TURBOTRITON_CHAT_TEMPLATE); None: what the workspace says.

    Raises ConfigError, WorkspaceError.
    """
    text = env.chat_template()
    if text is None:
        return None
    name = read_workspace_config(weights / "config.ini").llama.model_name
    return choose_format(tokenizer, config=read_template_config(text), guessed_name=name if find_template(name) else None)


def read_text_request(
    request: Any, tokenizer: TextTokenizer, template: ChatTemplate | None, prompt_format: PromptFormat | None = None
) -> TextRequest:
    """`prompt_format`: used for messages in place of the template. Raises InvalidInputError naming the tensor or key and its value."""
    check_parameters(request)
    prompt_ids, prompt_text = _read_prompt(request, tokenizer, template, prompt_format)
    values = _read_json_sampling(request) | _read_flat_sampling(request)
    stream = bool(read_bool(request, "stream"))
    num_samples = values.get("n", 1)
    if num_samples > 1 and stream:
        raise InvalidInputError(
            f"n is {num_samples}; several samples are only answered unstreamed: set stream to false or n to 1"
        )
    if "stream_interval" in values and not stream:
        raise InvalidInputError("stream_interval is for stream = true; leave it out")
    returns = frozenset(
        name
        for name in ("finish_reason", "num_input_tokens", "num_output_tokens", "logprobs", "cumulative_logprob")
        if read_bool(request, f"return_{name}")
    )
    wants_logprobs = bool(returns & {"logprobs", "cumulative_logprob"})
    num_logprobs = values.get("num_logprobs")
    if num_logprobs is not None:
        returns |= {"logprobs"}
    if "prompt_logprobs" in values:
        returns |= {"prompt_logprobs"}
    exclude = read_bool(request, "exclude_input_in_output")
    if exclude is False and read_array(request, "input_ids") is not None:
        prompt_text = tokenizer.decode(prompt_ids, skip_special_tokens=values.get("skip_special_tokens", True))
    return TextRequest(
        prompt_ids=tuple(prompt_ids),
        prompt_text=prompt_text,
        sampling=SamplingParams(
            max_new_tokens=values.get("max_tokens"),
            min_new_tokens=values.get("min_tokens", 0),
            **{name: values[name] for name in _FLOATS if name in values},
            top_k=max(values.get("top_k", 0), 0),
            seed=values.get("seed"),
            stop_token_ids=tuple(values.get("stop_token_ids", ())),
            logit_bias=values.get("logit_bias", ()),
            bad_sequences=_bad_sequences(values.get("bad_words", ()), tokenizer),
            ignore_eos=values.get("ignore_eos", False),
            guided=values.get("guided"),
            num_logprobs=0 if num_logprobs is None and wants_logprobs else num_logprobs,
            prompt_logprobs=values.get("prompt_logprobs"),
        ),
        num_samples=num_samples,
        stream=stream,
        stream_interval=values.get("stream_interval", 1),
        stop_words=(*values.get("stop_words", ()), *_template_stop_words(request, prompt_format)),
        include_stop_words=values.get("include_stop_words", False),
        skip_special_tokens=values.get("skip_special_tokens", True),
        exclude_input=True if exclude is None else exclude,
        priority=read_int(request, "priority", -INT32, INT32) or 0,
        deadline_ms=read_int(request, "deadline_ms", 1, MAX_DEADLINE_MS),
        returns=returns,
    )


def _template_stop_words(request: Any, prompt_format: PromptFormat | None) -> tuple[str, ...]:
    return prompt_format.stop_words if prompt_format is not None and read_string(request, "messages") is not None else ()


def _read_prompt(
    request: Any, tokenizer: TextTokenizer, template: ChatTemplate | None, prompt_format: PromptFormat | None
) -> tuple[list[int], str]:
    text = read_string(request, "text_input")
    messages = read_string(request, "messages")
    ids = read_array(request, "input_ids")
    given = [name for name, value in (("text_input", text), ("messages", messages), ("input_ids", ids)) if value is not None]
    if messages is None and read_string(request, "chat_template_kwargs") is not None:
        raise InvalidInputError("chat_template_kwargs is for messages; leave it out with text_input and input_ids")
    if len(given) != 1:
        raise InvalidInputError(f"send exactly one of text_input, messages and input_ids, not {' and '.join(given) or 'none'}")
    if text is not None:
        prompt_ids = tokenizer.encode(text)
        if not prompt_ids:
            raise InvalidInputError("text_input is empty; send at least one character")
        return prompt_ids, text
    if messages is not None:
        if prompt_format is not None:
            return _formatted(prompt_format, _parse_json("messages", messages), _read_template_options(request)), ""
        if template is None:
            raise InvalidInputError("this model has no chat template; send text_input or input_ids instead of messages")
        content = _parse_json("messages", messages)
        return encode_messages(tokenizer, template, content, template_options=_read_template_options(request)), ""
    assert ids is not None
    if not ids.size:
        raise InvalidInputError("input_ids is empty; send at least one token id")
    return ids.tolist(), ""


def _formatted(prompt_format: PromptFormat, messages: Any, options: Mapping[str, Any]) -> list[int]:
    if options and prompt_format.has_jinja:
        return prompt_format.encode_messages(messages, options)
    if options:
        raise InvalidInputError(
            f"chat_template_kwargs: {next(iter(options))!r} is for the model's own template; this server was started with another one"
        )
    check_messages(messages)
    if prompt_format.capability == "infilling":
        return prompt_format.encode_prompt(messages[-1]["content"])
    return prompt_format.encode_messages(messages)


def _read_template_options(request: Any) -> dict[str, Any]:
    """What the chat template gets beside the messages, such as tools; raises InvalidInputError for the names it has already."""
    text = read_string(request, "chat_template_kwargs")
    if text is None:
        return {}
    options = _parse_json("chat_template_kwargs", text)
    if not isinstance(options, dict):
        raise InvalidInputError("chat_template_kwargs must be a JSON object")
    taken = [name for name in options if name in TEMPLATE_NAMES]
    if taken:
        raise InvalidInputError(f"chat_template_kwargs: {taken[0]!r} is set by the server; leave it out")
    return options


def _read_flat_sampling(request: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in _FLOATS:
        values[name] = read_float(request, name)
    for name, (low, high) in _INTS.items():
        values[name] = read_int(request, name, low, high)
    for name in ("ignore_eos", "skip_special_tokens"):
        values[name] = read_bool(request, name)
    for name in _STRING_LISTS:
        values[name] = read_strings(request, name)
    ids = read_array(request, "stop_token_ids")
    values["stop_token_ids"] = None if ids is None else ids.tolist()
    given = {name: value for name, value in values.items() if value is not None}
    _check_lists(given)
    return given


def _read_json_sampling(request: Any) -> dict[str, Any]:
    text = read_string(request, "sampling_parameters")
    if text is None:
        return {}
    content = _parse_json("sampling_parameters", text)
    if not isinstance(content, dict):
        raise InvalidInputError("sampling_parameters must be a JSON object")
    unknown = [key for key in content if key not in JSON_NAMES]
    if unknown:
        raise InvalidInputError(f"sampling_parameters: unknown key {unknown[0]!r}; known: {', '.join(JSON_NAMES)}")
    values = {JSON_NAMES[key]: _check_json(key, JSON_NAMES[key], value) for key, value in content.items() if value is not None}
    _check_lists(values)
    return values


def _parse_json(name: str, text: str) -> Any:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{name} is no JSON: {error}") from None
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON may name half a character, which no text and no token has
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InvalidInputError(f"{name} contains the lone surrogate {half}; send whole characters") from None
    return content


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def _check_json(key: str, name: str, value: Any) -> Any:
    def wrong(rule: str) -> InvalidInputError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:40]}... ({len(shown)} characters)"
        return InvalidInputError(f"sampling_parameters: {key} is {shown}; it must be {rule}")

    if name == "guided":
        return read_guided(value)
    if name in _BOOLS:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if name in _FLOATS:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            raise wrong("a finite number")
        return float(value)
    if name in _INTS:
        low, high = _INTS[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(f"a whole number from {low} to {high}")
        return value
    if name == "logit_bias":
        if not isinstance(value, dict) or not all(_is_bias(token_id, bias) for token_id, bias in value.items()):
            raise wrong("an object from token ids to numbers from -100 to 100")
        return tuple((int(token_id), float(bias)) for token_id, bias in value.items())
    items = [value] if isinstance(value, str) and name in _STRING_LISTS else value
    kind = str if name in _STRING_LISTS else int
    if not isinstance(items, list) or not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
        raise wrong("a list of strings" if kind is str else "a list of token ids")
    return items


def _is_bias(token_id: str, bias: Any) -> bool:
    return (
        token_id.isascii() and token_id.isdigit() and len(token_id) < 10
        and not isinstance(bias, bool) and isinstance(bias, (int, float)) and -100 <= bias <= 100
    )  # fmt: skip


def _check_lists(values: Mapping[str, Any]) -> None:
    for name in (*_STRING_LISTS, "stop_token_ids"):
        items = values.get(name, ())
        if len(items) > MAX_STOP_WORDS:
            raise InvalidInputError(f"{name} has {len(items)} entries; at most {MAX_STOP_WORDS} are taken")
        if any(item == "" for item in items):
            raise InvalidInputError(f"{name} contains an empty string; leave it out")
        if any(isinstance(item, int) and not 0 <= item <= INT32 for item in items):
            raise InvalidInputError(f"{name} contains {next(i for i in items if not 0 <= i <= INT32)}; token ids are 0 or more")


def _bad_sequences(words: Any, tokenizer: TextTokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is written in the middle of a text and after a space."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        for form in (word, f" {word}"):
            ids = tuple(tokenizer.encode(form, add_special_tokens=False))
            if ids:
                sequences[ids] = None
    return tuple(sequences)
