"""Answers: request -> options of the text door -> choices -> OpenAI's objects, whole or in chunks. Completions here, chats in
chat_answers.py.

Each choice is a stream of its own to a text door (the prefix cache computes a shared prompt once); choice i of a seeded request draws
with seed + i, so that streamed and whole answers are the same.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from turbotriton.client.text_door import Delta
from turbotriton.contract.errors import TurbotritonError

from .errors import ApiError, api_error
from .fleet import Fleet
from .schema import CompletionRequest, SamplingFields
from .tools import ToolCallParser

__all__ = ["DONE", "Answer", "Choice", "CompletionAnswer", "sampling_options", "seeded"]

MAX_SEED = 2**64
DONE = "[DONE]"  # ends a stream
MAX_UNNAMED_CHARS = 4  # of a prompt, between two of its tokens: a space that a decoder drops, a character in several tokens
MAX_STREAMS = 128  # prompts times n of one request
#: What refuses one choice refuses the others; they get this long to end by themselves, because tritonserver 24.10 never forgets a
#: stream that is cancelled between its error and its end, and then cannot stop.
REFUSALS_S = 1.0


def sampling_options(request: SamplingFields) -> dict[str, Any]:
    """Keyword arguments of `AsyncClient.stream`, without logprobs."""
    options: dict[str, Any] = {
        name: getattr(request, name)
        for name in (
            *(
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "min_tokens",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            ),
            *("ignore_eos", "skip_special_tokens", "stop_token_ids", "bad_words", "priority", "max_tokens"),
        )
    }
    options["stop_words"] = [request.stop] if isinstance(request.stop, str) else request.stop
    parameters: dict[str, Any] = {"logit_bias": request.logit_bias} if request.logit_bias else {}
    if (guided := request.guided()) is not None:
        parameters["guided"] = guided
    if parameters:
        options["sampling_parameters"] = parameters
    return options


@dataclass(slots=True)
class Choice:
    """What one choice has said so far."""

    index: int
    prompt: Mapping[str, Any]  # of prompt, messages and input_ids the one that is given
    options: dict[str, Any]
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: str | None = None
    parts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    prompt_logprobs: list[dict[str, Any]] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    parser: ToolCallParser | None = None
    num_chars: int = 0  # sent, for text_offset

    def take(self, delta: Delta) -> None:
        self.num_input_tokens = delta.num_input_tokens or self.num_input_tokens
        self.num_output_tokens = delta.num_output_tokens or self.num_output_tokens
        self.finish_reason = _FINISH.get(delta.finish_reason or "", delta.finish_reason)


#: A deadline of the server ends an answer as if its length had been reached: what came is true, and it is cut.
_FINISH = {"": None, "deadline": "length", "cancelled": "stop"}


class Answer:
    """Base of both kinds: runs the choices, yields (choice, delta) as they come, counts usage."""

    kind = ""  # prefix of the id

    def __init__(self, fleet: Fleet, request: SamplingFields, choices: list[Choice]) -> None:
        if len(choices) > MAX_STREAMS:
            raise ApiError(400, f"{len(choices)} answers are asked for at once; at most {MAX_STREAMS} are given", param="n")
        self._fleet, self._request, self._choices = fleet, request, choices
        self.id = f"{self.kind}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def batches(self, *, stream: bool) -> AsyncGenerator[list[tuple[Choice, Delta]]]:
        """Every choice's deltas as they come, those together that are there; without `stream` each choice's one, which is all of it.

        Raises ApiError; closing it cancels what runs.
        """
        if len(self._choices) > 1:
            async with contextlib.aclosing(self._batches_of_many(stream=stream)) as batches:
                async for batch in batches:
                    yield batch
            return
        (choice,) = self._choices
        try:
            async with self._fleet.stream(self._request.model, choice.prompt, choice.options, stream=stream) as deltas:
                async for delta in deltas:
                    yield [(choice, delta)]
        except TurbotritonError as error:
            raise api_error(error) from None

    async def _batches_of_many(self, *, stream: bool) -> AsyncGenerator[list[tuple[Choice, Delta]]]:
        came: asyncio.Queue[tuple[Choice, Delta | Exception | None]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._run(choice, came, stream=stream)) for choice in self._choices]
        num_open = len(tasks)
        try:
            while num_open:
                items = [await came.get()]
                while not came.empty():
                    items.append(came.get_nowait())
                batch: list[tuple[Choice, Delta]] = []
                failure: Exception | None = None
                for choice, item in items:
                    if item is None:
                        num_open -= 1
                    elif isinstance(item, Delta):
                        batch.append((choice, item))
                    else:
                        failure = failure or item
                if batch:
                    yield batch
                if failure is not None:
                    await asyncio.wait(tasks, timeout=REFUSALS_S)
                    raise api_error(failure) if isinstance(failure, TurbotritonError) else failure
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, choice: Choice, came: "asyncio.Queue[tuple[Choice, Delta | Exception | None]]", *, stream: bool) -> None:
        try:
            async with self._fleet.stream(self._request.model, choice.prompt, choice.options, stream=stream) as deltas:
                async for delta in deltas:
                    came.put_nowait((choice, delta))
            came.put_nowait((choice, None))
        except Exception as error:  # noqa: BLE001  handed to the task that waits for deltas
            came.put_nowait((choice, error))

    def usage(self) -> dict[str, int]:
        """Prompts are counted once, whatever n is."""
        num_prompt = sum(choice.num_input_tokens for choice in self._choices[:: self._request.n])
        num_output = sum(choice.num_output_tokens for choice in self._choices)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}

    async def whole(self) -> dict[str, Any]:
        async with contextlib.aclosing(self.batches(stream=False)) as batches:
            async for batch in batches:
                for choice, delta in batch:
                    choice.take(delta)
                    self._keep(choice, delta)
        choices = [self._whole_choice(choice) for choice in self._choices]
        return self._envelope(self._object) | {"choices": choices, "usage": self.usage()}

    async def chunks(self) -> AsyncGenerator[list[str]]:
        """Objects of a streamed answer in their order, as JSON, then OpenAI's closing [DONE]; in one list what is sent at once."""
        envelope = self._envelope(self._chunk_object)
        head = f'{_dump(envelope)[:-1]}, "choices": ['
        tail = '], "usage": null}' if self._wants_usage else "]}"
        before_text, after_text = self._plain_chunk
        plain_heads = [f'{head}{{"index": {choice.index}, {before_text}' for choice in self._choices]
        plain_tail = f'{after_text}, "logprobs": null, "finish_reason": null}}{tail}'
        async with contextlib.aclosing(self.batches(stream=True)) as batches:
            async for batch in batches:
                made = []
                for choice, delta in batch:
                    choice.take(delta)
                    if self._is_plain(choice, delta):
                        made.append(f"{plain_heads[choice.index]}{_dump(delta.text)}{plain_tail}")
                    else:
                        made += [f"{head}{_dump(chunk)}{tail}" for chunk in self._choice_chunks(choice, delta)]
                if all(choice.finish_reason is not None for choice in self._choices):
                    made += [_dump(envelope | {"choices": [], "usage": self.usage()})] if self._wants_usage else []
                    made.append(DONE)
                if made:
                    yield made

    @property
    def _wants_usage(self) -> bool:
        return self._request.stream_options is not None and self._request.stream_options.include_usage

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self._request.model}

    _object = _chunk_object = ""
    #: JSON before and after the text of a chunk that `_is_plain`.
    _plain_chunk = ("", "")

    def _is_plain(self, choice: Choice, delta: Delta) -> bool:
        """Whether `_choice_chunks` would make one chunk that has the delta's text and nothing else: nearly every one."""
        raise NotImplementedError

    def _keep(self, choice: Choice, delta: Delta) -> None:
        choice.parts.append(delta.text)
        choice.logprobs += delta.logprobs or []
        choice.prompt_logprobs += delta.prompt_logprobs or []

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _choice_chunks(self, choice: Choice, delta: Delta) -> Sequence[dict[str, Any]]:
        raise NotImplementedError


_dump = json.JSONEncoder(ensure_ascii=False).encode


def seeded(options: dict[str, Any], seed: int | None, index: int) -> dict[str, Any]:
    return options if seed is None else options | {"seed": (seed + index) % MAX_SEED}


class CompletionAnswer(Answer):
    """/v1/completions. Choices are numbered over all prompts: prompt p's are p * n ... p * n + n - 1."""

    kind = "cmpl"
    _object = _chunk_object = "text_completion"
    _plain_chunk = ('"text": ', "")

    def __init__(self, fleet: Fleet, request: CompletionRequest) -> None:
        options = sampling_options(request) | {"num_logprobs": request.logprobs}
        if request.echo:
            options["exclude_input_in_output"] = False
            if request.logprobs is not None:
                options["sampling_parameters"] = options.get("sampling_parameters", {}) | {"prompt_logprobs": request.logprobs}
        choices: list[Choice] = []
        for text_or_ids in request.prompts():
            name = "prompt" if isinstance(text_or_ids, str) else "input_ids"
            for number in range(request.n):
                choices.append(Choice(len(choices), {name: text_or_ids}, seeded(options, request.seed, number)))
        super().__init__(fleet, request, choices)

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        return self._choice(choice, "".join(choice.parts), choice.prompt_logprobs, choice.logprobs)

    def _choice_chunks(self, choice: Choice, delta: Delta) -> Sequence[dict[str, Any]]:
        return [self._choice(choice, delta.text, delta.prompt_logprobs or [], delta.logprobs or [])]

    def _is_plain(self, choice: Choice, delta: Delta) -> bool:
        assert isinstance(self._request, CompletionRequest)
        return choice.finish_reason is None and self._request.logprobs is None

    def _choice(
        self, choice: Choice, text: str, prompt_entries: list[dict[str, Any]], entries: list[dict[str, Any]]
    ) -> dict[str, Any]:
        assert isinstance(self._request, CompletionRequest)
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = _completion_logprobs([*prompt_entries, *entries], _offsets(choice, text, prompt_entries, entries))
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _offsets(choice: Choice, text: str, prompt_entries: list[dict[str, Any]], entries: list[dict[str, Any]]) -> Iterator[int]:
    """Where each token begins. `text`: it begins with the prompt if there are prompt_entries, whose tokens are looked for in it: a BOS is
    not shown, nor is a part of a character before its last."""
    for entry in prompt_entries:
        token = entry["token"]
        found = text.find(token, choice.num_chars, choice.num_chars + len(token) + MAX_UNNAMED_CHARS)
        if found >= 0:
            choice.num_chars = found
        yield choice.num_chars
        if found >= 0:
            choice.num_chars += len(token)
    for entry in entries:
        yield choice.num_chars
        choice.num_chars += len(entry["token"])


def _completion_logprobs(entries: list[dict[str, Any]], offsets: Iterator[int]) -> dict[str, Any]:
    """The first token of a prompt has no probability: null, and so are the likeliest in its place."""

    def likeliest(entry: dict[str, Any]) -> dict[str, float] | None:
        return None if entry["logprob"] is None else {one["token"]: one["logprob"] for one in entry.get("top_logprobs", ())}

    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [likeliest(entry) for entry in entries],
        "text_offset": list(offsets),
    }
