"""Constrained decoding: grammars are compiled, and token masks filled, in threads beside the engine's.

    request with `guided` ──> Grammars.open ── worker: compile once a grammar, copy once a request ──> Matcher ──> the request queues
    each step:  MaskFiller.start(matchers of the sampled rows) ── thread: fill ──┐
                runner: forward of the step ───────────────────────────── logits ┴─> mask, draw ──> Matcher.accept(token)

A matcher belongs to one request and lives on the host: it follows the request through chunked prefill and preemption untouched.
It is used by one thread at a time: the engine's in `accept`, the filler's between `start` and `wait`.
This module knows grammars and tokens, not requests; llguidance (https://github.com/guidance-ai/llguidance) does the parsing.

Bounds: source bytes (contract/wire.py), nesting, the compiler's own limits below, seconds that a request waits for its grammar
(engine.py), compiled grammars kept. A matcher that runs into a limit ends its own request with an error and nothing else.
"""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import llguidance
import numpy as np
import numpy.typing as npt

from turbotriton.backend.scheduling.request import TokenMatcher
from turbotriton.contract.errors import InvalidInputError, TurbotritonError

__all__ = ["Grammars", "MaskFiller", "Matcher", "TokenMasks", "find_tokenizer"]

logger = logging.getLogger(__name__)

Guided = tuple[str, str]

MAX_CACHED_GRAMMARS = 64
NUM_COMPILERS = 2  # threads: one long compilation leaves another free
MAX_ERROR_CHARACTERS = 300
MAX_NESTING = 64  # of brackets in a grammar or regex
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

    def accept(self, token_id: int) -> str | None:
        """Takes the drawn token; returns why the request cannot go on, or None."""
        if self.state.consume_token(token_id):
            return None
        reason = _one_line(self.state.get_error())
        return (
            f"guided: token {token_id} was drawn outside the grammar, because bad words, min_tokens or ignore_eos ban every token "
            f"that it allows, or a limit was met: {reason}"
        )

    @property
    def is_complete(self) -> bool:
        """Nothing can follow."""
        return self.state.is_stopped()


class Grammars:
    """Compiled grammars by content, the most recently used ones; loads the tokenizer at the first request.

    `wake` is called from a worker each time that a future of `open` is done.
    """

    def __init__(self, tokenizer_json: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._pool = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="grammar")
        self._lock = threading.Lock()  # guards the tokenizer and, since copies of one matcher may not overlap, copying
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Guided, Future[llguidance.LLMatcher]] = OrderedDict()  # the engine thread's
        self.wake: Callable[[], None] = lambda: None

    def open(self, guided: Guided) -> "Future[Matcher]":
        """A matcher at the beginning of the grammar; the future raises InvalidInputError when there is none to be had."""
        compiled = self._compiled.get(guided)
        if compiled is None:
            compiled = self._compiled[guided] = self._pool.submit(self._compile, guided)
            while len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(guided)
        opened: Future[Matcher] = Future()
        compiled.add_done_callback(lambda done: self._pool.submit(self._copy, done, opened))
        return opened

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

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
        except TurbotritonError:
            raise
        except BaseException as error:  # noqa: BLE001 - of the library: ValueError, or a panic
            raise InvalidInputError(f"guided: the {kind} cannot be compiled: {_one_line(str(error))}") from None
        if matcher.is_error():
            raise InvalidInputError(f"guided: the {kind} cannot be compiled: {_one_line(matcher.get_error())}")
        return matcher

    def _load_tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                text = self._tokenizer_json.read_text(encoding="utf-8")
                eos = list(self._eos_token_ids)
                tokenizer = llguidance.LLTokenizer(text, eos_token=eos)
                if tokenizer.vocab_size < self._vocab_size:  # logits of padding: never allowed
                    tokenizer = llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos)
                self._tokenizer = tokenizer
            return self._tokenizer


def _grammar_of(guided: Guided) -> str:
    """In llguidance's own form. Raises InvalidInputError, ValueError."""
    kind, text = guided
    if kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITE_SPACE})
    if kind == "json_object":
        return llguidance.LLMatcher.grammar_from_json_schema(ANY_OBJECT, defaults={"whitespace_pattern": WHITE_SPACE})
    if kind == "choice":
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(word) for word in json.loads(text)))
    if _nesting(text) > MAX_NESTING:
        raise InvalidInputError(f"guided: the {kind} has brackets {_nesting(text)} deep; at most {MAX_NESTING} are taken")
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


def _nesting(text: str) -> int:
    """An upper bound of how deep brackets stand in each other: escapes and quotes are not read."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}" and depth:
            depth -= 1
    return deepest


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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="token-masks")
        self._executor: llguidance.LLExecutor | None = None

    def start(self, matchers: Sequence[tuple[int, TokenMatcher]]) -> TokenMasks:
        """matchers: (slot, matcher) of each guided row that this step samples; at least one."""
        words = np.zeros((len(matchers), self._num_words), np.int32)
        slots = tuple(slot for slot, _ in matchers)
        return TokenMasks(slots, words, self._thread.submit(self._fill, [matcher for _, matcher in matchers], words))

    def _fill(self, matchers: Sequence[TokenMatcher], words: npt.NDArray[np.int32]) -> None:
        if self._executor is None:
            self._executor = llguidance.LLExecutor()
        rows = [(matcher.state, row) for row, matcher in enumerate(matchers) if isinstance(matcher, Matcher)]
        self._executor.unsafe_compute_mask_ptr(rows, words.ctypes.data, words.shape[1] * 4, len(rows))

    def close(self) -> None:
        self._thread.shutdown(wait=False)
