"""An engine that takes the time of a GPU and computes nothing: made-up tokens at the pace of a 1.8B model on an H200.

    python3 tests/bench/fake_engine.py -m turbotriton.backend.engine --weights DIR --socket PATH [--owner-pid N]

Scheduler, engine loop, socket and frames are the real ones; only the runner is not. What the doors, tritonserver and clients can carry
is so found without a GPU. Named by TURBOTRITON_PYTHON it takes the place of the interpreter that the doors start the engine with.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from turbotriton.backend.engine.engine import Engine
from turbotriton.backend.engine.server import EngineServer
from turbotriton.backend.scheduling.plan import StepPlan, StepResult
from turbotriton.contract import env
from turbotriton.contract.ini import read_workspace_config

__all__ = ["FakeRunner", "make_fake_engine"]

STEP_S = 0.0011
SECONDS_A_DECODE = 27e-6
SECONDS_A_PROMPT_TOKEN = 1 / 165_000
KNUTH = 2654435761


class FakeRunner:
    """A device that works on one step after the other; `device` is "cpu", so that nobody looks for another."""

    device = "cpu"
    compute_dtype = "bf16"

    def __init__(self, vocab_size: int, block_size: int, num_blocks: int) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self._vocab_size = vocab_size
        self._free_at = 0.0

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        prompt_tokens = sum(row.num_tokens for row in plan.rows if row.num_tokens > 1)
        decodes = sum(row.num_tokens == 1 for row in plan.rows)
        seconds = STEP_S + decodes * SECONDS_A_DECODE + prompt_tokens * SECONDS_A_PROMPT_TOKEN if plan.rows else 0.0
        self._free_at = done_at = max(self._free_at, time.perf_counter()) + seconds
        drawn = tuple(
            3 + (row.slot * 7919 + row.start + row.num_tokens) * KNUTH % (self._vocab_size - 3)
            for row in plan.rows
            if row.samples
        )

        def collect() -> StepResult:
            time.sleep(max(0.0, done_at - time.perf_counter()))
            return StepResult(drawn)

        return collect

    def close(self) -> None:
        pass


def make_fake_engine(folder: Path, options: Callable[[str], str | None]) -> Engine:
    workspace = read_workspace_config(folder / "config.ini")
    model, config = workspace.model_config(), workspace.engine_config(options)
    num_blocks = config.max_batch_size * -(-min(config.session_len, 2048) // config.cache_block_seq_len)
    runner = FakeRunner(model.vocab_size, config.cache_block_seq_len, num_blocks)
    return Engine(model, config, runner, overlap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", dest="module", required=True, help="the module that a real interpreter would run; not read")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--owner-pid", type=int)
    args = parser.parse_args()
    return EngineServer(make_fake_engine(args.weights, env.engine_option), args.socket, args.owner_pid).serve()


if __name__ == "__main__":
    sys.exit(main())
