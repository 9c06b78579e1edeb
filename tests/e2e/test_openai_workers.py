"""Several processes behind the OpenAI server's port: for a client they are one server."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.throttle import throttled

from .engine import PATIENCE_S, cancelling, wait_until, watched
from .openai_server import api_server
from .processes import engine_pid
from .server import TritonServer

pytestmark = pytest.mark.e2e

NUM_WORKERS = 2
KEY = {"authorization": "Bearer secret"}
QOS = {"user_groups": ["All"], "user_group_map": {"All": [{"id": "default", "quota_pct": 100}]}}
STORY = {"model": "demo", "prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def url(demo_server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("qos") / "qos.json"
    path.write_text(json.dumps(QOS))
    options = ["--workers", str(NUM_WORKERS), "--api-keys", "secret", "--qos-config-path", str(path), "--qos-max-running", "1"]
    with api_server(demo_server.grpc_url, *options) as url:
        wait_until(lambda: sum(count > 0 for count in by_worker(url).values()) == NUM_WORKERS, "each worker to answer")
        yield url


def page(url: str) -> str:
    return httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text


def by_worker(url: str) -> dict[str, float]:
    """pid -> requests it has answered."""
    found = re.findall(r'^turbotriton_openai_worker_requests_total\{pid="(\d+)"\} (\S+)$', page(url), re.MULTILINE)
    return {pid: float(count) for pid, count in found}


def post(url: str, path: str, **body: Any) -> httpx.Response:
    """Over a connection of its own, so that any worker may get it."""
    return httpx.post(f"{url}/v1/{path}", json=body, headers=KEY, timeout=PATIENCE_S)


def test_every_worker_answers_and_the_metrics_page_counts_all(url: str) -> None:
    before = by_worker(url)
    with ThreadPoolExecutor(8) as pool:
        ask = [pool.submit(post, url, "completions", model="demo", prompt="One", max_tokens=1) for _ in range(32)]
        assert {one.result().status_code for one in ask} == {200}
    assert httpx.get(f"{url}/v1/models", timeout=PATIENCE_S).status_code == 401
    after = by_worker(url)
    grown = [after[pid] - before[pid] for pid in after]
    assert len(grown) == NUM_WORKERS
    assert max(grown) - min(grown) <= 2  # in turn; this page's own requests are among them
    text = page(url)
    assert re.search(r'^turbotriton_openai_requests_total\{path="/v1/completions",status="200"\} 32.0$', text, re.MULTILINE)
    assert re.search(r'^turbotriton_openai_request_seconds_count\{path="/v1/completions"\} 32.0$', text, re.MULTILINE)
    assert re.search(r"^turbotriton_openai_requests_running 1.0$", text, re.MULTILINE)


def test_a_conversation_goes_on_at_any_worker(url: str) -> None:
    before = by_worker(url)
    num_tokens = 0
    for _ in range(20):
        reply = post(url, "chat/interactive", prompt="Hi", session_id=3, interactive_mode=True, request_output_len=2).json()
        assert reply["history_tokens"] == num_tokens
        num_tokens += reply["input_tokens"] + reply["tokens"]
    after = by_worker(url)
    assert min(after[pid] - before[pid] for pid in after) > 0
    post(url, "chat/interactive", prompt="", session_id=3)
    assert post(url, "chat/interactive", prompt="Hi", session_id=3, request_output_len=2).json()["history_tokens"] == 0


def test_an_answer_is_cancelled_by_a_request_to_any_worker(url: str, demo_server: TritonServer) -> None:
    body = {"prompt": "Tell me a long story.", "session_id": 4, "ignore_eos": True, "request_output_len": 1500}
    lines: list[dict[str, Any]] = []

    def ask() -> None:
        options: dict[str, Any] = {"json": body | {"stream": True}, "headers": KEY, "timeout": PATIENCE_S}
        with httpx.stream("POST", f"{url}/v1/chat/interactive", **options) as reply:
            lines.extend(map(json.loads, reply.iter_lines()))

    with throttled(engine_pid(demo_server), share=0.1):
        for number in range(2):  # the end comes to the other worker than the answer
            lines.clear()
            with cancelling(demo_server):
                asking = threading.Thread(target=ask)
                asking.start()
                wait_until(lambda: len(lines) > 1, "the answer to begin")
                if number == 0:
                    conflicts = [post(url, "chat/interactive", **body).status_code for _ in range(4)]
                    assert conflicts == [409] * 4
                assert post(url, "chat/interactive", prompt="", session_id=4, cancel=True).status_code == 200
                asking.join(PATIENCE_S)
            assert lines[-1]["finish_reason"] == "stop"


@pytest.mark.slow
def test_the_qos_gate_is_one_for_all_workers(url: str, demo_server: TritonServer) -> None:
    """One answer at a time, whichever worker has it. Answers take longer than it is between two of the engine's reports."""
    before = by_worker(url)
    body = {"model": "demo", "prompt": "x", "max_tokens": 50, "ignore_eos": True}
    most = 0
    with throttled(engine_pid(demo_server), share=0.15), watched(demo_server) as engine, ThreadPoolExecutor(10) as pool:
        asking = [pool.submit(post, url, "completions_qos", **body) for _ in range(24)]
        while not all(one.done() for one in asking):
            most = max(most, engine.newest.num_running)
            time.sleep(0.002)
    assert {one.result().status_code for one in asking} == {200}
    assert most == 1
    assert min(count - before[pid] for pid, count in by_worker(url).items()) > 0


def test_dead_workers_take_their_answers_along_and_leave_the_conversations(url: str, demo_server: TritonServer) -> None:
    """Last in this file, since it ends the other tests' workers."""

    def say() -> dict[str, Any]:
        body = {"prompt": "Hi", "session_id": 5, "interactive_mode": True, "request_output_len": 2}
        reply: dict[str, Any] = post(url, "chat/interactive", **body).json()
        return reply

    first = say()
    old = set(by_worker(url))
    with (
        throttled(engine_pid(demo_server), share=0.1),
        cancelling(demo_server),
        httpx.stream("POST", f"{url}/v1/completions", json=STORY, headers=KEY, timeout=PATIENCE_S) as story,
    ):
        lines = story.iter_lines()
        next(lines)
        for pid in old:
            os.kill(int(pid), signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    wait_until(lambda: _answers(url), "a worker to come back")
    assert say()["history_tokens"] == first["input_tokens"] + first["tokens"]
    wait_until(lambda: len(set(by_worker(url)) - old) == NUM_WORKERS, "both workers to come back")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False
