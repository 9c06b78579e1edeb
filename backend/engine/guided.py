"""Constrained decoding: grammars are compiled, and token masks filled, in threads beside the engine's.

    request with `guided` ──> Grammars.open ── worker: compile once a grammar, copy once a request ──> Matcher ──> the request queues
    each step:  MaskFiller.start(matchers of the sampled rows) ── thread: fill ──┐
                runner: forward of the step ───────────────────────────── logits ┴─> mask, draw ──> Matcher.accept(token)

A matcher belongs to one request and lives on the host: it follows the request through chunked prefill and preemption untouched.
It is used by one thread at a time: the engine's in `accept`, the filler's between `start` and `wait`.
This module knows grammars and tokens, not requests; llguidance (https://github.com/guidance-ai/llguidance) does the parsing.

Bounds: source bytes (contract/wire.py), the library's own limits below, seconds that a request waits for its grammar (engine.py),
compiled grammars kept. A matcher that runs into a limit ends its own request with an error and nothing else.
"""

import json
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import llguidance
import numpy as np
import numpy.typing as npt

from turbotriton.backend.scheduling.request import TokenMatcher
from turbotriton.contract.errors import InvalidInputError, ServerError, TurbotritonError

__all__ = ["Grammars", "MaskFiller", "Matcher", "TokenMasks", "find_tokenizer"]

logger = logging.getLogger(__name__)

Guided = tuple[str, str]
T = TypeVar("T")

MAX_CACHED_GRAMMARS = 64
NUM_COMPILERS = 2  # threads: one long compilation leaves another free
MAX_ERROR_CHARACTERS = 300
#: Rules that name each other 6,600 deep, the most that fit into a source, overflowed 8 MiB (and with it the process) but not 64.
COMPILER_STACK_BYTES = 128 * 1024 * 1024
#: Between the parts of JSON: nothing, a space, or a new line with its indent. Free white space let weak models write it for ever.
WHITE_SPACE = r"(\x20|\x0A\x20{0,24})?"
ANY_OBJECT = '{"type": "object"}'


def find_tokenizer(weights_dir: Path) -> Path | None:
    """tokenizer.json of the workspace that `weights_dir` lies in, or None: beside the weights or in another door's folder."""
    version = weights_dir.resolve().parent
    folders = [version, *sorted(version.parents[1].glob("*/1"))]
    return next((path for folder in folders if (path := folder / "tokenizer" / "tokenizer.json").is_file()), None)


class Matcher:
    """Where one request stands in its grammar."""

    def __init__(self, state: llguidance.LLMatcher) -> None:
        self.state = state
        self.failure: str | None = None  # written by the filler

    def accept(self, token_id: int) -> str | None:
        """Takes the drawn token; returns why the request cannot go on, or None."""
        if (
            self.failure is None and self.state.consume_token(token_id) and not self.state.is_error()
        ):  # a limit met on the way leaves it true
            return None
        reason = self.failure or _one_line(self.state.get_error())
        return (
            f"guided: the output cannot go on after token {token_id}: a limit was met, or bad words or min_tokens ban every token "
            f"that the grammar allows ({reason})"
        )

    @property
    def is_complete(self) -> bool:
        """Nothing can follow."""
        return self.state.is_stopped() and not self.state.is_error()


class _Workers:
    """Daemon threads: a compilation under way never holds up the end of the process."""

    def __init__(self, name: str, count: int, stack_bytes: int = 0) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._count = count
        former = threading.stack_size(stack_bytes)
        for index in range(count):
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True).start()
        threading.stack_size(former)

    def submit(self, function: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it; panics are BaseExceptions
                future.set_exception(error)

        self._jobs.put(job)
        return future

    def close(self) -> None:
        for _ in range(self._count):
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class Grammars:
    """Compiled grammars by content, the most recently used ones; loads the tokenizer at the first request.

    `wake` is called from a worker each time that a future of `open` is done.
    """

    def __init__(self, tokenizer_json: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._workers = _Workers("grammar", NUM_COMPILERS, COMPILER_STACK_BYTES)
        self._lock = threading.Lock()  # guards the tokenizer and, since copies of one matcher may not overlap, copying
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Guided, Future[llguidance.LLMatcher]] = OrderedDict()  # the engine thread's
        self.wake: Callable[[], None] = lambda: None

    def open(self, guided: Guided) -> "Future[Matcher]":
        """A matcher at the beginning of the grammar; the future raises InvalidInputError when there is none to be had."""
        compiled = self._compiled.get(guided)
        if compiled is None:
            compiled = self._compiled[guided] = self._workers.submit(lambda: self._compile(guided))
            while len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(guided)
        opened: Future[Matcher] = Future()
        compiled.add_done_callback(lambda done: self._workers.submit(lambda: self._copy(done, opened)))
        return opened

    def close(self) -> None:
        self._workers.close()

    def _copy(self, compiled: "Future[llguidance.LLMatcher]", opened: "Future[Matcher]") -> None:
        try:
            original = compiled.result()
            with self._lock:
                opened.set_result(Matcher(original.deep_copy()))
        except TurbotritonError as error:
            opened.set_exception(error)
        except BaseException as error:  # a panic of the library arrives as one
            logger.exception("copying a grammar failed")
            opened.set_exception(InvalidInputError(f"guided: the grammar cannot be used: {_one_line(str(error))}"))
        self.wake()

    def _compile(self, guided: Guided) -> llguidance.LLMatcher:
        tokenizer = self._load_tokenizer()
        kind, _ = guided
        try:
            grammar = _grammar_of(guided)
            matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
        except BaseException as error:  # noqa: BLE001 - of the library: ValueError, or a panic
            raise InvalidInputError(f"guided: the {kind} cannot be compiled: {_one_line(str(error))}") from None
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask builds much of the lexer, 0.2 s for 2,000 properties: here, not in a step
        if matcher.is_error():
            raise InvalidInputError(f"guided: the {kind} cannot be compiled: {_one_line(matcher.get_error())}")
        return matcher

    def _load_tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                try:
                    self._tokenizer = _read_tokenizer(self._tokenizer_json, self._vocab_size, list(self._eos_token_ids))
                except (OSError, ValueError) as error:
                    raise ServerError(f"guided: {self._tokenizer_json} cannot be used: {_one_line(str(error))}") from None
            return self._tokenizer


def _read_tokenizer(path: Path, vocab_size: int, eos_token_ids: list[int]) -> llguidance.LLTokenizer:
    """Raises OSError, ValueError."""
    text = path.read_text(encoding="utf-8")
    tokenizer = llguidance.LLTokenizer(text, eos_token=eos_token_ids)
    if tokenizer.vocab_size >= vocab_size:
        return tokenizer
    return llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_token_ids)  # ids of padding are never allowed


def _grammar_of(guided: Guided) -> str:
    """In llguidance's own form. Raises ValueError."""
    kind, text = guided
    if kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITE_SPACE})
    if kind == "json_object":
        return llguidance.LLMatcher.grammar_from_json_schema(ANY_OBJECT, defaults={"whitespace_pattern": WHITE_SPACE})
    if kind == "choice":
        return llguidance.LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(word, ensure_ascii=False) for word in json.loads(text))
        )
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    return llguidance.LLMatcher.grammar_from_lark(text)


def _limits() -> llguidance.LLParserLimits:
    """About 20 ms of compilation and 5 ms a mask at the most; a lexer state takes 1 to 2 kB."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,  # else they tell of the state, over many lines
    )


def _one_line(text: str) -> str:
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= MAX_ERROR_CHARACTERS else f"{line[:MAX_ERROR_CHARACTERS]}..."


class TokenMasks:
    """Masks being filled for `slots`, in their order."""

    def __init__(self, slots: tuple[int, ...], words: npt.NDArray[np.int32], filled: "Future[None]") -> None:
        self.slots = slots
        self._words = words
        self._filled = filled

    def wait(self) -> npt.NDArray[np.int32]:
        """[num_slots, words]: bit i % 32 of word i // 32 says whether token i may come."""
        self._filled.result()
        return self._words


class MaskFiller:
    """One thread that hands a step's matchers to the library's own threads; it holds no lock of ours or Python's meanwhile."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._worker = _Workers("token-masks", 1)
        self._executor: llguidance.LLExecutor | None = None

    def start(self, matchers: Sequence[tuple[int, TokenMatcher]]) -> TokenMasks:
        """matchers: (slot, matcher) of each guided row that this step samples; at least one."""
        words = np.zeros((len(matchers), self._num_words), np.int32)
        slots = tuple(slot for slot, _ in matchers)
        return TokenMasks(slots, words, self._worker.submit(lambda: self._fill([matcher for _, matcher in matchers], words)))

    def _fill(self, matchers: Sequence[TokenMatcher], words: npt.NDArray[np.int32]) -> None:
        if self._executor is None:
            self._executor = llguidance.LLExecutor()
        rows = [(matcher, row) for row, matcher in enumerate(matchers) if isinstance(matcher, Matcher)]
        try:
            self._fill_rows(self._executor, rows, words)
        except BaseException:  # the library promises none; if it breaks that, the request at fault ends and the others go on
            logger.exception("filling the masks of %d rows failed; one by one now", len(rows))
            for matcher, row in rows:
                try:
                    self._fill_rows(self._executor, [(matcher, row)], words)
                except BaseException as error:  # noqa: BLE001 - as above
                    matcher.failure = _one_line(str(error))

    def _fill_rows(
        self, executor: llguidance.LLExecutor, rows: Sequence[tuple[Matcher, int]], words: npt.NDArray[np.int32]
    ) -> None:
        targets = [(matcher.state, row) for matcher, row in rows]
        executor.unsafe_compute_mask_ptr(targets, words.ctypes.data, words.shape[1] * 4, len(words))

    def close(self) -> None:
        self._worker.close()
