"""`Session`: one conversation with the model in this process.

Every turn sends the whole conversation; the engine's prefix cache knows most of it, so only what is new is computed. Not
thread-safe, but for `cancel`, which any thread may call while an answer runs.
"""

import queue
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from turbotriton.contract.errors import InvalidInputError
from turbotriton.contract.wire import TokenDelta

from .call import Call, Job, Model, drain
from .options import GenerationConfig, Response
from .prompts import Message

__all__ = ["Session"]


class Session:
    """history: (question, answer) of every turn;  response: the last whole answer;  num_cached_tokens: of the last prompt."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        if system is not None and not model.prompt_format.has_chat:
            raise InvalidInputError("a system message needs a chat template; leave it out")
        self.history: list[tuple[str, str]] = []
        self.response: Response | None = None
        self.num_cached_tokens = 0
        self.is_cancelled = False  # the last answer
        self._model = model
        self._system = system
        self._running: tuple[int, ...] = ()  # written by ask, read by cancel
        self._is_closed = False

    def ask(self, prompt: str, gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True) -> Iterator[Response]:
        """Yields what the answer grows by; at its end it is in `history`. A cancelled answer stays as far as it came.

        After an error, or when the iterator is closed early, the conversation is as before.
        """
        if self._is_closed:
            raise InvalidInputError("the session is closed; begin another one")
        arrived: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
        job = Job(0, self._prompt_ids(prompt, do_preprocess=do_preprocess), gen_config or GenerationConfig())
        call = Call(self._model, iter([job]), arrived.put)
        whole = Response("", 0, len(job.prompt_ids), 0)
        self.is_cancelled = False
        try:
            waiting = call.fill()
            self._running = call.request_ids
            if self.is_cancelled:  # before there was anything to cancel
                self.cancel()
            while True:
                for delta in waiting:
                    _extend(whole, delta)
                    yield delta
                if call.is_over:
                    break
                deltas = drain(arrived)
                self.num_cached_tokens = deltas[-1].num_cached_tokens
                waiting = call.process(deltas, keeps_cancelled=self.is_cancelled)
        finally:
            self._running = ()
            call.close()
        self.response = whole
        if whole.finish_reason == "length" and not whole.generate_token_len:
            return  # too long to be run
        self.history.append((prompt, whole.text))

    def cancel(self) -> None:
        """Ends the running answer; nothing happens when none runs."""
        self.is_cancelled = True
        for request_id in self._running:
            self._model.engine.cancel(request_id)

    def _prompt_ids(self, prompt: str, *, do_preprocess: bool) -> list[int]:
        prompt_format = self._model.prompt_format
        if not do_preprocess or prompt_format.capability == "completion":
            return prompt_format.encode_text("".join(text for turn in self.history for text in turn) + prompt)
        if not prompt_format.has_chat:
            return prompt_format.encode_prompt(prompt)  # infilling, python: every text stands for itself
        messages: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        for question, answer in self.history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return prompt_format.encode_messages([*messages, {"role": "user", "content": prompt}])

    def close(self) -> None:
        """Ends the conversation. Idempotent."""
        self.history = []
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _extend(whole: Response, delta: Response) -> None:
    whole.text += delta.text
    whole.token_ids += delta.token_ids
    whole.generate_token_len = delta.generate_token_len
    whole.finish_reason = delta.finish_reason
    if delta.logprobs is not None:
        whole.logprobs = [*(whole.logprobs or []), *delta.logprobs]
