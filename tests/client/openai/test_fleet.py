"""What a door is asked for: how many tokens a delta, by the option or by how many answers are under way; and no option in vain."""

import asyncio
import contextlib
from typing import Any, Self

import pytest

from turbotriton.client.openai import fleet as fleet_module
from turbotriton.client.openai.fleet import Fleet
from turbotriton.client.text_door import DEFAULTS


class FakeStream:
    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *unused: object) -> None:
        pass

    async def peek(self) -> None:
        pass


class FakeClient:
    asked: list[dict[str, Any]]

    def __init__(self, url: str, model: str | None) -> None:
        pass

    async def stream(self, **options: Any) -> FakeStream:
        FakeClient.asked.append(options)
        return FakeStream()


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClient.asked = []
    monkeypatch.setattr(fleet_module, "AsyncClient", FakeClient)


def intervals(num: int, stream_interval: int, *, stream: bool = True) -> list[int]:
    async def run() -> None:
        fleet = Fleet(["a:1", "b:1"], stream_interval)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(num):
                await stack.enter_async_context(
                    fleet.stream("m", {"prompt": "x"}, {"sampling_parameters": {"n": 1}}, stream=stream)
                )

    asyncio.run(run())
    assert all(options["sampling_parameters"]["n"] == 1 for options in FakeClient.asked)
    return [options["sampling_parameters"].get("stream_interval", 1) for options in FakeClient.asked]


def test_one_token_until_many_answers_are_under_way() -> None:
    assert intervals(40, 0) == [1] * 8 + [2] * 8 + [3] * 8 + [4] * 16


def test_the_option_counts_whatever_runs() -> None:
    assert intervals(70, 5) == [5] * 70
    FakeClient.asked = []
    assert intervals(70, 1) == [1] * 70


def test_whole_answers_have_none() -> None:
    assert intervals(70, 5, stream=False) == [1] * 70


def test_what_the_door_does_anyway_is_not_asked_for() -> None:
    async def run() -> None:
        options = {**DEFAULTS, "temperature": 0.0, "stop_words": None, "exclude_input_in_output": False, "ignore_eos": True}
        async with Fleet(["a:1"]).stream("m", {"prompt": "x"}, options):
            pass

    asyncio.run(run())
    (asked,) = FakeClient.asked
    assert asked == {"prompt": "x", "in_deltas": True, "temperature": 0.0, "exclude_input_in_output": False, "ignore_eos": True}
