"""The three LMDeploy doors (`turbomind`, `preprocessing`, `postprocessing`) as calls: one method an RPC, tensors as theirs.

Knows the tensors and their order, the error codes and the two special queries; no chat, no history (`session.py` has them).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from turbotriton.contract.errors import InvalidInputError, ServerError, TurbotritonError, UnavailableError

from .kserve import (
    Tensor,
    build_request,
    channel_options,
    check_url,
    drain,
    error_from_rpc,
    error_from_text,
    make_stub,
    read_outputs,
    strings,
)

__all__ = ["ChatSampling", "ServedModel", "SessionLostError", "Step", "TurbomindDoor"]

TOKENIZE_TIMEOUT_S = 30.0
_EXECUTE_FAILURE = re.compile(r"TurboMind execute failure:\s+(\d+)")
NO_TOKEN = 2**32 - 1  # what preprocessing answers for <BOS> or <EOS> when the tokenizer has none


class SessionLostError(ServerError):
    """The server does not know the session (any more): start it again with the whole history."""


class ServedModel(NamedTuple):
    name: str
    chat_template: str | None  # Jinja source
    bos_id: int | None
    bos_text: str
    eos_id: int | None
    eos_text: str


class Step(NamedTuple):
    """One response of a turn: the whole sequence so far (only its first `length` ids count)."""

    output_ids: npt.NDArray[np.uint32]
    length: int


@dataclass(frozen=True, slots=True)
class ChatSampling:
    """What a turn sends beside its tokens; LMDeploy's defaults, which are greedy (top_k 1)."""

    max_tokens: int = 512
    top_p: float = 1.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    top_k: int | None = 1
    seed: int | None = None  # read by the server when a session starts

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("temperature", 0 <= self.temperature <= 100, "from 0 to 100"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            ("top_k", self.top_k is None or 0 <= self.top_k < 2**31, "0 (off) or a positive 32-bit count"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "an unsigned 64-bit number"),
        )
        for name, ok, rule in rules:
            if not ok:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; it must be {rule}")


class TurbomindDoor:
    """A channel to the three models. Thread-safe: `stop` is called while another thread reads a turn."""

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        self._channel = grpc.insecure_channel(self.url, options=channel_options(self.url))
        self._stub = make_stub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def served_model(self) -> ServedModel:
        """Raises InvalidInputError when the server has no `turbomind` model, UnavailableError when there is no server."""
        try:
            config = self._stub.ModelConfig(service_pb2.ModelConfigRequest(name="turbomind"), timeout=TOKENIZE_TIMEOUT_S).config
        except grpc.RpcError as error:
            failure = error_from_rpc(error, self.url)
            if isinstance(failure, InvalidInputError) or "turbomind" in str(failure):
                raise InvalidInputError(
                    f"{self.url} serves no ready model `turbomind` ({failure}); was it converted with --doors text?"
                ) from None
            raise failure from None
        template = config.parameters["chat_template"].string_value if "chat_template" in config.parameters else None
        name = config.parameters["model_name"].string_value if "model_name" in config.parameters else "turbomind"
        bos_id, bos_text = self._special("<BOS>")
        eos_id, eos_text = self._special("<EOS>")
        return ServedModel(name, template, bos_id, bos_text, eos_id, eos_text)

    def _special(self, query: str) -> tuple[int | None, str]:
        token = self.tokenize(query)[0]
        return (None, "") if token == NO_TOKEN else (token, self.detokenize([token], 0, skip_special_tokens=False))

    def tokenize(self, text: str) -> list[int]:
        """text's ids, with whatever the tokenizer puts before a text (BOS)."""
        outputs = self._infer("preprocessing", {"QUERY": strings([text]).reshape(1, 1)})
        length = int(outputs["REQUEST_INPUT_LEN"].ravel()[0])
        return [int(token) for token in outputs["INPUT_ID"].reshape(-1)[:length]]

    def detokenize(self, ids: Sequence[int], offset: int, *, skip_special_tokens: bool = True) -> str:
        """The text of ids[offset:], as it reads after ids[:offset]."""
        tensors: dict[str, Tensor] = {
            "TOKENS_BATCH": np.array(ids, dtype=np.uint32).reshape(1, 1, -1),
            "sequence_length": np.array([[offset]], dtype=np.uint32),
            "skip_special_tokens": np.array([[int(skip_special_tokens)]], dtype=np.int32),
        }
        return bytes(self._infer("postprocessing", tensors)["OUTPUT"].ravel()[0]).decode(errors="replace")

    def _infer(self, model_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            return read_outputs(self._stub.ModelInfer(build_request(model_name, tensors), timeout=TOKENIZE_TIMEOUT_S))
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.url) from None

    def run(
        self,
        session_id: int,
        request_id: str,
        ids: Sequence[int],
        step: int,
        sampling: ChatSampling,
        *,
        start: bool = False,
        end: bool = False,
        stop: bool = False,
        timeout: float | None = None,
    ) -> Iterator[Step]:
        """One request on its own half-closed stream: keep `step` tokens of the session, append ids, generate.

        Yields what the server sends until it closes. Closing the generator closes the stream. Raises SessionLostError for
        LMDeploy's code 1, the other codes as one line with a remedy.
        """
        tensors = _turn_tensors(session_id, ids, step, sampling, start=start, end=end, stop=stop)
        parameters: dict[str, bool | int | str] = {"sequence_start": start, "sequence_end": end}
        if session_id:
            parameters = {"sequence_id": session_id, **parameters}
        request = build_request("turbomind", tensors, request_id=request_id, parameters=parameters)
        call = self._stub.ModelStreamInfer(iter([request]), timeout=timeout)
        try:
            for response in call:
                if response.error_message:
                    drain(call)
                    raise _error_from_code(response.error_message, session_id)
                outputs = read_outputs(response.infer_response)
                if "sequence_length" in outputs:
                    length = int(outputs["sequence_length"].ravel()[-1])
                    yield Step(np.asarray(outputs["output_ids"].reshape(-1)[:length], dtype=np.uint32), length)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.url) from None
        finally:
            call.cancel()


def _turn_tensors(
    session_id: int, ids: Sequence[int], step: int, sampling: ChatSampling, *, start: bool, end: bool, stop: bool
) -> dict[str, Tensor]:
    """The inputs of the `turbomind` model, in LMDeploy's order, each with the batch dimension of 1."""

    def scalar(value: Any, dtype: type[np.generic]) -> Tensor:
        return np.array([[value]], dtype=dtype)

    tensors: dict[str, Tensor] = {
        "input_ids": np.array(ids, dtype=np.uint32).reshape(1, -1),
        "input_lengths": scalar(len(ids), np.uint32),
        "request_output_len": scalar(sampling.max_tokens, np.uint32),
        "runtime_top_p": scalar(sampling.top_p, np.float32),
        "temperature": scalar(sampling.temperature, np.float32),
        "repetition_penalty": scalar(sampling.repetition_penalty, np.float32),
        "step": scalar(step, np.int32),
    }
    if sampling.top_k is not None:
        tensors["runtime_top_k"] = scalar(sampling.top_k, np.uint32)
    tensors |= {
        "START": scalar(int(start), np.int32),
        "END": scalar(int(end), np.int32),
        "CORRID": scalar(session_id, np.uint64),
        "STOP": scalar(int(stop), np.int32),
    }
    if start and sampling.seed is not None:
        tensors["random_seed"] = scalar(sampling.seed, np.uint64)
    return tensors


def _error_from_code(text: str, session_id: int) -> TurbotritonError:
    match = _EXECUTE_FAILURE.search(text)
    if match is None:
        return error_from_text(text)
    code = int(match.group(1))
    if code == 1:
        return SessionLostError(f"the server does not hold session {session_id} ({text.strip()}); it has to be started again")
    if code == 3:
        return UnavailableError(f"session {session_id} is answering another request; wait, or choose another --session-id")
    if code == 6:
        return InvalidInputError("the conversation is longer than the server's session_len; type `end` to start a new one")
    return error_from_text(text)
