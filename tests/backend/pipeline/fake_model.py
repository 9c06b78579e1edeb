"""A pipeline over the scheduler's fake runner and a tokenizer of the words w0 ... w998: fast, and every answer is known."""

import time
from collections.abc import Callable

from tests.backend.scheduling.fakes import VOCAB_SIZE, FakeRunner, model_config, next_token, oracle
from tokenizers import Tokenizer, models, pre_tokenizers

from turbotriton.backend.engine.engine import Engine
from turbotriton.backend.pipeline.engine_thread import EngineThread
from turbotriton.backend.pipeline.inference import Pipeline
from turbotriton.backend.scheduling.plan import ScheduledRow, StepPlan, StepResult
from turbotriton.contract.ini import EngineConfig
from turbotriton.text.detokenizer import TextTokenizer
from turbotriton.text.prompt_format import choose_format

NUM_WORDS = VOCAB_SIZE - 1


class QuickRunner(FakeRunner):
    """FakeRunner without its model of the cache, and with a step that takes as long as a device's."""

    def __init__(self, num_blocks: int, block_size: int, step_s: float = 0.0) -> None:
        super().__init__(num_blocks, block_size)
        self.rows_of_steps: list[int] = []
        self.step_s = step_s
        self.before_step: Callable[[], None] = lambda: None

    def execute(self, plan: StepPlan) -> StepResult:
        self.before_step()
        time.sleep(self.step_s)
        self.rows_of_steps.append(len(plan.rows))
        return super().execute(plan)

    def _run(self, row: ScheduledRow) -> list[int]:
        known = self.slots[row.slot]
        if not row.samples:
            return []
        known.append(next_token(known))
        return known[-1:]


def tokenizer() -> TextTokenizer:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(NUM_WORDS)} | {"<end>": NUM_WORDS}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<end>"])
    return TextTokenizer(words, {"eos_token": "<end>"}, {})


def answer_to(prompt: str, num_tokens: int) -> str:
    return " ".join(f"w{token}" for token in oracle([int(word[1:]) for word in prompt.split()], num_tokens))


def fake_pipeline(runner: FakeRunner, max_batch_size: int = 4, session_len: int = 64) -> Pipeline:
    config = EngineConfig(
        session_len=session_len,
        max_batch_size=max_batch_size,
        num_tokens_per_iter=2048,
        max_queued_requests=10**9,
        max_queued_tokens=10**9,
    )
    words = tokenizer()
    return Pipeline(EngineThread(Engine(model_config(), config, runner)), words, choose_format(words))
