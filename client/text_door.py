"""The text door's contract seen from a client: keyword arguments -> request message, response message -> Delta.

Only encoding: no connection. Values are checked by the door, which knows the model; here only names and types are.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from turbotriton.contract.errors import InvalidInputError, ServerError

from .kserve import Tensor, build_request, error_from_text, read_values, strings

__all__ = ["LMDEPLOY_MODELS", "Delta", "Result", "build_generate_request", "join_deltas", "pick_model", "read_delta"]

#: The LMDeploy doors, which take tokens: never the text door.
LMDEPLOY_MODELS = ("turbomind", "preprocessing", "postprocessing")

_SCALARS: dict[str, type[np.generic]] = {
    "max_tokens": np.int32,
    "min_tokens": np.int32,
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
    "top_k": np.int32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "seed": np.uint64,
    "ignore_eos": np.bool_,
    "skip_special_tokens": np.bool_,
    "priority": np.int32,
    "deadline_ms": np.int32,
    "num_logprobs": np.int32,
    "exclude_input_in_output": np.bool_,
}
#: JSON objects: the options that have no tensor of their own, and what the chat template gets beside the messages.
_OBJECTS = ("sampling_parameters", "chat_template_kwargs")
_LISTS = {"stop_words": str, "bad_words": str, "stop_token_ids": int}


@dataclass(frozen=True, slots=True)
class Delta:
    """What one response of a stream added. The last one has finish_reason."""

    text: str
    output_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    num_input_tokens: int = 0
    num_output_tokens: int = 0  # so far
    logprobs: list[dict[str, Any]] | None = None  # one entry a token of output_ids, when num_logprobs was given
    prompt_logprobs: list[dict[str, Any]] | None = (
        None  # in the first, when sampling_parameters had it: one entry a token, logprob None in the first
    )
    cumulative_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer; finish_reason is "stop", "length", "cancelled" or "deadline"."""

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    output_ids: tuple[int, ...] = ()
    logprobs: list[dict[str, Any]] | None = field(default=None)
    prompt_logprobs: list[dict[str, Any]] | None = field(default=None)
    cumulative_logprob: float | None = None


def build_generate_request(
    model_name: str,
    prompt: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
    input_ids: Sequence[int] | None,
    *,
    stream: bool,
    request_id: str,
    sampling: Mapping[str, Any],
) -> service_pb2.ModelInferRequest:
    """The request message. Raises InvalidInputError unless exactly one of prompt, messages and input_ids is given, and
    for a sampling name that the text door does not have or a value of another type. A value of None is left out."""
    given = {"prompt": prompt, "messages": messages, "input_ids": input_ids}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise InvalidInputError(f"give exactly one of prompt, messages and input_ids, not {' and '.join(names) or 'none'}")
    tensors: dict[str, Tensor] = {}
    if prompt is not None:
        tensors["text_input"] = strings([prompt])
    elif messages is not None:
        if isinstance(messages, (str, bytes)):
            raise InvalidInputError("messages is text; give a list of {'role': ..., 'content': ...}, or use prompt")
        tensors["messages"] = strings([json.dumps(list(messages), ensure_ascii=False)])
    else:
        tensors["input_ids"] = _array("input_ids", list(input_ids or ()), np.int32)
    flags = {
        "stream": stream,
        "exclude_input_in_output": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
    if sampling.get("num_logprobs") is not None:
        flags |= {"return_logprobs": True, "return_cumulative_logprob": True}
    tensors |= {name: np.array([value]) for name, value in flags.items()}
    tensors |= {name: _sampling_tensor(name, value) for name, value in sampling.items() if value is not None}
    return build_request(model_name, tensors, request_id=request_id)


def _sampling_tensor(name: str, value: Any) -> Tensor:
    if name in _SCALARS:
        if isinstance(value, (list, tuple)):
            raise InvalidInputError(f"{name} is {value!r}; give one number")
        return _array(name, [value], _SCALARS[name])
    if name in _OBJECTS:
        if not isinstance(value, Mapping):
            raise InvalidInputError(f"{name} is {value!r}; give a dict")
        return strings([json.dumps(value, ensure_ascii=False)])
    if name not in _LISTS:
        raise InvalidInputError(f"{name!r} is no sampling option; known: {', '.join(sorted([*_SCALARS, *_LISTS, *_OBJECTS]))}")
    items = [value] if isinstance(value, (str, int)) else list(value)
    wrong = [item for item in items if not isinstance(item, _LISTS[name])]
    if wrong:
        raise InvalidInputError(f"{name} contains {wrong[0]!r}; give {_LISTS[name].__name__} values")
    return strings(map(str, items)) if _LISTS[name] is str else _array(name, items, np.int32)


def _array(name: str, values: list[Any], dtype: type[np.generic]) -> Tensor:
    """values as a 1-D tensor. Raises InvalidInputError when one does not fit dtype without a change of its value."""
    is_bool = dtype is np.bool_
    for value in values:
        is_number = isinstance(value, (int, np.integer)) or (dtype is np.float32 and isinstance(value, (float, np.floating)))
        if isinstance(value, (bool, np.bool_)) != is_bool or not (is_bool or is_number):
            raise InvalidInputError(
                f"{name} is {value!r}; give {'True or False' if is_bool else f'a number ({np.dtype(dtype)})'}"
            )
    if issubclass(dtype, np.integer):
        limits = np.iinfo(dtype)
        if not all(limits.min <= value <= limits.max for value in values):
            raise InvalidInputError(f"{name} is {values!r}, which does not fit {np.dtype(dtype)}")
    return np.array(values, dtype=dtype)


def read_delta(response: service_pb2.ModelStreamInferResponse) -> Delta | None:
    """The response's content; None for an empty final message. Raises the error that the response carries."""
    if response.error_message:
        raise error_from_text(response.error_message)
    outputs = read_values(response.infer_response)
    if not outputs:
        return None
    if "text_output" not in outputs:
        raise ServerError(f"model {response.infer_response.model_name} answers {sorted(outputs)}, not text_output: no text door")

    def first(name: str, default: Any) -> Any:
        values = outputs.get(name)
        return values[0] if values else default

    logprobs, prompt_logprobs = first("logprobs", b""), first("prompt_logprobs", b"")
    return Delta(
        text=first("text_output", b"").decode(errors="replace"),
        output_ids=tuple(outputs.get("output_ids", ())),
        finish_reason=first("finish_reason", b"").decode() or None,
        num_input_tokens=first("num_input_tokens", 0),
        num_output_tokens=first("num_output_tokens", 0),
        logprobs=json.loads(logprobs) if logprobs else None,
        prompt_logprobs=json.loads(prompt_logprobs) if prompt_logprobs else None,
        cumulative_logprob=first("cumulative_logprob", None),
    )


def join_deltas(deltas: Iterable[Delta]) -> Result:
    """All deltas of one request as a Result. Raises ServerError when the last has no finish_reason: the stream was cut."""
    parts = list(deltas)
    if not parts or parts[-1].finish_reason is None:
        raise ServerError("the server ended the stream before the answer was complete; its log may tell why")
    last = parts[-1]
    logprobs = [entry for part in parts for entry in part.logprobs or ()]
    return Result(
        text="".join(part.text for part in parts),
        finish_reason=last.finish_reason or "",
        num_input_tokens=last.num_input_tokens,
        num_output_tokens=last.num_output_tokens,
        output_ids=tuple(token for part in parts for token in part.output_ids),
        logprobs=logprobs or None,
        prompt_logprobs=parts[0].prompt_logprobs,
        cumulative_logprob=last.cumulative_logprob,
    )


def pick_model(candidates: Sequence[str], url: str) -> str:
    """The only text door of a server. Raises InvalidInputError when there is none or a choice."""
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InvalidInputError(f"{url} serves no text door; convert with --doors all or text, and wait until the model is ready")
    raise InvalidInputError(f"{url} serves several text doors ({', '.join(sorted(candidates))}); give model=NAME")
