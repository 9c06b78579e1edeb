"""Makes the bundled checkpoint: corpus, tokenizer, training by the clock, evaluation on held-out questions.

    PYTHONPATH=src python3 -m turbotriton.demo.training.train --out checkpoint --minutes 6

The learning rate follows the share of the time that has passed, so any `--minutes` ends annealed. Weights that are best on the
development split are written at each check, so an interrupted run leaves a checkpoint. Kinds that are weak on that split are
drawn more often. The held-out split is looked at once, at the end. Prints a table, then one line of JSON.
"""

import argparse
import json
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import KINDS
from .evaluate import Report, evaluate
from .model import DemoConfig, DemoModel, export_checkpoint
from .muon import Muon
from .pool import Pool, build_pool, draw_batch, target_ids
from .tokenizer import save_tokenizer

__all__ = ["main", "train"]

logger = logging.getLogger(__name__)

#: Share of each kind at the start: hard kinds more often.
_WEIGHTS = {
    "addition": 2.0,
    "subtraction": 2.0,
    "comparison": 1.5,
    "counting": 1.5,
    "repeating": 1.5,
    "small talk": 1.5,
    "commands": 1.5,
    "stories": 0.5,
}


@dataclass(slots=True)
class Options:
    out: Path
    minutes: float
    device: str
    steps: int | None
    num_examples: int
    batch_tokens: int
    learning_rate: float
    matrix_learning_rate: float
    threads: int
    num_checks: int
    per_kind: int
    dev_per_kind: int
    workers: int
    seed: int
    kinds: list[str]
    row_lens: list[int]
    init: Path | None
    compile: bool


class Trainer:
    """Owns model, optimizer and the kinds' weights; the clock decides the learning rate and the end."""

    def __init__(self, options: Options, tokenizer: Tokenizer, pool: Pool, begun: float) -> None:
        self.options, self.tokenizer, self.pool = options, tokenizer, pool
        torch.manual_seed(options.seed)
        self.config = DemoConfig(vocab_size=tokenizer.get_vocab_size())
        self.model = DemoModel(self.config).to(options.device)
        if options.init is not None:
            stored = load_file(options.init / "model.safetensors")
            self.model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
        self.assistant_id = int(tokenizer.token_to_id("assistant") or 0)
        embedding = self.model.model.embed_tokens.weight
        matrices = [p for p in self.model.parameters() if p.ndim == 2 and p is not embedding]
        others = [p for p in self.model.parameters() if p.ndim == 1 or p is embedding]
        self.on_gpu = options.device.startswith("cuda")
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=options.matrix_learning_rate),
            torch.optim.AdamW(others, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.rates = (options.matrix_learning_rate, options.learning_rate)
        self.weights = {kind: _WEIGHTS.get(kind, 1.0) for kind in options.kinds}
        self.loss_of = torch.compile(self._loss, dynamic=False) if options.compile else self._loss
        self.train_begun, self.deadline = time.monotonic(), begun + options.minutes * 60
        self.best = -1.0
        self.steps_done = 0

    def _loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16) if self.on_gpu else nullcontext():
            logits = self.model(ids)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)

    def progress(self) -> float:
        """Share of the run that is over, 0 to 1."""
        by_time = (time.monotonic() - self.train_begun) / max(self.deadline - self.train_begun, 1e-9)
        by_steps = self.steps_done / self.options.steps if self.options.steps else 0.0
        return min(1.0, by_steps if self.options.steps else by_time)

    def step(self) -> Tensor:
        """One update; -> the loss on the device, unread."""
        row_lens = self.options.row_lens
        row_len = (
            row_lens[0] if self.steps_done % 5 or len(row_lens) == 1 else row_lens[1 + self.steps_done // 5 % (len(row_lens) - 1)]
        )
        ids = draw_batch(self.pool, self.weights, max(1, self.options.batch_tokens // row_len), row_len)
        loss: Tensor = self.loss_of(ids, target_ids(ids, self.assistant_id))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warmup = min(1.0, (self.steps_done + 1) / 50)
        share = warmup * min(1.0, max(1.0 - self.progress(), 0.0) / 0.6 + 0.01)  # constant, then down to zero
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return loss.detach()

    def check(self) -> Report:
        """Measures the rounded weights on the development split, keeps the best, and has weak kinds drawn more often."""
        report = evaluate(self.rounded(), self.tokenizer, "dev", self.options.dev_per_kind, self.options.seed, self.options.kinds)
        shares = report.kinds
        score = report.overall + min(shares.values())
        if score >= self.best:
            self.best = score
            export_checkpoint(self.config, dict(self.model.named_parameters()), self.options.out)
        self.weights = {kind: _WEIGHTS.get(kind, 1.0) * (0.4 + min(12 * (1 - shares[kind]), 3.0)) for kind in self.options.kinds}
        return report

    def rounded(self) -> DemoModel:
        """A copy in float32 whose weights went through bf16, as the exported ones do."""
        copy = DemoModel(self.config).to(self.options.device)
        copy.load_state_dict({name: tensor.bfloat16().float() for name, tensor in self.model.state_dict().items()})
        return copy


def train(options: Options) -> dict[str, object]:
    """-> the result that `main` prints as JSON."""
    begun = time.monotonic()
    tokenizer = save_tokenizer(options.out)
    pool = build_pool(tokenizer, options.num_examples, options.device, options.workers, options.seed)
    logger.info("%d examples, %d tokens in %.0f s", len(pool.lengths), len(pool.tokens), time.monotonic() - begun)
    trainer = Trainer(options, tokenizer, pool, begun)
    for _ in range(6 if options.compile else 1):  # every row length compiles before the schedule starts
        loss = trainer.step()
    if options.init is not None:
        trainer.check()  # which kinds are weak already
    trainer.train_begun = time.monotonic()
    logger.info("first steps after %.0f s, loss %.3f", time.monotonic() - begun, float(loss))
    next_check = 1.0 / options.num_checks
    next_log = 0.0
    while trainer.progress() < 1.0:
        loss = trainer.step()
        progress = trainer.progress()
        if trainer.steps_done % 16 == 0 and options.device != "cpu":
            torch.cuda.synchronize()  # the clock must not run ahead of the device
        if progress >= next_log:
            next_log = progress + 0.02
            logger.info(
                "%5.1f%% step %d loss %.4f at %.0f s", 100 * progress, trainer.steps_done, float(loss), time.monotonic() - begun
            )
        if progress >= next_check and progress < 1.0:
            report = trainer.check()
            next_check = trainer.progress() + 1.0 / options.num_checks
            weak = {kind: round(share, 3) for kind, share in report.kinds.items() if share < 0.98}
            logger.info("dev %.2f%% in %.1f s, weak: %s", 100 * report.overall, report.seconds, weak)
    trainer.check()
    logger.info("trained: %d steps, %.0f s; evaluating the best weights", trainer.steps_done, time.monotonic() - begun)
    return _final(options, trainer, begun)


def _final(options: Options, trainer: Trainer, begun: float) -> dict[str, object]:
    """Reads the written weights back and asks the held-out questions."""
    stored = load_file(options.out / "model.safetensors")
    model = DemoModel(trainer.config).to(options.device)
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    report = evaluate(model, trainer.tokenizer, "test", options.per_kind, options.seed, options.kinds)
    print(report.table(failures_per_kind=4), flush=True)
    size = sum(path.stat().st_size for path in options.out.iterdir() if path.is_file())
    return {
        "overall": round(report.overall, 4),
        "kinds": {kind: round(share, 4) for kind, share in report.kinds.items()},
        "asked_per_kind": options.per_kind,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "checkpoint_bytes": size,
        "steps": trainer.steps_done,
        "tokens": trainer.steps_done * options.batch_tokens,
        "seconds": round(time.monotonic() - begun, 1),
        "device": torch.cuda.get_device_name() if trainer.on_gpu else "cpu",
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="time for corpus and training together; the last evaluation comes after"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=None, help="train this many steps instead of by the clock")
    parser.add_argument("--num-examples", type=int, default=1_000_000)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--matrix-learning-rate", type=float, default=0.02, help="of the orthogonalised updates")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU")
    parser.add_argument("--num-checks", type=int, default=7, help="checks on the development split")
    parser.add_argument("--per-kind", type=int, default=500, help="held-out questions of each kind at the end")
    parser.add_argument("--dev-per-kind", type=int, default=100)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that make the corpus")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="train on these kinds only")
    parser.add_argument("--row-lens", type=int, nargs="+", default=[128, 512], help="the first is used four times of five")
    parser.add_argument("--init", type=Path, default=None, help="go on from the weights of this checkpoint")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the training step")
    options = Options(**vars(parser.parse_args()))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    print(json.dumps(train(options)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
