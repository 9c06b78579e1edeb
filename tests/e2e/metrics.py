"""Reads a running server's metrics page."""

import re
import time
import urllib.request
from collections.abc import Callable

from .server import TritonServer


def metric(server: TritonServer, name: str) -> float:
    """Value of the family's only sample; raises when it is not on the page."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.metrics_url, timeout=5) as reply:
        page = reply.read().decode()
    found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    assert found, f"{name} is not among the metrics"
    return float(found.group(1))


def settled(server: TritonServer, name: str, quiet_s: float = 0.6) -> float:
    """The counter's value once it has not moved for a while: the page is refreshed a few times a second only."""
    value = metric(server, name)
    since = time.monotonic()
    while time.monotonic() - since < quiet_s:
        time.sleep(0.1)
        now = metric(server, name)
        if now != value:
            value, since = now, time.monotonic()
    return value


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)


def wait_idle(server: TritonServer, timeout_s: float = 5.0) -> None:
    """Until no request runs and no KV block is held by one."""
    wait_until(lambda: metric(server, "turbotriton_requests_running") == 0, "every request leaving", timeout_s)
    wait_until(lambda: metric(server, "turbotriton_kv_cache_usage") == 0, "every block returning", timeout_s)
