"""`ChatSession`: one conversation over the LMDeploy contract, whose history lives on the server as tokens.

What is kept here is the list of messages and the text that the server's tokens stand for:

    rendered now     |<---------- held text ---------->|<--- suffix --->|     the chat template over all messages
    server's tokens  |<- prompt ->|<- answer (no EOS) ->|                      num_held tokens
    next request                                step = num_held, input_ids = tokens of the suffix

Invariant: the first `_num_held` tokens of the server's session read as `_held_text`, or `_held_text` is None (START again).
A template that rewrites earlier turns breaks the prefix; then the session is started again with the whole text, as it is
when the server has lost it. Not thread-safe, but for `cancel`, which any thread may call while `ask` runs.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from turbotriton.contract.errors import InvalidInputError, ServerError, TurbotritonError

from .turbomind_door import ChatSampling, ServedModel, SessionLostError, TurbomindDoor

__all__ = ["ChatSession", "Message", "TurnStats"]

Message = dict[str, str]
CANCEL_TRIES = 50
CANCEL_RETRY_S = 0.2
MAX_SESSION_ID = 2**63 - 1  # also travels as the gRPC parameter sequence_id, an int64


@dataclass(frozen=True, slots=True)
class TurnStats:
    num_kept_tokens: int  # of the session, not sent again
    num_sent_tokens: int
    num_output_tokens: int  # without EOS
    first_token_s: float | None
    total_s: float
    is_cancelled: bool

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first response; of the whole turn when there was only one."""
        if self.first_token_s is not None and self.num_output_tokens > 1 and self.total_s > self.first_token_s:
            return (self.num_output_tokens - 1) / (self.total_s - self.first_token_s)
        return self.num_output_tokens / self.total_s if self.total_s > 0 else 0.0


class _Turn(NamedTuple):
    text: str  # the whole conversation, rendered
    ids: list[int]  # what is sent of it
    step: int
    start: bool


class ChatSession:
    """`render` turns messages into the model's text (None: the question is sent as it is, LMDeploy's --cap completion)."""

    def __init__(
        self,
        door: TurbomindDoor,
        model: ServedModel,
        session_id: int,
        *,
        render: Callable[[Sequence[Message]], str] | None,
        system: str | None = None,
        sampling: ChatSampling | None = None,
    ) -> None:
        if not 0 < session_id <= MAX_SESSION_ID:
            raise InvalidInputError(f"session id is {session_id}; it must be from 1 to {MAX_SESSION_ID}")
        if system is not None and render is None:
            raise InvalidInputError("a system prompt needs the chat template; leave out --system or use --cap chat")
        self._door = door
        self._model = model
        self._render = render
        self._system = system
        self.session_id = session_id
        self.sampling = sampling or ChatSampling()
        self.messages: list[Message] = []
        self.last_turn: TurnStats | None = None
        self._held_text: str | None = None
        self._num_held = 0
        self._round = 0
        self._is_cancelled = False  # written by cancel(), reset by ask()
        self._turn_over = threading.Event()  # a new one each turn, made and set by ask()
        self._turn_over.set()
        self.clear_messages()

    def clear_messages(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._held_text, self._num_held = None, 0

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer in pieces of whole characters; at the end `messages` and `last_turn` are up to date.

        After an error the conversation is as before the question. An answer that was cancelled stays, as far as it came.
        Closing the iterator early drops question and answer; `cancel` is the way to keep them.
        """
        self._round += 1
        self._is_cancelled = False
        turn_over = self._turn_over = threading.Event()
        try:
            turn = self._plan(question)
            try:
                yield from self._run(turn, question)
            except SessionLostError:
                if turn.start:
                    raise
                yield from self._run(self._start_again(question), question)
        finally:
            turn_over.set()

    def cancel(self) -> None:
        """Interrupts the running answer through a second stream and waits until it has ended. Nothing happens when none runs.

        The request may be on its way to the server still, where STOP finds nothing to stop; so it is sent until it took.
        Raises ServerError when the answer goes on after CANCEL_TRIES of them.
        """
        turn_over = self._turn_over
        self._is_cancelled = True
        for _ in range(CANCEL_TRIES):
            if turn_over.is_set():
                return
            self._send_stop()
            if turn_over.wait(CANCEL_RETRY_S):
                return
        raise ServerError(f"the server did not stop session {self.session_id}; press Ctrl-C again to leave")

    def _send_stop(self) -> None:
        stop = ChatSampling(max_tokens=0)
        try:
            for _ in self._door.run(self.session_id, self._request_id, [], self._num_held, stop, stop=True, timeout=10):
                pass
        except SessionLostError:
            pass
        except TurbotritonError as error:
            if "failure:  4" not in str(error):  # 4: nothing runs (yet, or any more)
                raise

    def end(self) -> None:
        """Frees the session on the server and forgets the conversation."""
        try:
            if self._held_text is not None:
                sampling = ChatSampling(max_tokens=0)
                for _ in self._door.run(self.session_id, "", [1], self._num_held, sampling, end=True, timeout=10):
                    pass
        except SessionLostError:
            pass
        finally:
            self.clear_messages()

    @property
    def _request_id(self) -> str:
        return f"{self.session_id}-{self._round}"

    def _text(self, question: str) -> str:
        if self._render is None:
            return self._completion_text() + question
        return self._render([*self.messages, {"role": "user", "content": question}])

    def _completion_text(self) -> str:
        return "".join(message["content"] for message in self.messages)

    def _plan(self, question: str) -> _Turn:
        text = self._text(question)
        held = self._held_text
        if held is None or not text.startswith(held) or len(text) == len(held):
            return self._start_again(question)
        return _Turn(text, self._tokenize(text[len(held) :], is_start=False), self._num_held, False)

    def _start_again(self, question: str) -> _Turn:
        self._held_text, self._num_held = None, 0
        text = self._text(question)
        return _Turn(text, self._tokenize(text, is_start=True), 0, True)

    def _tokenize(self, text: str, *, is_start: bool) -> list[int]:
        """Ids of text. preprocessing puts BOS before every text: here it stays only where the conversation starts, and with
        a chat template only if the template itself wrote it (once)."""
        ids = self._door.tokenize(text)
        bos = self._model.bos_id
        if bos is None:
            return ids
        keeps_bos = is_start and (self._render is None or text.startswith(self._model.bos_text))
        num_bos = 0
        while num_bos < len(ids) and ids[num_bos] == bos:
            num_bos += 1
        if num_bos == 0:
            return ids
        return ids[num_bos - 1 :] if keeps_bos else ids[num_bos:]

    def _run(self, turn: _Turn, question: str) -> Iterator[str]:
        started = time.monotonic()
        first_token_s: float | None = None
        num_prompt = turn.step + len(turn.ids)
        answer, num_decoded, ids = "", 0, []
        steps = self._door.run(self.session_id, self._request_id, turn.ids, turn.step, self.sampling, start=turn.start)
        for step in steps:
            ids = [int(token) for token in step.output_ids[num_prompt:]]
            if len(ids) <= num_decoded:
                continue
            if first_token_s is None:
                first_token_s = time.monotonic() - started
            piece = self._door.detokenize(ids, num_decoded)
            if piece.endswith("\ufffd"):  # the character's other bytes are still to come
                continue
            answer, num_decoded = answer + piece, len(ids)
            if piece:
                yield piece
        total_s = time.monotonic() - started
        num_output = len(ids)
        if ids and self._is_special(ids[-1]):
            num_output -= 1
            ids = ids[:-1]
        num_clean = min(num_decoded, num_output)
        tail = self._door.detokenize(ids, num_decoded) if num_decoded < num_output else ""
        if tail:
            yield tail
        self._held_text, self._num_held = turn.text + answer, num_prompt + num_clean
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer + tail}]
        self.last_turn = TurnStats(turn.step, len(turn.ids), num_output, first_token_s, total_s, is_cancelled=self._is_cancelled)

    def _is_special(self, token: int) -> bool:
        """Whether token is EOS or another special token, which the next rendering writes again."""
        if token == self._model.eos_id:
            return True
        return self._door.detokenize([token], 0) == "" and self._door.detokenize([token], 0, skip_special_tokens=False) != ""
