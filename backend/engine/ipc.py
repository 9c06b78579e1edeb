"""Frames between a door and the engine over a Unix stream socket: a 4-byte little-endian length, then msgpack. No pickle.

    door -> engine   ["submit", request fields]   ["cancel", request_id]   ["cancel_named", name]
    engine -> door   ["hello", EngineInfo fields]   ["deltas", packed]   ["stats", EngineStats fields]

A "deltas" frame carries all that one step has for one connection, as flat arrays:

    [request ids (int64) | token counts (uint16) | finish codes (uint8) | token ids (int32) | extras]

where `extras` maps the few positions that have logprobs, an error or final figures to a small map.
"""

import contextlib
import dataclasses
import socket
import struct
import threading
from array import array
from collections.abc import Sequence
from typing import Any

import msgpack

from turbotriton.contract.errors import InvalidInputError, ServerError
from turbotriton.contract.wire import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    RequestTimings,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
)

__all__ = [
    "FrameSocket",
    "decode_deltas",
    "decode_info",
    "decode_request",
    "decode_stats",
    "encode_deltas",
    "encode_fields",
    "encode_request",
]

MAX_FRAME_BYTES = 256 * 1024 * 1024
_LENGTH = struct.Struct("<I")
_FINISH_CODES = (None, *FinishReason)


class FrameSocket:
    """Sends and receives whole frames. One reader thread; any number of senders."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._send_lock = threading.Lock()
        self._reader = sock.makefile("rb", buffering=1 << 16)

    def send(self, kind: str, payload: Any) -> None:
        """Raises OSError when the other side is gone."""
        body = msgpack.packb([kind, payload], use_bin_type=True)
        if len(body) > MAX_FRAME_BYTES:
            raise InvalidInputError(f"a message of {len(body)} bytes passes the limit of {MAX_FRAME_BYTES}")
        with self._send_lock:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> tuple[str, Any] | None:
        """The next frame, or None when the other side has closed. Raises ServerError on anything that is no frame of ours."""
        try:
            header = self._reader.read(_LENGTH.size)
            if len(header) < _LENGTH.size:
                return None
            (size,) = _LENGTH.unpack(header)
            if size > MAX_FRAME_BYTES:
                raise ServerError(f"a frame of {size} bytes passes the limit of {MAX_FRAME_BYTES}")
            body = self._reader.read(size)
        except (OSError, ValueError):  # reset, or closed by another thread
            return None
        if len(body) < size:
            return None
        try:
            kind, payload = msgpack.unpackb(body, raw=False, strict_map_key=False)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ServerError(f"a frame on the engine's socket cannot be read: {error}") from None
        if not isinstance(kind, str):
            raise ServerError("a frame on the engine's socket has no kind")
        return kind, payload

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it was closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def encode_fields(value: EngineInfo | EngineStats) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def decode_info(payload: Any) -> EngineInfo:
    try:
        return EngineInfo(**{**payload, "eos_token_ids": tuple(payload["eos_token_ids"])})
    except (TypeError, KeyError) as error:
        raise ServerError(f"the engine's greeting cannot be read ({error}): are both sides of one version?") from None


def decode_stats(payload: Any) -> EngineStats:
    """Raises ServerError for what no engine of ours sends."""
    if not isinstance(payload, dict) or not payload.keys() <= {field.name for field in dataclasses.fields(EngineStats)}:
        raise ServerError("the engine's stats cannot be read: are both sides of one version?")
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in payload.items()}
    return EngineStats(**fields)


def encode_request(request: GenerateRequest) -> dict[str, Any]:
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    fields["prompt_ids"] = array("q", request.prompt_ids).tobytes()
    fields["sampling"] = {field.name: getattr(request.sampling, field.name) for field in dataclasses.fields(SamplingParams)}
    return fields


def decode_request(payload: Any) -> GenerateRequest:
    """Raises InvalidInputError when a field is unknown, missing or out of range."""
    try:
        sampling = dict(payload["sampling"])
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
        for name in ("stop_sequences", "bad_sequences"):
            sampling[name] = tuple(tuple(sequence) for sequence in sampling[name])
        sampling["logit_bias"] = tuple((token_id, bias) for token_id, bias in sampling["logit_bias"])
        sampling["guided"] = None if sampling["guided"] is None else tuple(sampling["guided"])
        prompt_ids = array("q")
        prompt_ids.frombytes(payload["prompt_ids"])
        for name in ("request_id", "sample_index", "priority"):
            if type(payload[name]) is not int:
                raise TypeError(f"{name} is {payload[name]!r}")
        if not isinstance(payload["name"], str) or not isinstance(payload["deadline_ms"], int | None):
            raise TypeError(f"name is {payload['name']!r}, deadline_ms is {payload['deadline_ms']!r}")
        return GenerateRequest(**{**payload, "prompt_ids": tuple(prompt_ids), "sampling": SamplingParams(**sampling)})
    except (TypeError, KeyError, ValueError) as error:
        raise InvalidInputError(f"the request cannot be read: {error}") from None


def encode_deltas(deltas: Sequence[TokenDelta]) -> list[Any]:
    extras: dict[int, dict[str, Any]] = {}
    for position, delta in enumerate(deltas):
        extra: dict[str, Any] = {}
        if delta.logprobs:
            extra["logprobs"] = _encode_logprobs(delta.logprobs)
        if delta.prompt_logprobs:
            extra["prompt_logprobs"] = _encode_logprobs(delta.prompt_logprobs)
        if delta.error is not None:
            extra["error"] = (delta.error, delta.error_status)
        if delta.finish_reason is not None:
            timings = delta.timings
            extra["final"] = (
                delta.num_prompt_tokens,
                delta.num_cached_tokens,
                delta.stop_token_matched,
                None if timings is None else (timings.queue_s, timings.time_to_first_token_s, timings.e2e_s),
            )
        if extra:
            extras[position] = extra
    return [
        array("q", [delta.request_id for delta in deltas]).tobytes(),
        array("H", [len(delta.token_ids) for delta in deltas]).tobytes(),
        bytes(_FINISH_CODES.index(delta.finish_reason) for delta in deltas),
        array("i", [token_id for delta in deltas for token_id in delta.token_ids]).tobytes(),
        extras,
    ]


def decode_deltas(payload: Sequence[Any]) -> list[TokenDelta]:
    """Raises ServerError for what no engine of ours sends."""
    try:
        return _decode_deltas(payload)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ServerError(f"the engine's deltas cannot be read ({error}): are both sides of one version?") from None


def _decode_deltas(payload: Sequence[Any]) -> list[TokenDelta]:
    request_ids, counts, token_ids = array("q"), array("H"), array("i")
    request_ids.frombytes(payload[0])
    counts.frombytes(payload[1])
    token_ids.frombytes(payload[3])
    ids, extras = token_ids.tolist(), payload[4]
    deltas = []
    begin = 0
    for position, (request_id, count, code) in enumerate(zip(request_ids, counts, payload[2], strict=True)):
        end = begin + count
        if not code and position not in extras:  # nearly all
            deltas.append(TokenDelta(request_id, tuple(ids[begin:end])))
            begin = end
            continue
        extra = extras.get(position, {})
        error, error_status = extra.get("error", (None, "INTERNAL"))
        num_prompt, num_cached, stop_matched, timings = extra.get("final", (0, 0, False, None))
        deltas.append(
            TokenDelta(
                request_id=request_id,
                token_ids=tuple(ids[begin:end]),
                logprobs=_decode_logprobs(extra.get("logprobs", ())),
                prompt_logprobs=_decode_logprobs(extra.get("prompt_logprobs", ())),
                finish_reason=_FINISH_CODES[code],
                stop_token_matched=stop_matched,
                error=error,
                error_status=error_status,
                num_prompt_tokens=num_prompt,
                num_cached_tokens=num_cached,
                timings=None if timings is None else RequestTimings(*timings),
            )
        )
        begin = end
    return deltas


def _encode_logprobs(entries: Sequence[TokenLogprobs]) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    return [(entry.token_logprob, entry.top) for entry in entries]


def _decode_logprobs(entries: Sequence[Any]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(value, tuple((token_id, logprob) for token_id, logprob in top)) for value, top in entries)
