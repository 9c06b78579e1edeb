"""Records of a run -> figures: throughput, percentiles of every latency, goodput under given limits."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .load import Record

__all__ = ["SLO_NAMES", "Spread", "Summary", "parse_slo", "spread_of", "summarise"]

PERCENTILES = (50, 90, 95, 99)
SLO_NAMES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Throughput counts requests that ended well, over the time from the first send to the last end."""

    num_requests: int
    num_failed: int
    duration_s: float
    requests_per_s: float
    input_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    most_at_once: int
    latest_send_ms: float  # how far the generator fell behind the arrival times at worst
    ttft_ms: Spread | None  # send to first token
    tpot_ms: Spread | None  # a token after the first response, mean of a request
    itl_ms: Spread | None  # between two responses
    e2e_ms: Spread | None
    slo_ms: dict[str, float]
    goodput_requests_per_s: float | None  # requests within every limit of slo_ms
    errors: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_slo(text: str) -> tuple[str, float]:
    """ "ttft=200" -> ("ttft", 200.0), milliseconds. Raises ValueError, as argparse wants it."""
    name, _, value = text.partition("=")
    if name not in SLO_NAMES or float(value) <= 0:
        raise ValueError(text)
    return name, float(value)


def spread_of(seconds: Sequence[float]) -> Spread | None:
    if not seconds:
        return None
    ordered = sorted(seconds)
    last = len(ordered) - 1
    points = [ordered[round(last * share / 100)] for share in PERCENTILES]
    return Spread(*(1e3 * value for value in (statistics.fmean(ordered), *points, ordered[-1])))


def summarise(records: Sequence[Record], slo_ms: Mapping[str, float]) -> Summary:
    """records: at least one. slo_ms: limits in milliseconds by the names of SLO_NAMES; empty: no goodput."""
    good = [record for record in records if record.error is None]
    duration_s = max(record.ended_s for record in records) - min(record.sent_s for record in records)
    num_output = sum(record.num_output_tokens for record in good)
    num_input = sum(record.num_input_tokens for record in good)
    within = sum(_is_within(record, slo_ms) for record in good)
    return Summary(
        num_requests=len(records),
        num_failed=len(records) - len(good),
        duration_s=duration_s,
        requests_per_s=len(good) / duration_s,
        input_tokens=num_input,
        output_tokens=num_output,
        output_tokens_per_s=num_output / duration_s,
        total_tokens_per_s=(num_input + num_output) / duration_s,
        most_at_once=_most_at_once(records),
        latest_send_ms=1e3 * max(record.sent_s - record.due_s for record in records),
        ttft_ms=spread_of([record.ttft_s for record in good]),
        tpot_ms=spread_of([tpot for record in good if (tpot := record.tpot_s) is not None]),
        itl_ms=spread_of([gap for record in good for gap in record.gaps_s()]),
        e2e_ms=spread_of([record.e2e_s for record in good]),
        slo_ms=dict(slo_ms),
        goodput_requests_per_s=within / duration_s if slo_ms else None,
        errors=dict(Counter(record.error for record in records if record.error is not None).most_common()),
    )


def _is_within(record: Record, slo_ms: Mapping[str, float]) -> bool:
    measured = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2e": record.e2e_s}
    return all(1e3 * measured[name] <= limit for name, limit in slo_ms.items())


def _most_at_once(records: Sequence[Record]) -> int:
    steps = sorted([(record.sent_s, 1) for record in records] + [(record.ended_s, -1) for record in records])
    most = running = 0
    for _, step in steps:
        running += step
        most = max(most, running)
    return most
