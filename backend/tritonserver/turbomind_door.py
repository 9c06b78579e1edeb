"""The `turbomind` door: LMDeploy's token contract. Sessions live here as token ids; the engine sees plain requests.

    input_ids of this turn  ->  [kept tokens | input_ids]  ->  engine  ->  the whole sequence so far, in every response

Exactly request_output_len tokens are made; 0 prefills and answers with the length alone.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from turbotriton.contract.errors import InvalidInputError, TurbotritonError, UnavailableError
from turbotriton.contract.wire import MAX_SEED, GenerateRequest, SamplingParams, TokenDelta

from .connection import EngineConnection
from .door import DecoupledDoor, final_error
from .errors import triton_error
from .inputs import check_parameters, read_array, read_float, read_int
from .responder import Mailbox, Responder
from .sessions import Session, SessionError, SessionStore, execution_failure

__all__ = ["TritonPythonModel"]

logger = logging.getLogger(__name__)

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
UINT32 = 2**32 - 1
MAX_WORD_COLUMNS = 32
MAX_TOP_K = 1024


@dataclass(frozen=True, slots=True)
class _Turn:
    """One request's tensors, checked."""

    session_id: int
    input_ids: tuple[int, ...]
    num_new_tokens: int
    step: int | None
    start: bool
    end: bool
    stop: bool
    seed: int | None
    sampling: SamplingParams  # checked before the session changes; start adds the session's seed


class _TurnAnswer:
    """Cumulative responses: the whole sequence after each batch of deltas."""

    def __init__(self, door: "TritonPythonModel", session_id: int, session: Session) -> None:
        self._door = door
        self._session_id = session_id
        self._session = session
        self._sequence = np.array(session.token_ids, dtype=np.uint32)  # with room behind it once it grows
        self._length = self._sequence.size

    def _extend(self, token_ids: Sequence[int]) -> None:
        end = self._length + len(token_ids)
        if end > self._sequence.size:
            self._sequence = np.concatenate((self._sequence[: self._length], np.empty(end, dtype=np.uint32)))
        self._sequence[self._length : end] = token_ids
        self._length = end

    def take(self, deltas: Sequence[TokenDelta]) -> tuple[list[Any], bool]:
        session = self._session
        is_over = False
        failed = next((delta for delta in deltas if delta.error is not None), None)
        with self._door.lock:
            for delta in deltas:
                session.token_ids.extend(delta.token_ids)
                self._extend(delta.token_ids)
                is_over |= delta.finish_reason is not None
            if failed is not None:
                self._door.sessions.failed(self._session_id, session)
            elif is_over:
                self._door.sessions.done(self._session_id, session)
        if failed is not None:
            error = final_error(failed)
            return [pb_utils.InferenceResponse(error=triton_error(error, execution_failure(error)))], True
        return [_sequence_response(self._sequence[: self._length])], is_over


def _sequence_response(token_ids: Any) -> Any:
    length = np.array([[token_ids.size]], dtype=np.uint32)
    return pb_utils.InferenceResponse(
        output_tensors=[pb_utils.Tensor("output_ids", token_ids.reshape(1, 1, -1)), pb_utils.Tensor("sequence_length", length)]
    )


class TritonPythonModel(DecoupledDoor):
    needs = ("weights",)

    def open(self, folder: Path, args: dict[str, str], server_pid: int) -> None:
        self.lock = threading.Lock()
        self.sessions = SessionStore()
        self._connection = EngineConnection(folder / "weights", server_pid)
        self._info = self._connection.connect().info
        self._responder = Responder()

    def is_ready(self) -> bool:
        """Asked by servers that know this hook (26.03 and newer)."""
        return self._is_filled and self._connection.is_up

    def error_text(self, error: TurbotritonError) -> str:
        """LMDeploy's words for its codes; anything that is no fault of the values is its kFail."""
        if isinstance(error, SessionError):
            return str(error)
        return super().error_text(error) if isinstance(error, InvalidInputError | UnavailableError) else execution_failure(error)

    def start(self, request: Any, sender: Any) -> None:
        turn = _read_turn(request)
        if turn.stop:
            self._stop(turn, sender)
            return
        client = self._connection.client()
        if turn.end and not turn.start and turn.num_new_tokens == 0:
            self._erase(turn, sender)
            return
        request_id = client.next_request_id()
        with self.lock:
            session = self.sessions.begin(
                turn.session_id,
                turn.input_ids,
                start=turn.start,
                end=turn.end,
                step=turn.step,
                seed=turn.seed,
                session_len=self._info.session_len,
                request=lambda: client.cancel(request_id),
            )
            prompt_ids, seed = tuple(session.token_ids), session.seed
        room = self._info.session_len - len(prompt_ids)  # begin has seen to it that there is some, or none
        sampling = replace(turn.sampling, max_new_tokens=min(turn.num_new_tokens, room), seed=seed)
        mailbox = Mailbox(sender, _TurnAnswer(self, turn.session_id, session), client, [request_id])
        self._responder.open(mailbox)
        self._responder.submit(mailbox, GenerateRequest(request_id, prompt_ids, sampling))

    def _stop(self, turn: _Turn, sender: Any) -> None:
        """Interrupts what runs for the session; that request gets its normal last response on its own stream."""
        with self.lock:
            session = self.sessions.stop(turn.session_id, start=turn.start, end=turn.end)
            interrupt, token_ids = session.running, np.array(session.token_ids, dtype=np.uint32)
        if callable(interrupt):
            interrupt()
        sender.send(_sequence_response(token_ids), flags=FINAL)

    def _erase(self, turn: _Turn, sender: Any) -> None:
        """END with nothing to generate: the session goes, without work for the engine."""
        with self.lock:
            session = self.sessions.begin(
                turn.session_id,
                (),
                start=False,
                end=True,
                step=turn.step,
                seed=None,
                session_len=self._info.session_len,
                request=self,
            )
            token_ids = np.array(session.token_ids, dtype=np.uint32)
            self.sessions.done(turn.session_id, session)
        sender.send(_sequence_response(token_ids), flags=FINAL)

    def close(self) -> None:
        self._connection.close()
        self._responder.close()


def _read_turn(request: Any) -> _Turn:
    """Raises InvalidInputError naming the tensor and its value."""
    check_parameters(request)
    ids = read_array(request, "input_ids")
    length = read_int(request, "input_lengths", 0, UINT32)
    num_new_tokens = read_int(request, "request_output_len", 0, UINT32)
    if ids is None or length is None or num_new_tokens is None:
        required = {"input_ids": ids, "input_lengths": length, "request_output_len": num_new_tokens}
        missing = [name for name, value in required.items() if value is None]
        raise InvalidInputError(f"{' and '.join(missing)} missing; every request needs {', '.join(required)}")
    if length > ids.size:
        raise InvalidInputError(f"input_lengths is {length} and input_ids has {ids.size} ids")
    beam_width = read_int(request, "beam_width", 0, UINT32)
    if beam_width not in (None, 1):
        raise InvalidInputError(f"beam_width is {beam_width}; it must be 1: beam search is not implemented")
    for name in ("input_embeddings", "input_embedding_ranges"):
        array = read_array(request, name)
        if array is not None and array.size:
            raise InvalidInputError(f"{name} is not supported: this model takes text only")
    flags = {name: read_int(request, name, 0, 1) for name in ("START", "END", "STOP")}
    return _Turn(
        session_id=read_int(request, "CORRID", 0, MAX_SEED) or 0,
        input_ids=tuple(ids[:length].tolist()),
        num_new_tokens=num_new_tokens,
        step=read_int(request, "step", -(2**31), 2**31 - 1),
        start=flags["START"] != 0,  # default 1
        end=flags["END"] != 0,  # default 1
        stop=flags["STOP"] == 1,  # default 0
        seed=read_int(request, "random_seed", 0, MAX_SEED),
        sampling=_read_sampling(request, num_new_tokens),
    )


def _read_sampling(request: Any, num_new_tokens: int) -> SamplingParams:
    """TurboMind's reading of its sampling tensors: k = 0 and p = 0 is greedy, k > 0 and p = 0 is p = 1, k is capped."""
    top_k = read_int(request, "runtime_top_k", 0, UINT32)
    top_p = read_float(request, "runtime_top_p")
    top_k = 1 if top_k is None and not top_p else top_k or 0
    top_p = min(max(top_p or 0.0, 0.0), 1.0)
    if top_k == 0 and top_p == 0:
        top_k = 1
    temperature = read_float(request, "temperature")
    repetition_penalty = read_float(request, "repetition_penalty")
    return SamplingParams(
        max_new_tokens=num_new_tokens,
        top_k=min(top_k, MAX_TOP_K),
        top_p=top_p or 1.0,
        temperature=1.0 if temperature is None else temperature,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        stop_sequences=_read_words(request, "stop_words_list"),
        bad_sequences=_read_words(request, "bad_words_list"),
    )


def _read_words(request: Any, name: str) -> tuple[tuple[int, ...], ...]:
    """[2, n]: row 0 the ids of all words one after the other, row 1 where each word ends, padded with -1."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return ()
    array = np.array(tensor.as_numpy())
    if array.ndim != 3 or array.shape[:2] != (1, 2) or array.shape[2] > MAX_WORD_COLUMNS:
        raise InvalidInputError(f"{name} has shape {list(array.shape)}; it must be [1, 2, n] with n up to {MAX_WORD_COLUMNS}")
    ids, ends = array[0].tolist()
    words, begin = [], 0
    for end in ends:
        if end == -1:
            break
        if not begin < end <= len(ids):
            raise InvalidInputError(f"{name} has the end offset {end} after {begin}, of {len(ids)} ids; offsets must rise")
        if min(ids[begin:end]) < 0:
            raise InvalidInputError(f"{name} has the id {min(ids[begin:end])}; ids are 0 or more")
        words.append(tuple(ids[begin:end]))
        begin = end
    return tuple(words)
