"""Constrained decoding over the fake runner: requests keep to their grammar whatever happens to them."""

import json
import re
import threading
import time
import zlib
from array import array
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest
from tests.backend.engine.guided_text import EOS, PATIENCE_S, TOKENIZER, TOKENIZER_JSON, read
from tests.backend.scheduling.fakes import VOCAB_SIZE, FakeRunner, model_config

from turbotriton.backend.engine import loop
from turbotriton.backend.engine.engine import Engine, Guides
from turbotriton.backend.engine.guided import Grammars, MaskFiller
from turbotriton.backend.engine.loop import EngineLoop
from turbotriton.backend.scheduling.plan import ScheduledRow, StepPlan, StepResult
from turbotriton.contract.errors import InvalidInputError
from turbotriton.contract.ini import EngineConfig
from turbotriton.contract.wire import FinishReason, GenerateRequest, SamplingParams, TokenDelta


class GuidedRunner(FakeRunner):
    """Draws by the hash of the sequence, among what the row's mask allows; counts which thread filled the masks."""

    masks: dict[int, np.ndarray[Any, Any]]

    def execute(self, plan: StepPlan) -> StepResult:
        self.masks = {}
        if plan.masks is not None:
            words = plan.masks.wait()
            assert sorted(plan.masks.slots) == list(dict.fromkeys(sorted(plan.masks.slots)))
            assert set(plan.masks.slots) <= {row.slot for row in plan.rows if row.samples}
            bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
            self.masks = dict(zip(plan.masks.slots, bits, strict=True))
        return super().execute(plan)

    def _run(self, row: ScheduledRow) -> list[int]:
        drawn = super()._run(row)
        if not drawn or row.slot not in self.masks:
            return drawn
        known, ids = self.slots[row.slot], np.flatnonzero(self.masks[row.slot])
        known[-1] = int(ids[zlib.crc32(array("q", known[:-1]).tobytes()) % len(ids)])
        return known[-1:]


class Bench:
    """An engine that is stepped by hand. `num_blocks` few: requests are preempted."""

    def __init__(self, num_blocks: int = 64, guides: Guides | None = None, *, overlap: bool = False, **config: Any) -> None:
        self.now = 0.0
        config = {"session_len": 160, "max_batch_size": 4, "num_tokens_per_iter": 8, **config}
        runner = GuidedRunner(num_blocks, 4)
        self.guides = guides or Guides(Grammars(TOKENIZER_JSON, VOCAB_SIZE, (EOS,)), MaskFiller(VOCAB_SIZE))
        self.engine = Engine(
            model_config((EOS,)), EngineConfig(**config), runner, lambda: self.now, guides=self.guides, overlap=overlap
        )
        self.deltas: dict[int, list[TokenDelta]] = {}

    def add(self, request_id: int, prompt: list[int], guided: tuple[str, str] | None = None, **fields: Any) -> None:
        request = {name: fields.pop(name) for name in ("deadline_ms", "sample_index", "priority") if name in fields}
        sampling = SamplingParams(**{"max_new_tokens": 30, "guided": guided, **fields})
        self.engine.add("test", GenerateRequest(request_id, tuple(prompt), sampling, **request))

    def step(self) -> None:
        self.keep(self.engine.collect_grammars())
        if self.engine.has_work:
            self.keep(self.engine.step())

    def keep(self, by_owner: dict[object, list[TokenDelta]]) -> None:
        for delta in by_owner.get("test", ()):
            self.deltas.setdefault(delta.request_id, []).append(delta)

    def wait_for_grammars(self) -> None:
        """All take their places at once: who is preempted no longer hangs on the compiler's time."""
        wait([held.opened for held in self.engine._held], PATIENCE_S)

    def run(self, *request_ids: int) -> None:
        end = time.monotonic() + PATIENCE_S
        while not all(self.last(request_id) for request_id in request_ids):
            assert time.monotonic() < end
            self.step()

    def last(self, request_id: int) -> TokenDelta | None:
        deltas = self.deltas.get(request_id, [])
        return deltas[-1] if deltas and deltas[-1].finish_reason is not None else None

    def text(self, request_id: int) -> str:
        return read([token for delta in self.deltas[request_id] for token in delta.token_ids])

    def reason(self, request_id: int) -> FinishReason | None:
        last = self.last(request_id)
        return None if last is None else last.finish_reason


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_blocks", [64, 12], ids=["room", "preemption"])
def test_requests_keep_to_their_grammars_beside_free_ones(num_blocks: int, overlap: bool) -> None:
    """Long prompts come in chunks, three share a prefix and a grammar, and with few blocks some are preempted and compute again."""
    bench = Bench(num_blocks, overlap=overlap)
    prompt = list(range(5, 18))
    regex = ("regex", r"[A-F]{2}-[0-9]{9}")
    bench.add(1, prompt, regex)
    bench.add(2, prompt, regex, sample_index=1)
    bench.add(3, [*prompt, 30], ("json_schema", '{"enum": ["a long answer, this", 7]}'))
    bench.add(4, [*prompt, 31], max_new_tokens=16)
    bench.add(5, [*prompt, 32], ("choice", '["nothing else will do"]'))
    bench.wait_for_grammars()
    bench.run(1, 2, 3, 4, 5)
    for request_id in (1, 2):
        assert re.fullmatch(regex[1], bench.text(request_id))
    assert json.loads(bench.text(3)) in ("a long answer, this", 7)
    assert bench.text(5) == "nothing else will do"
    assert [bench.reason(request_id) for request_id in (1, 2, 3, 5)] == [FinishReason.STOP] * 4
    assert bench.reason(4) is FinishReason.LENGTH
    stats = bench.engine.stats()
    assert bool(stats.preemptions_total) == (num_blocks == 12)
    assert stats.num_used_blocks == stats.num_waiting == stats.num_waiting_tokens == 0


def test_same_request_gives_the_same_answer_with_and_without_preemption() -> None:
    texts = []
    for num_blocks in (64, 12):
        bench = Bench(num_blocks)
        for request_id in range(1, 5):
            bench.add(request_id, [*range(5, 16), 40 + request_id], ("regex", r"([0-9]{4} ){3}[0-9]{4}"))
        bench.wait_for_grammars()
        bench.run(1, 2, 3, 4)
        texts.append([bench.text(request_id) for request_id in range(1, 5)])
        assert bool(bench.engine.stats().preemptions_total) == (num_blocks == 12)
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4


def test_refused_grammar_ends_its_request_only() -> None:
    bench = Bench()
    bench.add(1, [1], ("regex", "(["))
    bench.add(2, [2], ("regex", "(["))  # known to be broken by now, or waiting for the same compilation
    bench.add(3, [3], max_new_tokens=3)
    bench.run(1, 2, 3)
    for request_id in (1, 2):
        last = bench.last(request_id)
        assert last is not None
        assert (last.finish_reason, last.error_status) == (FinishReason.ERROR, "INVALID_ARG")
        assert "regex cannot be compiled" in str(last.error)
    assert bench.reason(3) is FinishReason.LENGTH


def test_max_tokens_cuts_a_guided_answer() -> None:
    bench = Bench()
    bench.add(1, [1], ("regex", r"[0-9]{50}"), max_new_tokens=5)
    bench.run(1)
    assert bench.reason(1) is FinishReason.LENGTH
    assert re.fullmatch(r"[0-9]+", bench.text(1))


def test_request_whose_every_allowed_token_is_banned_ends_with_the_reason() -> None:
    bench = Bench()
    bench.guides.filler.start = lambda matchers: NoMask(tuple(slot for slot, _ in matchers))  # type: ignore[method-assign,assignment,return-value]
    bench.add(1, [1], ("choice", '["a"]'))
    bench.run(1)
    last = bench.last(1)
    assert last is not None
    assert last.finish_reason is FinishReason.ERROR
    assert "bad words or min_tokens ban every token" in str(last.error)


class NoMask:
    """All tokens but "a": what a ban on "a" makes of the draw."""

    def __init__(self, slots: tuple[int, ...]) -> None:
        self.slots = slots

    def wait(self) -> Any:
        bits = np.ones((len(self.slots), 1024), np.uint8)
        bits[:, TOKENIZER.token_to_id("a")] = 0
        return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


class SlowGrammars(Grammars):
    """Grammars that are compiled when the test says so."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER_JSON, VOCAB_SIZE, (EOS,))
        self.may_go = threading.Event()

    def _compile(self, guided: tuple[str, str]) -> Any:
        self.may_go.wait(PATIENCE_S)
        return super()._compile(guided)


def slow_bench(**config: Any) -> tuple[Bench, SlowGrammars]:
    grammars = SlowGrammars()
    return Bench(guides=Guides(grammars, MaskFiller(VOCAB_SIZE)), **config), grammars


def test_others_pass_a_request_that_waits_for_its_grammar_and_it_comes_next() -> None:
    bench, grammars = slow_bench(max_batch_size=1)
    bench.add(1, [1], ("choice", '["held"]'))
    bench.step()
    assert not bench.engine.has_work
    assert bench.engine.stats().num_waiting == 1
    for request_id in (2, 3):
        bench.add(request_id, [request_id], max_new_tokens=5)
    bench.step()
    grammars.may_go.set()
    bench.wait_for_grammars()
    bench.run(1, 2, 3)
    assert bench.text(1) == "held"
    assert list(bench.deltas) == [2, 1, 3]  # it kept its place before the third


def test_held_request_can_be_cancelled_and_ends_at_its_deadline() -> None:
    bench, grammars = slow_bench()
    bench.add(1, [1], ("choice", '["held"]'))
    bench.add(2, [2], ("choice", '["held"]'), deadline_ms=50)
    bench.keep(bench.engine.cancel("test", 1))
    bench.now = 0.1
    bench.step()
    assert (bench.reason(1), bench.reason(2)) == (FinishReason.CANCELLED, FinishReason.DEADLINE)
    assert bench.engine.stats().num_waiting == 0
    grammars.may_go.set()
    bench.add(3, [3], ("choice", '["held"]'))
    bench.run(3)
    assert bench.text(3) == "held"


def test_grammar_that_takes_too_long_is_refused() -> None:
    bench, grammars = slow_bench()
    bench.add(1, [1], ("choice", '["held"]'))
    bench.now = 11.0
    bench.step()
    last = bench.last(1)
    assert last is not None
    assert last.error_status == "INVALID_ARG"
    assert "over 10 s" in str(last.error)
    grammars.may_go.set()


def test_engine_without_a_tokenizer_refuses_and_says_what_to_do() -> None:
    engine = Engine(model_config(), EngineConfig(session_len=64), GuidedRunner(16, 4))
    with pytest.raises(InvalidInputError, match="convert the model again"):
        engine.add("test", GenerateRequest(1, (1,), SamplingParams(guided=("regex", "a"))))


def test_masks_are_filled_while_the_forward_runs() -> None:
    """The runner gets the step before its masks are there: slow filling holds up its wait for them, not its start."""
    bench = Bench()
    has_begun = threading.Event()
    original = bench.guides.filler._fill_rows

    def fill(*arguments: Any) -> None:
        assert has_begun.wait(PATIENCE_S), "the masks were waited for before the runner got the plan"
        original(*arguments)

    bench.guides.filler._fill_rows = fill  # type: ignore[method-assign]
    runner = bench.engine._runner
    execute = runner.execute

    def execute_and_tell(plan: StepPlan) -> StepResult:
        has_begun.set()
        return execute(plan)

    runner.execute = execute_and_tell  # type: ignore[method-assign]
    bench.add(1, [1], ("choice", '["held"]'))
    bench.run(1)
    assert bench.text(1) == "held"


def test_loop_wakes_when_a_grammar_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else happens meanwhile, and by itself the loop would not look again in the test's time."""
    monkeypatch.setattr(loop, "IDLE_WAIT_S", 3600.0)
    bench = Bench()
    ends: Future[FinishReason] = Future()

    def deliver(owner: object, deltas: list[TokenDelta]) -> None:
        if deltas[-1].finish_reason is not None:
            ends.set_result(deltas[-1].finish_reason)

    bench.guides.grammars.open(("choice", '["a"]')).result(PATIENCE_S)  # the tokenizer is loaded
    engine_loop = EngineLoop(bench.engine, deliver, lambda stats: None, lambda reason: None)
    engine_loop.start()
    engine_loop.submit("test", GenerateRequest(1, (1,), SamplingParams(max_new_tokens=5, guided=("choice", '["a"]'))))
    assert ends.result(PATIENCE_S) is FinishReason.STOP
    engine_loop.stop()
