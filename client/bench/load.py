"""Sends a workload by the clock and notes when what came back."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from turbotriton.contract.errors import TurbotritonError

from .targets import Target
from .workload import Item

__all__ = ["Record", "run_load"]


@dataclass(slots=True)
class Record:
    """One request. Times in seconds since the run's start; a request that failed has `error` and may lack the rest."""

    index: int
    due_s: float  # when it should have been sent
    sent_s: float = 0.0
    ended_s: float = 0.0
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None
    #: (time, tokens so far) of each response with new tokens
    responses: list[tuple[float, int]] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Send to first token; of a request that ended well."""
        return self.responses[0][0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of a token after the first response; None when there was no more than that."""
        first_s, num_first = self.responses[0]
        num_later = self.num_output_tokens - num_first
        return (self.responses[-1][0] - first_s) / num_later if num_later > 0 else None

    def gaps_s(self) -> Iterator[float]:
        """Seconds between two responses that follow each other: what a reader of the stream feels."""
        for (before, _), (after, _) in zip(self.responses, self.responses[1:], strict=False):
            yield after - before


async def run_load(
    target: Target, items: Sequence[Item], concurrency: int | None, note_end: Callable[[Record], None] = lambda record: None
) -> list[Record]:
    """Sends each item at its arrival time, or at once where it has none; never more than `concurrency` (None: no limit) together.

    A request that fails is recorded and the run goes on. Returns the records in the items' order.
    """
    room = asyncio.Semaphore(concurrency or len(items) or 1)
    start = time.perf_counter()

    async def one(record: Record, item: Item) -> None:
        try:
            await _send(target, item, record, start)
        finally:
            room.release()
            note_end(record)

    tasks = []
    for index, item in enumerate(items):
        if item.arrival_s is not None:
            await asyncio.sleep(max(0.0, item.arrival_s - (time.perf_counter() - start)))
        await room.acquire()
        due_s = item.arrival_s if item.arrival_s is not None else time.perf_counter() - start
        record = Record(index, due_s)
        tasks.append((record, asyncio.create_task(one(record, item))))
    await asyncio.gather(*(task for _, task in tasks))
    return [record for record, _ in tasks]


async def _send(target: Target, item: Item, record: Record, start: float) -> None:
    record.sent_s = time.perf_counter() - start
    try:
        async for progress in target.stream(item):
            record.num_input_tokens = progress.num_input_tokens or record.num_input_tokens
            if progress.num_output_tokens > record.num_output_tokens or not record.responses:
                record.responses.append((time.perf_counter() - start, progress.num_output_tokens))
            record.num_output_tokens = progress.num_output_tokens
        if not record.responses:
            record.error = "the answer ended without a token"
    except TurbotritonError as error:
        record.error = str(error)
    record.ended_s = time.perf_counter() - start
