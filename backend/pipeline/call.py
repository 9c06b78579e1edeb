"""One call's requests in flight: filled from its prompts up to a window, emptied as their deltas come.

    prompts ──fill──> engine thread ──deltas──> the call's mailbox ──process──> Responses

`fill` and `process` run on the caller's thread. The window bounds memory; it is wide enough that the engine never waits for prompts.
"""

import asyncio
import collections
import logging
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from turbotriton.contract.errors import ConfigError, InvalidInputError, RequestCancelledError
from turbotriton.contract.wire import GenerateRequest, TokenDelta
from turbotriton.text.detokenizer import TextTokenizer
from turbotriton.text.prompt_format import PromptFormat

from .answer import Answer
from .engine_thread import EngineThread, Sink
from .options import GenerationConfig, Response
from .prompts import Prompt

__all__ = ["AsyncMailbox", "Call", "GenerationConfigs", "Job", "Model", "config_of", "drain", "encode"]

logger = logging.getLogger(__name__)

WINDOW_BATCHES = 2  # one running, one waiting

GenerationConfigs = GenerationConfig | Sequence[GenerationConfig] | None


@dataclass(frozen=True, slots=True)
class Model:
    """What every call needs."""

    engine: EngineThread
    tokenizer: TextTokenizer
    prompt_format: PromptFormat


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt as token ids."""

    index: int
    prompt_ids: Sequence[int]
    config: GenerationConfig


class Call:
    """`sink` takes deltas on the engine thread and must not block; whoever empties it hands them to `process`.

    `streams` False: `process` gives each answer once, whole.
    """

    def __init__(self, model: Model, jobs: Iterator[Job], sink: Sink, *, streams: bool = True) -> None:
        self._model = model
        self._jobs = jobs
        self._sink = sink
        self._streams = streams
        self._has_more = True
        self._window = WINDOW_BATCHES * model.engine.info.max_batch_size
        self._answers: dict[int, Answer] = {}

    @property
    def is_over(self) -> bool:
        return not self._has_more and not self._answers

    @property
    def request_ids(self) -> tuple[int, ...]:
        return tuple(self._answers)

    def fill(self) -> list[Response]:
        """Submits prompts while there are any and the window has room.

        Returns the empty answers ("length") of prompts that leave no room for a token in session_len; they are not run.
        """
        refused = []
        while self._has_more and len(self._answers) < self._window:
            job = next(self._jobs, None)
            if job is None:
                self._has_more = False
            elif len(job.prompt_ids) >= self._model.engine.info.session_len:
                refused.append(self._refuse(job))
            else:
                self._submit(job)
        return refused

    def _refuse(self, job: Job) -> Response:
        num_tokens, session_len = len(job.prompt_ids), self._model.engine.info.session_len
        logger.warning("prompts[%d] has %d tokens and session_len is %d: not run", job.index, num_tokens, session_len)
        return Response("", 0, num_tokens, job.index, "length")

    def _submit(self, job: Job) -> None:
        if not job.prompt_ids:
            raise InvalidInputError(f"prompts[{job.index}] is empty; give at least one character")
        request, stop_words = self._request(job)
        config = job.config
        self._answers[request.request_id] = Answer(
            job.index,
            self._model.tokenizer,
            len(job.prompt_ids),
            stop_words,
            skip_special_tokens=config.skip_special_tokens,
            wants_logprobs=config.logprobs is not None,
            streams=self._streams,
        )
        self._model.engine.submit(request, self._sink)

    def _request(self, job: Job) -> tuple[GenerateRequest, list[str]]:
        """The engine's request, and the stop words that it cannot know: those that are no token of their own."""
        tokenizer, config = self._model.tokenizer, job.config
        words = (*(config.stop_words or ()), *self._model.prompt_format.stop_words)
        token_ids = {word: tokenizer.single_id(word) for word in words}
        forms = [form for word in config.bad_words or () for form in (word, f" {word}")]  # in a word and after a space
        bad = dict.fromkeys(tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms)
        sampling = config.sampling(
            [token_id for token_id in token_ids.values() if token_id is not None], [sequence for sequence in bad if sequence]
        )
        request = GenerateRequest(self._model.engine.next_request_id(), tuple(job.prompt_ids), sampling)
        return request, [word for word, token_id in token_ids.items() if token_id is None]

    def process(self, deltas: Sequence[TokenDelta], *, keeps_cancelled: bool = False) -> list[Response]:
        """What the deltas add to each answer. Raises what a request failed with; RequestCancelledError unless keeps_cancelled."""
        waiting: dict[int, list[TokenDelta]] = {}
        for delta in deltas:
            waiting.setdefault(delta.request_id, []).append(delta)
        responses = []
        for request_id, of_one in waiting.items():
            answer = self._answers.get(request_id)
            if answer is None:
                continue  # a stop word ended it before
            response = answer.take(of_one)
            if answer.is_cancelled and not keeps_cancelled:
                raise RequestCancelledError("the request was cancelled")
            is_over = answer.is_cancelled or answer.finish_reason is not None
            if is_over:
                del self._answers[request_id]
            if answer.needs_cancel:
                self._model.engine.cancel(request_id)
            if response is not None:
                responses.append(response)
        return responses

    def close(self) -> None:
        """Cancels what is in flight."""
        for request_id in self._answers:
            self._model.engine.cancel(request_id)


def drain(arrived: "queue.SimpleQueue[TokenDelta]") -> list[TokenDelta]:
    """Waits for one, then takes all that are there."""
    deltas = [arrived.get()]
    while not arrived.empty():  # the only reader: what is there stays there
        deltas.append(arrived.get())
    return deltas


class AsyncMailbox:
    """Deltas from the engine thread to a coroutine, with one wake-up for all that wait."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived: collections.deque[TokenDelta] = collections.deque()
        self._event = asyncio.Event()
        self._is_woken = False  # set by the engine thread, cleared by the loop's before it empties the deque

    def put(self, delta: TokenDelta) -> None:
        self._arrived.append(delta)
        if not self._is_woken:
            self._is_woken = True
            try:
                self._loop.call_soon_threadsafe(self._event.set)
            except RuntimeError:  # the event loop is closed: nobody waits any more
                logger.debug("request %d: its event loop is closed", delta.request_id)

    async def take(self) -> list[TokenDelta]:
        await self._event.wait()
        self._event.clear()
        self._is_woken = False
        deltas = []
        while self._arrived:
            deltas.append(self._arrived.popleft())
        return deltas


def config_of(configs: GenerationConfigs, index: int) -> GenerationConfig:
    """The one for all, or the prompt's own. Raises ConfigError."""
    if configs is None:
        return GenerationConfig()
    if isinstance(configs, GenerationConfig):
        return configs
    if index >= len(configs):
        raise ConfigError(f"gen_config has {len(configs)} entries and there are more prompts; give one for each, or one for all")
    return configs[index]


def encode(prompt_format: PromptFormat, prompt: Prompt, *, do_preprocess: bool) -> list[int]:
    """Raises InvalidInputError."""
    if isinstance(prompt, str):
        return prompt_format.encode_prompt(prompt) if do_preprocess else prompt_format.encode_text(prompt)
    if not do_preprocess:
        raise InvalidInputError("do_preprocess is False and the prompt is a list of messages; give a text, or leave it out")
    return prompt_format.encode_messages(prompt)
