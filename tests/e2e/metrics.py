"""Reads a running server's metrics page."""

import re
import urllib.request

from .engine import PATIENCE_S, wait_until, watched
from .server import TritonServer

#: Counter on the page -> the engine's own.
COUNTERS = {
    "turbotriton_prompt_tokens_total": "prompt_tokens_total",
    "turbotriton_prefix_cache_hit_tokens_total": "cached_tokens_total",
    "turbotriton_computed_tokens_total": "computed_tokens_total",
    "turbotriton_generation_tokens_total": "generation_tokens_total",
    "turbotriton_preemptions_total": "preemptions_total",
}


def metric(server: TritonServer, name: str) -> float:
    """Value of the family's only sample, or of its first; raises when it is not on the page."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.metrics_url, timeout=PATIENCE_S) as reply:
        page = reply.read().decode()
    found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    assert found, f"{name} is not among the metrics"
    return float(found.group(1))


def settled(server: TritonServer, name: str) -> float:
    """The counter's value once the page, which is refreshed a few times a second, shows what the engine has counted by now."""
    with watched(server) as engine:
        counted = float(getattr(engine.stats(), COUNTERS[name]))
    wait_until(lambda: metric(server, name) == counted, f"{name} being {counted}")
    return counted


def wait_idle(server: TritonServer) -> None:
    """Until no request runs and no KV block is held by one."""
    wait_until(lambda: metric(server, "turbotriton_requests_running") == 0, "every request leaving")
    wait_until(lambda: metric(server, "turbotriton_kv_cache_usage") == 0, "every block returning")
