"""The text door's contract seen from a client: keyword arguments -> request message, response message -> Delta.

Only encoding: no connection. Values are checked by the door, which knows the model; here only names and types are.
"""

import functools
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from turbotriton.contract.errors import InvalidInputError, ServerError

from .kserve import error_from_text, read_values

__all__ = [
    "DEFAULTS",
    "LMDEPLOY_MODELS",
    "Delta",
    "DeltaReader",
    "Result",
    "build_generate_request",
    "join_deltas",
    "pick_model",
    "read_delta",
]

#: The LMDeploy doors, which take tokens: never the text door.
LMDEPLOY_MODELS = ("turbomind", "preprocessing", "postprocessing")


@dataclass(frozen=True, slots=True)
class _Type:
    kserve: str
    name: str
    one: struct.Struct  # of one value
    plain: tuple[type, ...]  # of values that need no closer look


_INT32 = _Type("INT32", "int32", struct.Struct("<i"), (int,))
_UINT64 = _Type("UINT64", "uint64", struct.Struct("<Q"), (int,))
_FLOAT32 = _Type("FP32", "float32", struct.Struct("<f"), (float, int))
_BOOL = _Type("BOOL", "bool", struct.Struct("<?"), (bool,))
_SCALARS: dict[str, _Type] = {
    "max_tokens": _INT32,
    "min_tokens": _INT32,
    "temperature": _FLOAT32,
    "top_p": _FLOAT32,
    "min_p": _FLOAT32,
    "top_k": _INT32,
    "repetition_penalty": _FLOAT32,
    "presence_penalty": _FLOAT32,
    "frequency_penalty": _FLOAT32,
    "seed": _UINT64,
    "ignore_eos": _BOOL,
    "skip_special_tokens": _BOOL,
    "priority": _INT32,
    "deadline_ms": _INT32,
    "num_logprobs": _INT32,
    "exclude_input_in_output": _BOOL,
}
#: What the door takes where an option is not sent. Reading a tensor costs a door 10 us, so these may as well be left out.
DEFAULTS: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "top_k": 0,
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "priority": 0,
}
#: JSON objects: the options that have no tensor of their own, and what the chat template gets beside the messages.
_OBJECTS = ("sampling_parameters", "chat_template_kwargs")
_LISTS = {"stop_words": str, "bad_words": str, "stop_token_ids": int}
_FLAGS = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
_LOGPROB_FLAGS = ("return_logprobs", "return_cumulative_logprob")


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
    if isinstance(messages, (str, bytes)):
        raise InvalidInputError("messages is text; give a list of {'role': ..., 'content': ...}, or use prompt")
    request = service_pb2.ModelInferRequest(model_name=model_name, id=request_id)
    if prompt is not None:
        _add_strings(request, "text_input", [prompt])
    elif messages is not None:
        _add_strings(request, "messages", [json.dumps(list(messages), ensure_ascii=False)])
    else:
        _add_numbers(request, "input_ids", list(input_ids or ()), _INT32)
    _add_numbers(request, "stream", [stream], _BOOL)
    request.MergeFromString(_flags(with_logprobs=sampling.get("num_logprobs") is not None))
    if sampling.get("exclude_input_in_output") is None:
        _add_numbers(request, "exclude_input_in_output", [True], _BOOL)
    for name, value in sampling.items():
        if value is not None:
            _add_sampling(request, name, value)
    return request


@functools.cache
def _flags(*, with_logprobs: bool) -> bytes:
    """A request's constant part: what the answer is to tell."""
    request = service_pb2.ModelInferRequest()
    for name in _FLAGS + _LOGPROB_FLAGS if with_logprobs else _FLAGS:
        _add_numbers(request, name, [True], _BOOL)
    serialized: bytes = request.SerializeToString()
    return serialized


def _add_sampling(request: service_pb2.ModelInferRequest, name: str, value: Any) -> None:
    if name in _SCALARS:
        if isinstance(value, (list, tuple)):
            raise InvalidInputError(f"{name} is {value!r}; give one number")
        _add_numbers(request, name, [value], _SCALARS[name])
    elif name in _OBJECTS:
        if not isinstance(value, Mapping):
            raise InvalidInputError(f"{name} is {value!r}; give a dict")
        _add_strings(request, name, [json.dumps(value, ensure_ascii=False)])
    elif name in _LISTS:
        items: list[Any] = [value] if isinstance(value, (str, int)) else list(value)
        wrong = [item for item in items if not isinstance(item, _LISTS[name])]
        if wrong:
            raise InvalidInputError(f"{name} contains {wrong[0]!r}; give {_LISTS[name].__name__} values")
        if _LISTS[name] is str:
            _add_strings(request, name, items)
        else:
            _add_numbers(request, name, items, _INT32)
    else:
        raise InvalidInputError(f"{name!r} is no sampling option; known: {', '.join(sorted([*_SCALARS, *_LISTS, *_OBJECTS]))}")


def _add_strings(request: service_pb2.ModelInferRequest, name: str, values: Sequence[str]) -> None:
    request.inputs.add(name=name, datatype="BYTES", shape=(len(values),))
    encoded = [value.encode() for value in values]
    request.raw_input_contents.append(b"".join([len(item).to_bytes(4, "little") + item for item in encoded]))


def _add_numbers(request: service_pb2.ModelInferRequest, name: str, values: list[Any], type_: _Type) -> None:
    """values as a 1-D tensor. Raises InvalidInputError when one does not fit the type without a change of its value."""
    for value in values:
        if type(value) in type_.plain:
            continue
        is_number = isinstance(value, (int, np.integer)) or (type_ is _FLOAT32 and isinstance(value, (float, np.floating)))
        if isinstance(value, (bool, np.bool_)) != (type_ is _BOOL) or not (type_ is _BOOL or is_number):
            raise InvalidInputError(
                f"{name} is {value!r}; give {'True or False' if type_ is _BOOL else f'a number ({type_.name})'}"
            )
    try:
        content = type_.one.pack(values[0]) if len(values) == 1 else struct.pack(f"<{len(values)}{type_.one.format[1:]}", *values)
    except (struct.error, OverflowError):
        raise InvalidInputError(f"{name} is {values!r}, which does not fit {type_.name}") from None
    request.inputs.add(name=name, datatype=type_.kserve, shape=(len(values),))
    request.raw_input_contents.append(content)


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


#: Outputs of a response that brings tokens and no log-probabilities -> the types that `DeltaReader` reads by itself.
_PLAIN_OUTPUTS = {
    "text_output": ("BYTES",),
    "output_ids": ("INT32",),
    "finish_reason": ("BYTES",),
    "num_input_tokens": ("UINT32", "INT32"),
    "num_output_tokens": ("UINT32", "INT32"),
}


class DeltaReader:
    """`read_delta` for the responses of one stream: names and types of its outputs are looked at once.

    A door sends the outputs of a request in one order, so where their number is as before the order is. Looking at the names costs
    more than all the rest of a response of one token.
    """

    def __init__(self) -> None:
        self._num_plain = 0  # outputs of the responses that have the order below; 0: none seen
        self._order: list[int] = []  # places of the _PLAIN_OUTPUTS

    def read(self, response: service_pb2.ModelStreamInferResponse) -> Delta | None:
        raw = response.infer_response.raw_output_contents
        if len(raw) != self._num_plain or response.error_message:
            self._look_at(response.infer_response.outputs)
            return read_delta(response)
        contents = list(raw)
        text, ids, reason, num_input, num_output = [contents[place] for place in self._order]
        return Delta(
            _first_string(text),
            (int.from_bytes(ids, "little", signed=True),) if len(ids) == 4 else struct.unpack(f"<{len(ids) // 4}i", ids),
            _first_string(reason) or None,
            int.from_bytes(num_input[:4], "little"),
            int.from_bytes(num_output[:4], "little"),
        )

    def _look_at(self, outputs: Any) -> None:
        types = {output.name: output.datatype for output in outputs}
        if types.keys() == _PLAIN_OUTPUTS.keys() and all(types[name] in known for name, known in _PLAIN_OUTPUTS.items()):
            places = {name: place for place, name in enumerate(types)}
            self._num_plain, self._order = len(places), [places[name] for name in _PLAIN_OUTPUTS]


def _first_string(content: bytes) -> str:
    """Of a BYTES tensor's content; empty where it has none."""
    return content[4 : 4 + int.from_bytes(content[:4], "little")].decode(errors="replace") if content else ""


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
