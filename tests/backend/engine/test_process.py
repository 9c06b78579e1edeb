"""Real engine processes on the small trained model: one for two racing doors, gone with them, back after kill -9."""

import json
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.backend.workspace import hf_workspace_config, write_workspace
from transformers import AutoConfig

from turbotriton.backend.engine.client import EngineClient
from turbotriton.backend.engine.launcher import connect_engine
from turbotriton.contract.wire import FinishReason, GenerateRequest, SamplingParams, TokenDelta

OPTIONS = {
    "device": "cpu",
    "session_len": "256",
    "cache_block_seq_len": "16",
    "cache_max_entry_count": "24",
    "num_tokens_per_iter": "16",
}


@pytest.fixture(scope="module")
def weights(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = assets / "models" / "stories260K"
    config = hf_workspace_config(AutoConfig.from_pretrained(folder), session_len=512)
    return write_workspace(tmp_path_factory.mktemp("stories"), config, load_file(folder / "model.safetensors"))


@pytest.fixture(autouse=True)
def _runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="tt", dir="/tmp") as folder:  # a socket's path has at most 107 bytes
        monkeypatch.setenv("TURBOTRITON_RUNTIME_DIR", f"{folder}/run")
        yield


def ask(client: EngineClient, prompt: list[int], count: int) -> "queue.SimpleQueue[TokenDelta]":
    deltas: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
    sampling = SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)
    client.submit(GenerateRequest(client.next_request_id(), tuple(prompt), sampling), deltas.put)
    return deltas


def collect(deltas: "queue.SimpleQueue[TokenDelta]") -> tuple[list[int], TokenDelta]:
    tokens: list[int] = []
    while True:
        delta = deltas.get(timeout=60)
        tokens += delta.token_ids
        if delta.finish_reason is not None:
            return tokens, delta


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: not is_alive(pid))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_racing_doors_share_one_engine_whose_ragged_batch_equals_the_recorded_output(weights: Path, assets: Path) -> None:
    clients: list[EngineClient] = []
    doors = [threading.Thread(target=lambda: clients.append(connect_engine(weights, os.getpid(), OPTIONS))) for _ in range(2)]
    for door in doors:
        door.start()
    for door in doors:
        door.join()
    first, second = clients
    pid = first.info.pid
    assert second.info.pid == pid
    cases = json.loads((assets / "models" / "expected_greedy.json").read_text())["stories260K"]["cases"]
    os.kill(pid, signal.SIGSTOP)  # all are there before the first step, so that the blocks are too few
    open_deltas = [ask(clients[i % 2], case["prompt_ids"], len(case["output_ids"])) for i, case in enumerate(cases)]
    os.kill(pid, signal.SIGCONT)
    assert [collect(deltas)[0] for deltas in open_deltas] == [case["output_ids"] for case in cases]
    wait_until(lambda: first.stats().preemptions_total > 0)
    second.close()
    ask(first, [1], 200)
    first.close()
    wait_until_gone(pid)


def test_killed_engine_fails_open_requests_at_once_and_is_started_again(weights: Path) -> None:
    client = connect_engine(weights, os.getpid(), OPTIONS)
    deltas = ask(client, [1], 240)
    deltas.get(timeout=60)
    os.kill(client.info.pid, signal.SIGKILL)
    _, last = collect(deltas)
    assert (last.finish_reason, last.error_status) == (FinishReason.ERROR, "UNAVAILABLE")
    again = connect_engine(weights, os.getpid(), OPTIONS)
    assert again.info.pid != client.info.pid
    tokens, _ = collect(ask(again, [1], 3))
    assert len(tokens) == 3
    again.close()
    wait_until_gone(again.info.pid)
