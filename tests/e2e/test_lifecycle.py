"""Process life: the engine killed under load, a door killed, unload and load, SIGTERM, the metrics page."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.throttle import throttled

from turbotriton.client import Client
from turbotriton.contract.errors import TurbotritonError

from .engine import PATIENCE_S, cancelling, wait_until, watched
from .metrics import metric, wait_idle
from .processes import children, engine_pid
from .server import TritonServer
from .stopwatch import Stopwatch

pytestmark = pytest.mark.e2e

QUESTION = [{"role": "user", "content": "Tell me a story."}]
ENDLESS = {"messages": QUESTION, "max_tokens": 1900, "ignore_eos": True}  # for as long as a test lasts


class Streams:
    """n streaming requests in threads; counts deltas, collects how each ended."""

    def __init__(self, server: TritonServer, count: int, **request) -> None:
        self.client = Client(server.grpc_url)
        self.first = threading.Semaphore(0)
        self.ended: list[Exception | str | None] = []
        self.texts: list[str] = []
        self.threads = [threading.Thread(target=self._one, kwargs=request, daemon=True) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def _one(self, **request) -> None:
        text, seen = "", False
        try:
            reason = None
            for delta in self.client.stream(**request):
                if not seen:
                    seen = True
                    self.first.release()
                text += delta.text
                reason = delta.finish_reason or reason
            self.ended.append(reason)
            self.texts.append(text)
        except TurbotritonError as error:
            self.ended.append(error)

    def wait_first(self, count: int, timeout_s: float = 60) -> None:
        for _ in range(count):
            assert self.first.acquire(timeout=timeout_s)

    def join(self, timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
            assert not thread.is_alive(), "a stream did not end"


@pytest.fixture
def server(demo_workspace: Path) -> Iterator[TritonServer]:
    with TritonServer(demo_workspace / "model_repository") as running:
        yield running


def test_32_concurrent_streams_end_right_and_equal_one_alone(server: TritonServer) -> None:
    with Client(server.grpc_url) as client:
        alone = client.generate(messages=QUESTION, max_tokens=64, temperature=0.0)
    streams = Streams(server, 32, messages=QUESTION, max_tokens=64, temperature=0.0)
    streams.join()
    assert streams.ended == [alone.finish_reason] * 32
    assert streams.texts == [alone.text] * 32


def test_disconnect_frees_the_blocks(server: TritonServer) -> None:
    with Client(server.grpc_url) as client, cancelling(server), throttled(engine_pid(server)):
        stream = client.stream(**ENDLESS)
        next(stream)
        wait_until(lambda: metric(server, "turbotriton_requests_running") == 1, "the request running")
        stream.cancel()
    wait_idle(server)


def test_killed_engine_fails_every_stream_at_once_and_is_started_again(server: TritonServer) -> None:
    """Within 2 s, and within the time of a start. Another program's load only adds to both: the better of two kills counts."""
    first = _kill_under_64_streams(server)
    if not _is_soon(first):
        second = _kill_under_64_streams(server)
        assert _is_soon(second), f"seconds until the last stream ended, and to an answer beyond a start: {first}, then {second}"


def _is_soon(seconds: tuple[float, float]) -> bool:
    return seconds[0] < 2.0 and seconds[1] < 2.5


def _kill_under_64_streams(server: TritonServer) -> tuple[float, float]:
    """Seconds from the kill to the last stream's error, and to the next answer less the start that the log tells of."""
    streams = Streams(server, 64, **ENDLESS)
    streams.wait_first(64)
    assert not streams.ended
    engine = engine_pid(server)
    stopwatch = Stopwatch(server)
    os.kill(engine, signal.SIGKILL)
    streams.join()
    ended_s = stopwatch.seconds()
    assert {str(error) for error in streams.ended} == {"the engine process ended while it worked on this request; send it again"}
    assert len(streams.ended) == 64

    def answers() -> bool:
        try:
            with Client(server.grpc_url) as client:
                return bool(client.generate(messages=QUESTION, max_tokens=8, temperature=0.0).text)
        except TurbotritonError:
            return False

    wait_until(answers, "an answer after the restart", 2 * PATIENCE_S)
    answered_s = stopwatch.seconds()
    start_s = float(re.findall(r"the engine is ready after ([\d.]+) s", server.log)[-1])
    return ended_s, answered_s - start_s


@pytest.mark.slow
def test_killed_door_frees_its_blocks(demo_workspace: Path) -> None:
    """tritonserver 24.10 may abort when a stub dies; the engine leaves with it then, and the try says nothing."""
    assert any(_kill_doors(demo_workspace) for _ in range(5)), "tritonserver aborted each time"


def _kill_doors(workspace: Path) -> bool:
    """False when tritonserver died of it."""
    server = TritonServer(workspace / "model_repository").start()
    try:
        stubs = [pid for pid, command in children(server.pid).items() if "/demo/1/model.py" in command]
        assert len(stubs) == 2
        client = Client(server.grpc_url)
        with watched(server) as engine, throttled(engine_pid(server)):  # the doors' metrics die with them
            streams = [client.stream(**ENDLESS) for _ in range(4)]
            for stream in streams:
                next(stream)
            wait_until(lambda: engine.newest.num_used_blocks > 0, "blocks in use")
            for pid in stubs:
                os.kill(pid, signal.SIGKILL)
            wait_until(
                lambda: not engine.is_alive or engine.newest.requests_total.get("cancelled") == 4,
                "the dead doors' requests being cancelled",
            )
            if not engine.is_alive:
                wait_until(
                    lambda: not server.is_running, "the end of tritonserver, without which the engine had no reason to leave"
                )
                return False
            assert engine.newest.num_used_blocks == 0
            return True
    finally:
        server.kill()  # 24.10 never stops cleanly after a stub's death


def test_unload_and_load_leave_one_engine(server: TritonServer) -> None:
    before = engine_pid(server)
    base = server.http_url
    repository = httpx.post(f"{base}/v2/repository/index", timeout=PATIENCE_S).json()
    names = [entry["name"] for entry in repository]
    for name in names:
        assert httpx.post(f"{base}/v2/repository/models/{name}/unload", timeout=PATIENCE_S).status_code == 200
    wait_until(lambda: not Path(f"/proc/{before}").exists(), "the engine leaving after unload")
    for name in names:
        response = httpx.post(f"{base}/v2/repository/models/{name}/load", timeout=PATIENCE_S)
        assert response.status_code == 200, response.text
    with Client(server.grpc_url) as client:
        assert client.generate(messages=QUESTION, max_tokens=8, temperature=0.0).text
    assert engine_pid(server) != before


def test_sigterm_leaves_no_process_and_no_shared_memory(demo_workspace: Path) -> None:
    with TritonServer(demo_workspace / "model_repository") as server:
        engine = engine_pid(server)
        processes = children(server.pid)
        shared = set(Path("/dev/shm").glob(f"*{server.shm_prefix}*"))
        assert processes
        assert shared, "the server's shared memory was not found, so its removal proves nothing"
        server.stop()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in [engine, *processes]), "every process leaving")
        assert not [path for path in shared if path.exists()]


def test_metrics_page_has_every_family_and_its_aliases(server: TritonServer) -> None:
    with Client(server.grpc_url) as client:
        client.generate(messages=QUESTION, max_tokens=8, ignore_eos=True)
    for name in (
        "turbotriton_requests_waiting",
        "turbotriton_requests_running",
        "turbotriton_kv_cache_usage",
        "turbotriton_prompt_tokens_total",
        "turbotriton_generation_tokens_total",
        "turbotriton_prefix_cache_hit_tokens_total",
        "turbotriton_preemptions_total",
        "turbotriton_engine_up",
        "turbotriton_time_to_first_token_seconds_count",
        "turbotriton_inter_token_seconds_count",
        "turbotriton_e2e_seconds_count",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "nv_trt_llm_kv_cache_block_metrics",
        "nv_trt_llm_request_metrics",
    ):
        metric(server, name)
    wait_until(lambda: metric(server, "turbotriton_generation_tokens_total") == 8, "eight tokens counted")
    assert metric(server, "turbotriton_engine_up") == 1
