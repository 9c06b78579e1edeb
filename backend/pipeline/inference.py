"""`Pipeline`: answers to one prompt or many, whole, streamed, in sessions, or with asyncio.

Prompts are read, tokenised and detokenised on the caller's thread, while the engine works on those in flight (`call.py`); an
iterator of any length is read only as far as the window goes. A call that ends early (an error, a closed generator, a cancelled
task) cancels what it has in flight.
"""

import queue
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Self

from turbotriton.contract.errors import ConfigError
from turbotriton.contract.wire import TokenDelta
from turbotriton.text.detokenizer import TextTokenizer
from turbotriton.text.prompt_format import PromptFormat

from .call import AsyncMailbox, Call, GenerationConfigs, Job, Model, config_of, drain, encode
from .engine_thread import EngineThread
from .options import GenerationConfig, Response
from .prompts import Prompt, Prompts, is_single, iter_prompts
from .session import Session

__all__ = ["Pipeline"]


class Pipeline:
    """Made by `pipeline(...)`. Thread-safe; `with` closes it."""

    def __init__(self, engine: EngineThread, tokenizer: TextTokenizer, prompt_format: PromptFormat) -> None:
        self._model = Model(engine, tokenizer, prompt_format)

    @property
    def model(self) -> Model:
        """Engine thread, tokenizer and prompt format."""
        return self._model

    @property
    def session_len(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self._model.engine.info.session_len

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
        """A Response for one text or conversation, else a list in the prompts' order. Without gen_config the keywords count.

        do_preprocess False: texts go without the chat template. Raises InvalidInputError, EngineDiedError.
        """
        if gen_config is None:
            gen_config = GenerationConfig(
                max_new_tokens=request_output_len,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                repetition_penalty=repetition_penalty,
                ignore_eos=ignore_eos,
            )
        return self.batch_infer(prompts, gen_config, do_preprocess, adapter_name)

    def batch_infer(
        self,
        prompts: Prompts,
        gen_config: GenerationConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Response | list[Response]:
        """As calling the pipeline; gen_config may be a list, one for each prompt. Without it GenerationConfig's defaults count."""
        found = list(self.iter_infer(prompts, gen_config, do_preprocess, adapter_name))
        return _in_order(found, prompts)

    def iter_infer(
        self,
        prompts: Prompts,
        gen_config: GenerationConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Iterator[Response]:
        """Whole answers as they end, in that order; `session_id` is the prompt's index. Keeps none: for prompts without number."""
        return self._run(self._jobs(prompts, gen_config, do_preprocess, adapter_name), streams=False)

    def stream_infer(
        self,
        prompts: Prompts,
        gen_config: GenerationConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Iterator[Response]:
        """What each answer grew by, interleaved; `session_id` is the prompt's index, the last of each has finish_reason."""
        return self._run(self._jobs(prompts, gen_config, do_preprocess, adapter_name), streams=True)

    def _run(self, jobs: Iterator[Job], *, streams: bool) -> Iterator[Response]:
        arrived: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
        call = Call(self._model, jobs, arrived.put, streams=streams)
        try:
            yield from call.fill()
            while not call.is_over:
                yield from call.process(drain(arrived))
                yield from call.fill()
        finally:
            call.close()

    async def async_stream_infer(
        self,
        prompts: Prompts,
        gen_config: GenerationConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> AsyncIterator[Response]:
        """`stream_infer` for `async for`."""
        async for response in self._run_async(self._jobs(prompts, gen_config, do_preprocess, adapter_name), streams=True):
            yield response

    async def _run_async(self, jobs: Iterator[Job], *, streams: bool) -> AsyncIterator[Response]:
        mailbox = AsyncMailbox()
        call = Call(self._model, jobs, mailbox.put, streams=streams)
        try:
            for response in call.fill():
                yield response
            while not call.is_over:
                for response in call.process(await mailbox.take()):
                    yield response
                for response in call.fill():
                    yield response
        finally:
            call.close()

    async def async_infer(
        self,
        prompts: Prompts,
        gen_config: GenerationConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Response | list[Response]:
        """`batch_infer` for `await`."""
        jobs = self._jobs(prompts, gen_config, do_preprocess, adapter_name)
        return _in_order([response async for response in self._run_async(jobs, streams=False)], prompts)

    async def generate(
        self,
        messages: Prompt,
        session_id: int = 0,
        gen_config: GenerationConfig | None = None,
        stream_response: bool = True,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> AsyncIterator[Response]:
        """One answer for `async for`: deltas, or with stream_response False one Response. `session_id` stands in each."""
        if stream_response:
            async for delta in self.async_stream_infer([messages], gen_config, do_preprocess, adapter_name):
                delta.session_id = session_id
                yield delta
            return
        whole = await self.async_infer([messages], gen_config, do_preprocess, adapter_name)
        assert isinstance(whole, list)
        whole[0].session_id = session_id
        yield whole[0]

    def chat(
        self,
        prompt: str,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        do_preprocess: bool = True,
    ) -> Session:
        """One turn of a conversation; give the returned session to the next. `session.response` is the answer."""
        session = session or self.session()
        for _ in session.ask(prompt, gen_config, do_preprocess=do_preprocess):
            pass
        return session

    def session(self, system: str | None = None) -> Session:
        """A conversation that has not begun. `system`: its first message."""
        return Session(self._model, system)

    def _jobs(self, prompts: Prompts, configs: GenerationConfigs, do_preprocess: bool, adapter_name: str | None) -> Iterator[Job]:
        if adapter_name is not None:
            raise ConfigError(
                f"adapter_name is {adapter_name!r}; LoRA adapters are not part of this version, merge them into the weights"
            )
        for index, prompt in enumerate(iter_prompts(prompts)):
            ids = encode(self._model.prompt_format, prompt, do_preprocess=do_preprocess)
            yield Job(index, ids, config_of(configs, index))

    def close(self) -> None:
        """Ends the engine and frees the device's memory; open calls raise EngineDiedError. Idempotent."""
        self._model.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _in_order(found: list[Response], prompts: Prompts) -> Response | list[Response]:
    found.sort(key=lambda response: response.session_id)
    return found[0] if is_single(prompts) else found
