"""A quantised model against the original on a text: perplexity, KL divergence, agreement of the most likely token; and a plot.

Works on logits: where they come from is the caller's business.

    perplexity  exp(mean of -ln p(next token))              KL   mean over positions of sum p ln(p / q), p the original's
    agreement   share of positions where both models' most likely token is the same
"""

import html
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch

from .datasets import Window

__all__ = ["Comparison", "Report", "compare", "plot_svg"]

BINS = 40


@dataclass(slots=True)
class Comparison:
    """Sums over positions, and each position's KL for the plot."""

    name: str
    num_tokens: int = 0
    nll: float = 0.0
    original_nll: float = 0.0
    agreed: int = 0
    divergences: list[float] = field(default_factory=list)

    def add(self, original: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits [num_tokens, vocab_size], fp32; targets: [num_tokens], the token that really follows."""
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (original, quantized))
        self.num_tokens += len(targets)
        self.original_nll -= float(p.gather(1, targets[:, None]).sum())
        self.nll -= float(q.gather(1, targets[:, None]).sum())
        self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.divergences += (p.exp() * (p - q)).sum(-1).clamp(min=0).tolist()

    @property
    def report(self) -> "Report":
        original, perplexity = math.exp(self.original_nll / self.num_tokens), math.exp(self.nll / self.num_tokens)
        ordered = sorted(self.divergences)
        return Report(
            name=self.name,
            num_tokens=self.num_tokens,
            original_perplexity=original,
            perplexity=perplexity,
            perplexity_rise=perplexity / original - 1,
            mean_kl=sum(ordered) / len(ordered),
            p99_kl=ordered[int(0.99 * (len(ordered) - 1))],
            top1_agreement=self.agreed / self.num_tokens,
        )


@dataclass(frozen=True, slots=True)
class Report:
    name: str
    num_tokens: int
    original_perplexity: float
    perplexity: float
    perplexity_rise: float
    mean_kl: float
    p99_kl: float
    top1_agreement: float

    def lines(self) -> list[str]:
        return [
            f"{self.name} over {self.num_tokens} tokens",
            f"  perplexity       {self.perplexity:.4f}, original {self.original_perplexity:.4f} ({self.perplexity_rise:+.2%})",
            f"  KL divergence    {self.mean_kl:.5f} nats a token, 99% below {self.p99_kl:.4f}",
            f"  top-1 agreement  {self.top1_agreement:.2%}",
        ]

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def compare(name: str, windows: Iterable[tuple[torch.Tensor, torch.Tensor, Window]]) -> Comparison:
    """windows: (original logits, quantised logits, the window) of n tokens each; the last token has no successor."""
    comparison = Comparison(name)
    for original, quantized, window in windows:
        scored = slice(max(window.num_unscored - 1, 0), -1)
        comparison.add(original[scored], quantized[scored], window.token_ids[1:][max(window.num_unscored - 1, 0) :])
    return comparison


def plot_svg(comparison: Comparison) -> str:
    """How KL divergence is spread over tokens: a histogram over its logarithm, with the report's numbers as its title."""
    width, height, left, bottom = 720, 320, 60, 50
    exponents = [max(math.log10(max(value, 1e-12)), -8.0) for value in comparison.divergences]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    high = max(high, low + 1)
    counts = [0] * BINS
    for exponent in exponents:
        counts[min(int((exponent - low) / (high - low) * BINS), BINS - 1)] += 1
    step, tallest = (width - left - 20) / BINS, max(counts)
    bars = []
    for i, count in enumerate(counts):
        bar = (height - bottom - 70) * count / tallest
        bars.append(
            f'<rect x="{left + i * step:.1f}" y="{height - bottom - bar:.1f}" width="{step - 1:.1f}" height="{bar:.1f}" fill="#3a6ea5"/>'
        )
    ticks = []
    for exponent in range(low, high + 1):
        x = left + (exponent - low) / (high - low) * BINS * step
        ticks.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">1e{exponent}</text>')
    report = comparison.report
    numbers = f"perplexity {report.perplexity_rise:+.2%}, KL {report.mean_kl:.5f}, top-1 agreement {report.top1_agreement:.2%}"
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{left}" y="24" font-size="15">{html.escape(comparison.name)}</text>',
            f'<text x="{left}" y="44">{html.escape(numbers)}</text>',
            *bars,
            f'<line x1="{left}" y1="{height - bottom}" x2="{width - 20}" y2="{height - bottom}" stroke="black"/>',
            *ticks,
            f'<text x="{(left + width) / 2:.0f}" y="{height - 12}" text-anchor="middle">KL divergence of a token, nats</text>',
            f'<text x="16" y="{height / 2:.0f}" transform="rotate(-90 16 {height / 2:.0f})" text-anchor="middle">tokens</text>',
            "</svg>",
            "",
        )
    )
