"""The gate of the _qos endpoints: groups first, fair shares inside, nothing lost when a caller leaves."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.client.openai.scripted import ScriptedFleet, post, with_app

from turbotriton.client.openai import qos
from turbotriton.client.openai.errors import ApiError
from turbotriton.client.openai.qos import QosGate, read_qos_config
from turbotriton.contract.errors import ConfigError

GROUPS = {
    "enable_user_qos": True,
    "user_groups": ["Gold", "Silver"],
    "user_group_map": {
        "Gold": [{"id": "boss", "quota_pct": 50}, {"id": "deputy", "quota_pct": 50}],
        "Silver": [{"id": "big", "quota_pct": 75}, {"id": "small", "quota_pct": 25}, {"id": "default", "quota_pct": 10}],
    },
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "qos.json"
    path.write_text(json.dumps(GROUPS))
    return path


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(qos.time, "monotonic", lambda: self.now)


class Callers:
    """Requests at a gate that run until they are told to end. `order`: who was let in, by name."""

    def __init__(self, gate: QosGate) -> None:
        self.gate = gate
        self.order: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def arrive(self, *names: str) -> None:
        """name: the user, a dot, anything."""
        for name in names:
            self.ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._one(name))
            await settle()

    async def _one(self, name: str) -> None:
        async with self.gate.turn(name.split(".")[0]):
            self.order.append(name)
            await self.ends[name].wait()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await self.tasks[name]
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def at_gate(config: Path, max_running: int, act: Callable[[Callers], Awaitable[None]]) -> list[str]:
    async def run() -> list[str]:
        callers = Callers(QosGate(read_qos_config(config), max_running))
        await act(callers)
        for task in callers.tasks.values():
            task.cancel()
        await asyncio.gather(*callers.tasks.values(), return_exceptions=True)
        assert callers.gate._free == max_running
        assert not callers.gate._waiting
        return callers.order

    return asyncio.run(run())


def test_first_group_goes_first_and_inside_it_who_came_first(config: Path) -> None:
    async def act(callers: Callers) -> None:
        await callers.arrive("big.running", "small.1", "stranger.1", "boss.1", "deputy.1")
        for name in ("big.running", "boss.1", "deputy.1", "small.1"):
            await callers.end(name)

    order = at_gate(config, 1, act)
    assert order[:3] == ["big.running", "boss.1", "deputy.1"]
    assert set(order[3:]) == {"small.1", "stranger.1"}


def test_shares_inside_a_group_follow_the_quotas(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def act(callers: Callers) -> None:
        await callers.arrive(*(f"{user}.{number}" for number in range(16) for user in ("big", "small")))
        for _ in range(12):
            clock.now += 0.5
            await callers.end(callers.order[-1])

    served = at_gate(config, 1, act)[:12]
    assert [name.split(".")[0] for name in served].count("big") == 9  # three of four


def test_use_is_forgotten_after_the_window(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def act(callers: Callers) -> None:
        await callers.arrive("small.long")
        clock.now += 10
        await callers.end("small.long")
        clock.now += qos.WINDOW_S + 1
        await callers.arrive("big.now", "small.next", "big.next")
        clock.now += 1
        await callers.end("big.now")

    assert at_gate(config, 1, act) == ["small.long", "big.now", "small.next"]


def test_as_many_run_at_once_as_the_gate_has_room_for(config: Path) -> None:
    async def act(callers: Callers) -> None:
        await callers.arrive(*(f"boss.{number}" for number in range(5)))
        assert len(callers.order) == 3
        await callers.end("boss.0")
        assert len(callers.order) == 4

    at_gate(config, 3, act)


def test_caller_that_leaves_the_queue_takes_nobodys_turn(config: Path) -> None:
    async def act(callers: Callers) -> None:
        await callers.arrive("big.running", "boss.leaves", "small.stays")
        callers.tasks["boss.leaves"].cancel()
        await settle()
        await callers.end("big.running")

    assert at_gate(config, 1, act) == ["big.running", "small.stays"]


def test_caller_that_leaves_as_its_turn_comes_hands_it_on(config: Path) -> None:
    async def act(callers: Callers) -> None:
        await callers.arrive("big.running", "boss.leaves", "small.stays")
        callers.ends["big.running"].set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the turn is given, its owner has not run yet
        callers.tasks["boss.leaves"].cancel()
        await settle()

    order = at_gate(config, 1, act)
    assert order[-1] == "small.stays"


def test_answer_that_fails_gives_its_place_back(config: Path) -> None:
    async def run() -> None:
        gate = QosGate(read_qos_config(config), 1)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                async with gate.turn("boss"):
                    raise RuntimeError
        assert gate._free == 1

    asyncio.run(run())


def test_too_many_waiting_are_429(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qos, "MAX_WAITING", 1)

    async def act(callers: Callers) -> None:
        await callers.arrive("boss.0", "boss.1")
        with pytest.raises(ApiError, match="queue is full") as refused:
            async with callers.gate.turn("boss"):
                pass
        assert refused.value.status == 429

    at_gate(config, 1, act)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{nope", "expected user_groups"),
        ("[]", "expected user_groups"),
        (json.dumps({"user_groups": ["Gold"], "user_group_map": {"Lead": [{"id": "x", "quota_pct": 1}]}}), "expected"),
        (json.dumps({"user_groups": ["Gold"], "user_group_map": {"Gold": [{"id": "default", "quota_pct": 0}]}}), "above 0"),
        (json.dumps({"user_groups": ["Gold"], "user_group_map": {"Gold": [{"id": "x", "quota_pct": 1}]}}), "'default'"),
    ],
)
def test_file_that_is_wrong_is_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "qos.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_qos_config(path)


def test_endpoints_pass_the_gate_whole_and_streamed(config: Path) -> None:
    fleet = ScriptedFleet()

    async def use(client: Any) -> list[int]:
        bodies = [
            ("chat/completions_qos", {"model": "demo", "messages": "x", "user_id": "boss"}),
            ("chat/completions_qos", {"model": "demo", "messages": "x", "user_id": "nobody", "stream": True}),
            ("completions_qos", {"model": "demo", "prompt": "x", "user_id": "small"}),
            ("chat/interactive_qos", {"prompt": "x", "user_id": "small"}),
        ]
        return [(await client.post(f"/v1/{path}", json=body)).status_code for path, body in bodies * 2]

    assert with_app(fleet, use, qos_config_path=config, qos_max_running=1) == [200] * 8
    assert post("completions_qos", {"model": "demo", "prompt": "x"}).status_code == 404


def test_file_that_is_switched_off_lets_everyone_through(config: Path, tmp_path: Path) -> None:
    content = json.loads(config.read_text()) | {"enable_user_qos": False}
    (tmp_path / "off.json").write_text(json.dumps(content))

    async def run() -> None:
        gate = QosGate(read_qos_config(tmp_path / "off.json"), 1)
        async with gate.turn("boss"), gate.turn("small"), gate.turn(None):
            pass

    asyncio.run(asyncio.wait_for(run(), 5))
    (tmp_path / "wrong.json").write_text(json.dumps(content | {"enable_user_qos": "no"}))
    with pytest.raises(ConfigError, match="enable_user_qos is 'no'"):
        read_qos_config(tmp_path / "wrong.json")
