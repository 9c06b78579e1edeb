"""An engine that takes the time of a GPU and computes nothing: made-up tokens at the pace of a 1.8B or an 8B model on an H200.

    python3 tests/bench/fake_engine.py -m turbotriton.backend.engine --weights DIR --socket PATH [--owner-pid N]

Scheduler, engine loop, socket and frames are the real ones; only the runner is not. What the doors, tritonserver and clients can carry
is so found without a GPU. Named by TURBOTRITON_PYTHON it takes the place of the interpreter that the doors start the engine with.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from turbotriton.backend.engine.engine import Engine
from turbotriton.backend.engine.server import EngineServer
from turbotriton.backend.scheduling.plan import StepPlan, StepResult
from turbotriton.contract import env
from turbotriton.contract.ini import read_workspace_config

__all__ = ["FakeRunner", "Pace", "make_fake_engine", "take_engines_place"]

KNUTH = 2654435761


@dataclass(frozen=True)
class Pace:
    """Seconds of a step: a part of its own, and one for each row that decodes and each prompt token."""

    step_s: float
    decode_s: float
    prompt_token_s: float


#: Of each shape of make_checkpoint.py, from what bench_engine.py measured on an H200 at 1 to 256 rows.
PACES = {"1.8b": Pace(0.0011, 27e-6, 1 / 165_000), "8b": Pace(0.0042, 43e-6, 1 / 40_000), "tiny": Pace(0.0005, 1e-6, 1e-6)}


class FakeRunner:
    """A device that works on one step after the other; `device` is "cpu", so that nobody looks for another."""

    device = "cpu"
    compute_dtype = "bf16"

    def __init__(self, vocab_size: int, block_size: int, num_blocks: int, pace: Pace) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self._vocab_size, self._pace = vocab_size, pace
        self._free_at = 0.0

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        prompt_tokens = sum(row.num_tokens for row in plan.rows if row.num_tokens > 1)
        decodes = sum(row.num_tokens == 1 for row in plan.rows)
        pace = self._pace
        seconds = pace.step_s + decodes * pace.decode_s + prompt_tokens * pace.prompt_token_s if plan.rows else 0.0
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
    runner = FakeRunner(model.vocab_size, config.cache_block_seq_len, num_blocks, PACES[model.model_name])
    return Engine(model, config, runner, overlap=True)


def take_engines_place(folder: Path) -> None:
    """Servers that are started from now on take this program for their engine; `folder` gets the script that they run."""
    wrapper = folder / "fake-python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} "$@"\n')
    wrapper.chmod(0o755)
    os.environ["TURBOTRITON_PYTHON"] = str(wrapper)


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
