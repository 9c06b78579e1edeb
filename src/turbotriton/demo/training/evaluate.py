"""Greedy answers to questions of one split, and how many are right, over all and for each kind."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer

from .corpus import Example, sample
from .model import DemoModel
from .splits import Split
from .tokenizer import SPECIAL_TOKENS, render

__all__ = ["Report", "answer_greedily", "evaluate"]

_ROWS_AT_ONCE = 128  # keeps the cache of a chunk small enough for a CPU


@dataclass(slots=True)
class Report:
    """right, asked: by kind; failures: (kind, prompt, answer, expected)."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failures: list[tuple[str, str, str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def accuracy(self, kind: str) -> float:
        return self.right[kind] / self.asked[kind]

    @property
    def kinds(self) -> dict[str, float]:
        return {kind: self.accuracy(kind) for kind in self.asked}

    @property
    def overall(self) -> float:
        return sum(self.right.values()) / sum(self.asked.values())

    def table(self, failures_per_kind: int) -> str:
        lines = [f"{'kind':16s} {'right':>6s} {'asked':>6s} {'accuracy':>9s}"]
        lines += [f"{kind:16s} {self.right[kind]:6d} {self.asked[kind]:6d} {share:9.2%}" for kind, share in self.kinds.items()]
        lines.append(f"{'overall':16s} {sum(self.right.values()):6d} {sum(self.asked.values()):6d} {self.overall:9.2%}")
        shown: dict[str, int] = defaultdict(int)
        for kind, prompt, answer, expected in self.failures:
            if shown[kind] < failures_per_kind:
                shown[kind] += 1
                lines.append(f"  {kind}: {prompt!r} -> {answer!r}, expected {expected!r}")
        return "\n".join(lines)


@torch.no_grad()
def answer_greedily(model: DemoModel, tokenizer: Tokenizer, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
    """The answer to each example's prompt: up to `<|im_end|>` or `max_new_tokens`."""
    end_id = SPECIAL_TOKENS.index("<|im_end|>")
    device = model.cos.device
    answers: list[str] = []
    for first in range(0, len(examples), _ROWS_AT_ONCE):
        prompts = [
            tokenizer.encode(render(e.prompt, add_generation_prompt=True)).ids for e in examples[first : first + _ROWS_AT_ONCE]
        ]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest = int(lengths.max())
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        cache = model.new_cache(len(prompts), longest + max_new_tokens)
        hidden = model.extend(ids, torch.arange(longest, device=device).expand_as(ids).contiguous(), cache)
        hidden = hidden.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1]))
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        made = []
        for step in range(max_new_tokens):
            token = model.head(hidden[:, -1]).argmax(-1).masked_fill(done, end_id)
            made.append(token)
            done |= token == end_id
            if step % 8 == 7 and bool(done.all()):
                break
            hidden = model.extend(token[:, None], (lengths + step)[:, None], cache)
        for row in torch.stack(made, dim=1).tolist():
            answers.append(tokenizer.decode(row[: row.index(end_id)] if end_id in row else row))
    return answers


def evaluate(
    model: DemoModel, tokenizer: Tokenizer, split: Split, per_kind: int, seed: int, kinds: Sequence[str] | None = None
) -> Report:
    """Asks `per_kind` questions of each kind. The weights count as they are: round them before to measure a rounded export."""
    begun = time.monotonic()
    report = Report()
    examples = [example for example in sample(split, per_kind, seed) if kinds is None or example.kind in kinds]
    short = [example for example in examples if example.kind != "stories"]
    stories = [example for example in examples if example.kind == "stories"]
    answers = answer_greedily(model, tokenizer, short, 128) + (answer_greedily(model, tokenizer, stories, 256) if stories else [])
    for example, answer in zip(short + stories, answers, strict=True):
        report.asked[example.kind] += 1
        if example.is_right(answer):
            report.right[example.kind] += 1
        else:
            question = " / ".join(content for _, content in example.prompt)
            report.failures.append((example.kind, question, answer, example.accepted[0]))
    report.seconds = time.monotonic() - begun
    return report
