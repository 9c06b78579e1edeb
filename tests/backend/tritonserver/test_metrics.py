"""The metrics page: what stands where, counters over an engine's restart, a bounded number of observations."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.backend.tritonserver.fake_engine import INFO, FakeClient, FakeConnection
from tests.backend.tritonserver.fake_pb_utils import MetricFamily

from turbotriton.contract.wire import EngineStats

STATS = EngineStats(
    num_waiting=3,
    num_running=2,
    num_waiting_tokens=40,
    num_used_blocks=6,
    num_total_blocks=8,
    block_size=16,
    prompt_tokens_total=100,
    cached_tokens_total=30,
    computed_tokens_total=90,
    generation_tokens_total=50,
    preemptions_total=1,
)


class Page:
    """A publisher whose ticks the test makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
        from turbotriton.backend.tritonserver import metrics

        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(metrics, "INTERVAL_S", 3600.0)
        self.connection = FakeConnection(FakeClient(current=STATS))
        self.publisher: Any = metrics.MetricsPublisher(self.connection, "demo")

    def tick(self, **changed: Any) -> None:
        self.connection.current.current = replace(self.connection.current.current, **changed)
        self.publisher._publish()

    def __getitem__(self, name: str) -> float:
        (metric,) = MetricFamily.families[name].metrics
        value: float = metric.value
        return value


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    page = Page(monkeypatch)
    yield page
    page.publisher.close()


def test_every_value_stands_under_our_name(page: Page) -> None:
    page.tick()
    shown = {
        name: page[f"turbotriton_{name}"] for name in ("requests_waiting", "requests_running", "kv_cache_usage", "engine_up")
    }
    assert shown == {"requests_waiting": 3, "requests_running": 2, "kv_cache_usage": 0.75, "engine_up": 1}
    counted = ("prompt", "computed", "generation")
    assert [page[f"turbotriton_{name}_tokens_total"] for name in counted] == [100, 90, 50]
    assert (page["turbotriton_prefix_cache_hit_tokens_total"], page["turbotriton_preemptions_total"]) == (30, 1)


def test_the_names_that_autoscalers_look_for_carry_the_same(page: Page) -> None:
    page.tick()
    assert (page["vllm:num_requests_waiting"], page["vllm:num_requests_running"], page["vllm:kv_cache_usage_perc"]) == (
        3,
        2,
        0.75,
    )
    assert page["vllm:generation_tokens_total"] == 50
    blocks = {
        m.labels["kv_cache_block_type"]: m.value for m in MetricFamily.families["nv_trt_llm_kv_cache_block_metrics"].metrics
    }
    assert blocks == {"fraction": 0.75, "used": 6, "max": 8, "tokens_per": 16}
    requests = {m.labels["request_type"]: m.value for m in MetricFamily.families["nv_trt_llm_request_metrics"].metrics}
    assert requests == {"waiting": 3, "scheduled": 2}
    assert all(metric.labels["model"] == "demo" for family in MetricFamily.families.values() for metric in family.metrics)


def test_aliases_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page(monkeypatch, TURBOTRITON_METRIC_ALIASES="0")
    page.connection.current.observations = ([0.1], [], [])
    page.tick()
    assert page["turbotriton_requests_running"] == 2
    assert all(name.startswith("turbotriton_") for name in MetricFamily.families)
    page.publisher.close()


def test_gauges_go_both_ways_and_unchanged_values_cost_nothing(page: Page) -> None:
    page.tick()
    page.tick(num_running=5)
    page.tick(num_running=0)
    page.tick()
    assert page["turbotriton_requests_running"] == 0
    assert MetricFamily.families["turbotriton_requests_running"].metrics[0].steps == [2, 3, -5]
    assert MetricFamily.families["turbotriton_generation_tokens_total"].metrics[0].steps == [50]


def test_counters_go_on_over_a_restart_of_the_engine(page: Page) -> None:
    page.tick()
    page.connection.current.is_alive = False
    page.tick()
    assert (page["turbotriton_generation_tokens_total"], page["turbotriton_engine_up"]) == (50, 0)
    page.connection.current = FakeClient(info=replace(INFO, pid=2), current=EngineStats(generation_tokens_total=7))
    page.tick()
    page.tick(generation_tokens_total=9)
    assert (page["turbotriton_generation_tokens_total"], page["turbotriton_engine_up"]) == (59, 1)


def test_a_restart_between_two_ticks_is_seen_by_the_pid(page: Page) -> None:
    page.tick()
    page.connection.current = FakeClient(info=replace(INFO, pid=2), current=replace(STATS, generation_tokens_total=60))
    page.tick()
    assert page["turbotriton_generation_tokens_total"] == 110


def test_gauges_are_zero_while_the_engine_is_away(page: Page) -> None:
    page.tick()
    page.connection.current.is_alive = False
    page.tick()
    assert (page["turbotriton_requests_running"], page["turbotriton_kv_cache_usage"], page["turbotriton_engine_up"]) == (0, 0, 0)


def test_a_tick_makes_a_bounded_number_of_observations(page: Page) -> None:
    from turbotriton.backend.tritonserver.metrics import MAX_OBSERVATIONS_A_TICK

    values = [float(i) for i in range(4000)]
    page.connection.current.observations = (values, values, values)
    page.tick()
    observed = [metric.observed for family in MetricFamily.families.values() for metric in family.metrics if metric.is_histogram]
    assert 0 < sum(map(len, observed)) <= MAX_OBSERVATIONS_A_TICK == 40
    assert all(len(seen) == len(observed[0]) and seen[0] < 1000 and seen[-1] > 3000 for seen in observed), "from the whole range"


def test_few_observations_are_all_shown_under_both_names(page: Page) -> None:
    page.connection.current.observations = ([0.25, 0.5], [0.01], [])
    page.tick()
    for name in ("turbotriton_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"):
        assert MetricFamily.families[name].metrics[0].observed == [0.25, 0.5]
    assert MetricFamily.families["turbotriton_e2e_seconds"].metrics[0].observed == []


def test_close_lets_go_of_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page(monkeypatch)
    page.publisher.close()
    assert not page.publisher._families
    assert not page.publisher._values
    assert not page.publisher._thread.is_alive()
