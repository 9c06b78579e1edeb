"""A gRPC server in this process that speaks both contracts with a byte tokenizer and a model that answers by rule.

The rules are a stand-in for a model, not for our doors: it checks what a client sends (order, shapes, half-close, step) and
records it. Answer to a text: "echo:" + the last question in capitals, one byte a token, then EOS.
"""

import json
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from turbotriton.client.kserve import build_request, read_outputs, strings

BOS, EOS, END = 1, 2, 3  # END is written <|end|>; bytes follow from BASE
BASE = 10
SPECIAL = {BOS: "<s>", EOS: "</s>", END: "<|end|>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def encode(text: str, *, add_bos: bool = True) -> list[int]:
    ids = [BOS] if add_bos else []
    while text:
        for token, word in SPECIAL.items():
            if text.startswith(word):
                ids.append(token)
                text = text[len(word) :]
                break
        else:
            ids += [BASE + byte for byte in text[0].encode()]
            text = text[1:]
    return ids


def decode(ids: Any, *, skip_special_tokens: bool = True) -> str:
    data = b""
    for token in ids:
        if token >= BASE:
            data += bytes([token - BASE])
        elif not skip_special_tokens:
            data += SPECIAL[token].encode()
    return data.decode(errors="replace")


def as_response(model_name: str, request_id: str, tensors: dict[str, Any]) -> service_pb2.ModelInferResponse:
    """build_request's encoding, turned into a response."""
    request = build_request(model_name, tensors)
    response = service_pb2.ModelInferResponse(model_name=model_name, id=request_id)
    for tensor in request.inputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    response.raw_output_contents.extend(request.raw_input_contents)
    return response


def read_inputs(request: service_pb2.ModelInferRequest) -> dict[str, Any]:
    names = [tensor.name for tensor in request.inputs]
    response = service_pb2.ModelInferResponse(model_name=request.model_name, raw_output_contents=request.raw_input_contents)
    response.outputs.extend(
        service_pb2.ModelInferResponse.InferOutputTensor(name=t.name, datatype=t.datatype, shape=t.shape) for t in request.inputs
    )
    outputs = read_outputs(response)
    assert list(outputs) == names
    return outputs


@dataclass
class Seen:
    """One request, as it arrived."""

    model: str
    id: str
    inputs: dict[str, Any]
    parameters: dict[str, Any]
    text: str = ""
    is_cancelled: bool = False


@dataclass
class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Use as a context manager; `url` is its address."""

    models: tuple[str, ...] = ("turbomind", "preprocessing", "postprocessing", "chatty")
    chat_template: str | None = CHAT_TEMPLATE
    token_delay_s: float = 0.0
    fail_stream_with: str | None = None  # error_message of the next stream
    fail_after: int | None = None  # cut the text stream after this many tokens
    has_bos: bool = True
    port: int = 0  # 0: a free one
    sessions: dict[int, list[int]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stops: dict[int, threading.Event] = {}
        self._held_after = 10**9
        self._may_go_on = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(16))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.url = f"127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeTriton":
        self._server.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.stop(0).wait()
        self.go_on()

    def hold_after(self, num_tokens: int) -> None:
        """Every answer stands still behind so many tokens, until `go_on`, or until it is cancelled."""
        self._may_go_on.clear()
        self._held_after = num_tokens

    def go_on(self) -> None:
        """No answer stands still any more."""
        self._held_after = 10**9
        self._may_go_on.set()

    def _hold(self, num_tokens: int, is_over: Callable[[], bool]) -> None:
        while num_tokens >= self._held_after and not is_over():
            self._may_go_on.wait(0.01)

    def of(self, model: str) -> list[Seen]:
        return [request for request in self.seen if request.model == model]

    # unary -----------------------------------------------------------------------------------------------------------
    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        reply = service_pb2.RepositoryIndexResponse()
        for name in self.models:
            reply.models.add(name=name, version="1", state="READY")
        return reply

    def ModelConfig(self, request: Any, context: Any) -> Any:
        if request.name not in self.models:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        reply = service_pb2.ModelConfigResponse()
        reply.config.name = request.name
        if request.name == "turbomind":
            reply.config.parameters["model_name"].string_value = "fakey"
            if self.chat_template is not None:
                reply.config.parameters["chat_template"].string_value = self.chat_template
        elif request.name not in ("preprocessing", "postprocessing"):
            reply.config.input.add(name="text_input")
            reply.config.output.add(name="text_output")
        return reply

    def ModelInfer(self, request: Any, context: Any) -> Any:
        inputs = read_inputs(request)
        if request.model_name == "preprocessing":
            query = inputs["QUERY"]
            assert query.shape == (1, 1)
            text = query[0, 0].decode()
            special = {"<BOS>": BOS if self.has_bos else 2**32 - 1, "<EOS>": EOS}
            ids = [special[text]] if text in special else encode(text, add_bos=self.has_bos)
            tensors = {"INPUT_ID": np.array([ids], np.uint32), "REQUEST_INPUT_LEN": np.array([[len(ids)]], np.uint32)}
            return as_response("preprocessing", request.id, tensors)
        assert request.model_name == "postprocessing"
        tokens, offset = inputs["TOKENS_BATCH"], inputs["sequence_length"]
        assert tokens.ndim == 3
        assert offset.shape == (1, 1)
        skip = bool(inputs["skip_special_tokens"][0, 0])
        text = decode(tokens[0, 0, offset[0, 0] :], skip_special_tokens=skip)
        return as_response("postprocessing", request.id, {"OUTPUT": strings([text])})

    # streams ---------------------------------------------------------------------------------------------------------
    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Any:
        requests = list(request_iterator)  # ends only when the client half-closes
        assert len(requests) == 1
        (request,) = requests
        seen = Seen(
            request.model_name,
            request.id,
            read_inputs(request),
            {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in request.parameters.items()},
        )
        self.seen.append(seen)
        assert not request.outputs
        if self.fail_stream_with is not None:
            text, self.fail_stream_with = self.fail_stream_with, None
            yield service_pb2.ModelStreamInferResponse(error_message=text)
            return
        answer = self._turbomind if request.model_name == "turbomind" else self._text
        is_done = False

        def note_end() -> None:  # runs when the RPC is over, also when the generator is never resumed
            seen.is_cancelled |= not is_done

        context.add_callback(note_end)
        try:
            for tensors in answer(seen, context):
                yield service_pb2.ModelStreamInferResponse(infer_response=as_response(request.model_name, request.id, tensors))
            is_done = True
        except _StreamError as error:
            yield service_pb2.ModelStreamInferResponse(error_message=str(error))

    def _turbomind(self, seen: Seen, context: Any) -> Any:
        def scalar(name: str) -> int:
            assert seen.inputs[name].shape == (1, 1)
            return int(seen.inputs[name][0, 0])

        corrid = scalar("CORRID")
        ids = [int(token) for token in seen.inputs["input_ids"].reshape(-1)]
        assert len(ids) == scalar("input_lengths")
        if scalar("STOP"):
            event = self._stops.get(corrid)
            if event is None:
                raise _StreamError("TurboMind execute failure:  4")
            event.set()
            yield self._sequence(self.sessions[corrid])
            return
        if scalar("START"):
            self.sessions[corrid] = []
        if corrid not in self.sessions:
            raise _StreamError("TurboMind execute failure:  1")
        session = self.sessions[corrid] = self.sessions[corrid][: scalar("step")] + ids
        seen.text = decode(session, skip_special_tokens=False)
        if scalar("END"):
            yield self._sequence(session)
            del self.sessions[corrid]
            return
        stop = self._stops[corrid] = threading.Event()
        try:
            answer = [*encode(reply_to(seen.text), add_bos=False), EOS][: scalar("request_output_len")]
            for number, token in enumerate(answer):
                self._hold(number, lambda: stop.is_set() or not context.is_active())
                if stop.wait(self.token_delay_s) or not context.is_active():
                    break
                session.append(token)
                yield self._sequence(session)
            yield self._sequence(session)
        finally:
            seen.is_cancelled |= stop.is_set()
            del self._stops[corrid]

    @staticmethod
    def _sequence(session: list[int]) -> dict[str, Any]:
        padded = np.zeros((1, 1, 4096), np.uint32)  # the original sends session_len columns, the rest undefined
        padded[0, 0, : len(session)] = session
        return {"output_ids": padded, "sequence_length": np.array([[len(session)]], np.uint32)}

    def _text(self, seen: Seen, context: Any) -> Any:
        inputs = seen.inputs
        if "messages" in inputs:
            seen.text = json.loads(inputs["messages"][0])[-1]["content"]
        elif "text_input" in inputs:
            seen.text = inputs["text_input"][0].decode()
        else:
            seen.text = decode(inputs["input_ids"])
        answer = "echo:" + seen.text.upper()
        limit = int(inputs["max_tokens"][0]) if "max_tokens" in inputs else 10**6
        pieces = list(answer)[:limit]
        reason = "length" if len(answer) > limit else "stop"
        if not inputs["stream"][0]:
            self._hold(len(pieces), lambda: not context.is_active())
            time.sleep(self.token_delay_s)
            yield self._delta("".join(pieces), reason, len(seen.text), len(pieces))
            return
        for index, piece in enumerate(pieces):
            if self.fail_after is not None and index >= self.fail_after:
                return
            self._hold(index, lambda: not context.is_active())
            time.sleep(self.token_delay_s)
            if not context.is_active():
                return
            yield self._delta(piece, "", len(seen.text), index + 1)
        yield self._delta("", reason, len(seen.text), len(pieces))

    @staticmethod
    def _delta(text: str, reason: str, num_input: int, num_output: int) -> dict[str, Any]:
        return {
            "text_output": strings([text]),
            "output_ids": np.array([BASE + byte for byte in text.encode()], np.int32),
            "finish_reason": strings([reason]),
            "num_input_tokens": np.array([num_input], np.int32),
            "num_output_tokens": np.array([num_output], np.int32),
        }


class _StreamError(Exception):
    """Becomes the stream's error_message."""


def reply_to(text: str) -> str:
    """The answer to a rendered conversation or a raw text."""
    question = text.rsplit("<user>", 1)[-1].split("<|end|>")[0] if "<user>" in text else text.replace("<s>", "")
    return "echo:" + question.upper()
