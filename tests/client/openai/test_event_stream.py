"""The response that streams: what ends it, what is sent when, and whose leaving or cancelling ends the work behind it."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from turbotriton.client.openai.event_stream import EventStream, until_gone

PATIENCE_S = 30.0


class Caller:
    """Notes what is sent; leaves when told to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.has_left = asyncio.Event()
        self.has_all = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.has_all.set()
            self.has_left.set()  # as uvicorn does at the end of a response


class Work:
    """Gives `lines`, then waits for `may_end` before it ends; `ended`: how."""

    def __init__(self, lines: Sequence[tuple[str, bool]]) -> None:
        self._given = lines
        self.may_end = asyncio.Event()
        self.ended = ""

    async def lines(self) -> AsyncGenerator[tuple[str, bool]]:
        try:
            for line in self._given:
                yield line
            await self.may_end.wait()
            self.ended = "by itself"
        except BaseException as error:
            self.ended = type(error).__name__
            raise


def run(use: Any) -> None:
    asyncio.run(asyncio.wait_for(use(), PATIENCE_S))


def answering(work: Work, caller: Caller) -> "asyncio.Task[None]":
    return asyncio.create_task(EventStream(work.lines(), {"a": "b"})({"type": "http"}, caller.receive, caller.send))


def test_the_last_line_ends_the_response_and_what_is_behind_it_still_runs() -> None:
    async def use() -> None:
        work, caller = Work([("x", False), ("y", True)]), Caller()
        task = answering(work, caller)
        await caller.has_all.wait()
        assert [message.get("body") for message in caller.sent] == [None, b"x", b"y"]
        assert caller.sent[0]["status"] == 200
        await asyncio.sleep(0.01)
        assert not task.done()
        work.may_end.set()
        await task
        assert work.ended == "by itself"

    run(use)


def test_without_a_last_line_the_response_ends_with_the_work() -> None:
    async def use() -> None:
        work, caller = Work([("x", False), ("y", False)]), Caller()
        task = answering(work, caller)
        await asyncio.sleep(0.01)
        assert not caller.has_all.is_set()
        work.may_end.set()
        await task
        assert [message.get("body") for message in caller.sent] == [None, b"x", b"y", b""]

    run(use)


@pytest.mark.parametrize("lines", [[], [("x", False)]])
def test_a_caller_that_leaves_cancels_the_work(lines: list[tuple[str, bool]]) -> None:
    async def use() -> None:
        work, caller = Work(lines), Caller()
        task = answering(work, caller)
        await asyncio.sleep(0.01)
        caller.has_left.set()
        await task
        assert work.ended == "CancelledError"
        assert caller.sent[0]["status"] == (200 if lines else 499)

    run(use)


def test_a_failure_before_the_first_line_is_raised_and_nothing_is_sent() -> None:
    async def failing() -> AsyncGenerator[tuple[str, bool]]:
        raise ZeroDivisionError
        yield "", False

    async def use() -> None:
        caller = Caller()
        with pytest.raises(ZeroDivisionError):
            await EventStream(failing(), {})({"type": "http"}, caller.receive, caller.send)
        assert not caller.sent

    run(use)


@pytest.mark.parametrize("leaves", [False, True])
def test_whoever_cancels_the_task_itself_is_heard(leaves: bool) -> None:
    async def use() -> None:
        caller = Caller()
        task = asyncio.create_task(until_gone(caller.receive, asyncio.sleep(PATIENCE_S)))
        await asyncio.sleep(0.01)
        if leaves:
            caller.has_left.set()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    run(use)


def test_a_task_whose_caller_left_goes_on() -> None:
    async def use() -> None:
        async def two_callers() -> list[str | None]:
            gone, here = Caller(), Caller()
            gone.has_left.set()
            first = await until_gone(gone.receive, asyncio.sleep(PATIENCE_S, "never"))
            async with asyncio.timeout(PATIENCE_S):
                return [first, await until_gone(here.receive, asyncio.sleep(0.01, "done"))]

        assert await asyncio.create_task(two_callers()) == [None, "done"]

    run(use)
