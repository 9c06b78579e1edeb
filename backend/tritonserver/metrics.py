"""Custom metrics through Triton: one publisher a server, a few calls a second, everything measured in the engine.

Each family stands under `turbotriton_*` and, unless TURBOTRITON_METRIC_ALIASES=0, under the names that dashboards, autoscalers and
routers look for already: `vllm:*`, and `nv_trt_llm_*` with the three samples that Triton's ORCA header is made of.
"""

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from turbotriton.contract import env
from turbotriton.contract.wire import EngineStats

from .connection import EngineConnection

__all__ = ["MetricsPublisher"]

logger = logging.getLogger(__name__)

INTERVAL_S = 0.2
MAX_OBSERVATIONS_A_TICK = 40  # 200 a second: an observation costs a round trip of about 100 us
LATENCY_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]


@dataclass(frozen=True, slots=True)
class _Value:
    """A gauge or counter: its names, and what it reads from the stats."""

    kind: str  # "gauge" or "counter"
    names: tuple[tuple[str, dict[str, str]], ...]  # (family, labels), ours first
    text: str
    field: str

    def of(self, stats: EngineStats) -> float:
        if self.field == "kv_usage":
            return stats.num_used_blocks / stats.num_total_blocks if stats.num_total_blocks else 0.0
        return float(getattr(stats, self.field))


def _kv(name: str) -> tuple[str, dict[str, str]]:
    return ("nv_trt_llm_kv_cache_block_metrics", {"kv_cache_block_type": name})


def _requests(name: str) -> tuple[str, dict[str, str]]:
    return ("nv_trt_llm_request_metrics", {"request_type": name})


def _value(kind: str, field: str, text: str, own: str, *aliases: str | tuple[str, dict[str, str]]) -> _Value:
    named = tuple((alias, {}) if isinstance(alias, str) else alias for alias in aliases)
    return _Value(kind, ((f"turbotriton_{own}", {}), *named), text, field)


VALUES = (
    _value("gauge", "num_waiting", "Requests waiting", "requests_waiting", "vllm:num_requests_waiting", _requests("waiting")),
    _value("gauge", "num_running", "Requests running", "requests_running", "vllm:num_requests_running", _requests("scheduled")),
    _value("gauge", "num_waiting_tokens", "Prompt tokens waiting", "waiting_tokens"),
    _value(
        "gauge",
        "kv_usage",
        "Share of KV blocks in use",
        "kv_cache_usage",
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",  # its former name, which routers still look for
        _kv("fraction"),
    ),
    _value("gauge", "num_used_blocks", "KV blocks that running requests hold", "kv_blocks_used", _kv("used")),
    _value("gauge", "num_total_blocks", "KV blocks", "kv_blocks_total", _kv("max")),
    _value("gauge", "block_size", "Tokens a KV block", "kv_block_size", _kv("tokens_per")),
    _value(
        "counter",
        "prompt_tokens_total",
        "Prompt tokens",
        "prompt_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:prefix_cache_queries_total",
    ),
    _value(
        "counter",
        "cached_tokens_total",
        "Prompt tokens found in the prefix cache",
        "prefix_cache_hit_tokens_total",
        "vllm:prefix_cache_hits_total",
    ),
    _value("counter", "computed_tokens_total", "Tokens that went through the model", "computed_tokens_total"),
    _value("counter", "generation_tokens_total", "Tokens generated", "generation_tokens_total", "vllm:generation_tokens_total"),
    _value("counter", "preemptions_total", "Requests preempted", "preemptions_total", "vllm:num_preemptions_total"),
)

HISTOGRAMS = (
    ("turbotriton_time_to_first_token_seconds", "vllm:time_to_first_token_seconds", "Seconds to the first token"),
    ("turbotriton_inter_token_seconds", "vllm:inter_token_latency_seconds", "Seconds between two tokens"),
    ("turbotriton_e2e_seconds", "vllm:e2e_request_latency_seconds", "Seconds from arrival to the end"),
)


class MetricsPublisher:
    """Publishes until `close`. Gauges move by increments: setting one would hold the interpreter's lock for a round trip."""

    def __init__(self, connection: EngineConnection, model_name: str) -> None:
        self._connection = connection
        self._labels = {"model": model_name}
        self._families: dict[str, Any] = {}
        aliases = env.metric_aliases()
        self._values = [(value, self._metrics(value, aliases)) for value in VALUES]
        self._shown = [0.0] * len(VALUES)
        self._counted = [0.0] * len(VALUES)  # counters of the engine that is connected now
        self._engine_pid = 0
        self._up = self._family("turbotriton_engine_up", "1 while the engine process answers", "gauge").Metric(
            labels=self._labels
        )
        self._is_shown_up = 0
        self._histograms = [self._histogram(names[: 1 + aliases], text) for *names, text in HISTOGRAMS]
        self._tick = 0
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def _metrics(self, value: _Value, aliases: bool) -> list[Any]:
        names = value.names if aliases else value.names[:1]
        return [
            self._family(name, value.text, "gauge" if name.startswith("nv_") else value.kind).Metric(labels=self._labels | labels)
            for name, labels in names
        ]

    def _family(self, name: str, text: str, kind: str) -> Any:
        if name not in self._families:
            kinds = {"gauge": pb_utils.MetricFamily.GAUGE, "counter": pb_utils.MetricFamily.COUNTER}
            self._families[name] = pb_utils.MetricFamily(name=name, description=text, kind=kinds[kind])
        return self._families[name]

    def _histogram(self, names: Iterable[str], text: str) -> list[Any]:
        metrics = []
        for name in names:
            family = pb_utils.MetricFamily(name=name, description=text, kind=pb_utils.MetricFamily.HISTOGRAM)
            self._families[name] = family
            metrics.append(family.Metric(labels=self._labels, buckets=LATENCY_BUCKETS))
        return metrics

    def _run(self) -> None:
        while not self._is_closing.wait(INTERVAL_S):
            try:
                self._publish()
            except Exception:  # metrics must not take the door down
                logger.exception("the metrics could not be published")

    def _publish(self) -> None:
        self._tick += 1
        is_up = int(self._connection.is_up)
        if is_up != self._is_shown_up:
            self._up.increment(is_up - self._is_shown_up)
            self._is_shown_up = is_up
        if not is_up:
            self._show(EngineStats())
            return
        client = self._connection.client()
        if client.info.pid != self._engine_pid:
            self._engine_pid = client.info.pid
            self._counted = [0.0] * len(VALUES)
        self._show(client.stats())
        for metrics, seconds in zip(self._histograms, client.take_observations(), strict=True):
            for value in _thinned(seconds, MAX_OBSERVATIONS_A_TICK // (len(self._histograms) * len(metrics))):
                for metric in metrics:
                    metric.observe(value)

    def _show(self, stats: EngineStats) -> None:
        for index, (value, metrics) in enumerate(self._values):
            now = value.of(stats)
            if value.kind == "gauge":
                step, self._shown[index] = now - self._shown[index], now
            else:
                step = max(now - self._counted[index], 0.0)
                self._counted[index] = max(now, self._counted[index])
            if step:
                for metric in metrics:
                    metric.increment(step)

    def close(self) -> None:
        """Metrics die with the model: dropped here, before the process leaves."""
        self._is_closing.set()
        self._thread.join(2)
        self._values.clear()
        self._histograms.clear()
        self._up = None
        self._families.clear()


def _thinned(values: list[float], most: int) -> list[float]:
    """At most `most` of the values, evenly taken."""
    if len(values) <= most:
        return values
    return [values[i * len(values) // most] for i in range(most)]
