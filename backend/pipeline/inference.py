"""`Pipeline`: many prompts through one engine, bounded; streams, sessions, asyncio.

    prompts ── at most WINDOW_BATCHES x max_batch_size in flight ──> engine thread ── deltas ──> the call's queue ──> Responses

Prompts are read, tokenised and detokenised on the caller's thread, while the engine works on those in flight; an iterator of any
length is read as far as the window goes. A call that ends early (an error, a closed generator) cancels what it has in flight.
"""

import logging
import queue
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from turbotriton.contract.errors import ConfigError, InvalidInputError
from turbotriton.contract.wire import GenerateRequest, TokenDelta
from turbotriton.text.detokenizer import TextTokenizer
from turbotriton.text.prompt_format import PromptFormat

from .answer import Answer
from .engine_thread import EngineThread
from .options import GenerationConfig, Response
from .prompts import Prompt, Prompts, is_single, iter_prompts

__all__ = ["GenerationConfigs", "Pipeline"]

logger = logging.getLogger(__name__)

WINDOW_BATCHES = 2  # one running, one waiting: the engine never lacks work and memory stays bounded

GenerationConfigs = GenerationConfig | Sequence[GenerationConfig] | None


class Pipeline:
    """Made by `pipeline(...)`. Thread-safe; `with` closes it."""

    def __init__(self, engine: EngineThread, tokenizer: TextTokenizer, prompt_format: PromptFormat) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self._window = WINDOW_BATCHES * engine.info.max_batch_size

    @property
    def session_len(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self.engine.info.session_len

    def __call__(
        self,
        prompts: Prompts,
        gen_config: GenerationConfigs = None,
        request_output_len: int | None = 512,
        top_k: int = 40,
        top_p: float = 0.8,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Response | list[Response]:
        """A Response for one text or conversation, else a list in the prompts' order. The keywords count without gen_config.

        do_preprocess False: texts go without the chat template. Raises InvalidInputError, EngineDiedError.
        """
        _refuse_adapter(adapter_name)
        if gen_config is None:
            gen_config = GenerationConfig(
                max_new_tokens=request_output_len,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                repetition_penalty=repetition_penalty,
                ignore_eos=ignore_eos,
            )
        return self.batch_infer(prompts, gen_config, do_preprocess=do_preprocess)

    def batch_infer(
        self, prompts: Prompts, gen_config: GenerationConfigs = None, do_preprocess: bool = True, adapter_name: str | None = None
    ) -> Response | list[Response]:
        """As calling the pipeline; gen_config may be a list, one for each prompt. Without it GenerationConfig's defaults count."""
        _refuse_adapter(adapter_name)
        found = sorted(
            self.iter_infer(prompts, gen_config, do_preprocess=do_preprocess), key=lambda response: response.session_id
        )
        return found[0] if is_single(prompts) else found

    def iter_infer(
        self, prompts: Prompts, gen_config: GenerationConfigs = None, do_preprocess: bool = True
    ) -> Iterator[Response]:
        """Whole answers as they end, in that order; `session_id` is the prompt's index. Keeps none of them."""
        parts: dict[int, Response] = {}
        for delta in self.stream_infer(prompts, gen_config, do_preprocess=do_preprocess):
            whole = parts.setdefault(delta.session_id, delta)
            if whole is not delta:
                _extend(whole, delta)
            if whole.finish_reason is not None:
                yield parts.pop(delta.session_id)

    def stream_infer(
        self, prompts: Prompts, gen_config: GenerationConfigs = None, do_preprocess: bool = True, adapter_name: str | None = None
    ) -> Iterator[Response]:
        """What each answer grew by, interleaved; `session_id` is the prompt's index, the last of each has finish_reason."""
        _refuse_adapter(adapter_name)
        call = _Call(self)
        source = enumerate(iter_prompts(prompts))
        has_more = True
        try:
            while has_more or call.num_open:
                while has_more and call.num_open < self._window:
                    following = next(source, None)
                    if following is None:
                        has_more = False
                        break
                    index, prompt = following
                    refused = call.submit(index, prompt, _config_of(gen_config, index), do_preprocess=do_preprocess)
                    if refused is not None:
                        yield refused
                if call.num_open:
                    yield from call.take()
        finally:
            call.close()

    def close(self) -> None:
        """Ends the engine and frees the device's memory; open calls raise EngineDiedError. Idempotent."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Call:
    """What one call has in flight. Deltas of all its requests come through one queue; those that wait are taken together."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._arrived: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
        self._answers: dict[int, Answer] = {}

    @property
    def num_open(self) -> int:
        return len(self._answers)

    def submit(self, index: int, prompt: Prompt, config: GenerationConfig, *, do_preprocess: bool) -> Response | None:
        """Returns the empty answer of a prompt that leaves no room for one, which is not run."""
        request, answer = prepare(self._pipeline, index, prompt, config, do_preprocess=do_preprocess)
        if answer.finish_reason is not None:
            return answer.take(())
        self._answers[request.request_id] = answer
        self._pipeline.engine.submit(request, self._arrived.put)
        return None

    def take(self) -> Iterator[Response]:
        """Waits for deltas; what each request's bring. Raises what a request failed with."""
        waiting: dict[int, list[TokenDelta]] = {}
        delta = self._arrived.get()
        while True:
            waiting.setdefault(delta.request_id, []).append(delta)
            try:
                delta = self._arrived.get_nowait()
            except queue.Empty:
                break
        for request_id, deltas in waiting.items():
            answer = self._answers.get(request_id)
            if answer is None:
                continue  # ended by a stop word before
            response = answer.take(deltas)
            if answer.finish_reason is not None:
                del self._answers[request_id]
                if answer.needs_cancel:
                    self._pipeline.engine.cancel(request_id)
            if response.token_ids or response.text or answer.finish_reason is not None:
                yield response

    def close(self) -> None:
        for request_id in self._answers:
            self._pipeline.engine.cancel(request_id)


def prepare(
    pipeline: Pipeline, index: int, prompt: Prompt, config: GenerationConfig, *, do_preprocess: bool
) -> tuple[GenerateRequest, Answer]:
    """The engine's request and the answer that takes its deltas. An answer that is finished already must not be submitted."""
    tokenizer, prompt_format = pipeline.tokenizer, pipeline.prompt_format
    if isinstance(prompt, str):
        ids = prompt_format.encode_prompt(prompt) if do_preprocess else prompt_format.encode_text(prompt)
    elif do_preprocess:
        ids = prompt_format.encode_messages(prompt)
    else:
        raise InvalidInputError("do_preprocess is False and the prompt is a list of messages; give a text, or leave it out")
    if not ids:
        raise InvalidInputError(f"prompts[{index}] is empty; give at least one character")
    stop_words = (*(config.stop_words or ()), *prompt_format.stop_words)
    stop_ids = [token_id for word in stop_words if (token_id := tokenizer.single_id(word)) is not None]
    answer = Answer(
        index,
        tokenizer,
        len(ids),
        [word for word in stop_words if tokenizer.single_id(word) is None],
        skip_special_tokens=config.skip_special_tokens,
        wants_logprobs=config.logprobs is not None,
    )
    if len(ids) >= pipeline.session_len:
        logger.warning("prompts[%d] has %d tokens and session_len is %d: not run", index, len(ids), pipeline.session_len)
        answer.finish_reason = "length"
    bad = [
        tuple(tokenizer.encode(form, add_special_tokens=False)) for word in config.bad_words or () for form in (word, f" {word}")
    ]
    sampling = config.sampling(stop_ids, [sequence for sequence in dict.fromkeys(bad) if sequence])
    return GenerateRequest(pipeline.engine.next_request_id(), tuple(ids), sampling), answer


def _config_of(configs: GenerationConfigs, index: int) -> GenerationConfig:
    if configs is None:
        return GenerationConfig()
    if isinstance(configs, GenerationConfig):
        return configs
    if index >= len(configs):
        raise ConfigError(f"gen_config has {len(configs)} entries and there are more prompts; give one for each, or one for all")
    return configs[index]


def _refuse_adapter(name: str | None) -> None:
    if name is not None:
        raise ConfigError(f"adapter_name is {name!r}; LoRA adapters are not part of this version, merge them into the weights")


def _extend(whole: Response, delta: Response) -> None:
    whole.text += delta.text
    whole.token_ids += delta.token_ids
    whole.generate_token_len = delta.generate_token_len
    whole.finish_reason = delta.finish_reason
    if whole.logprobs is not None and delta.logprobs is not None:
        whole.logprobs += delta.logprobs
