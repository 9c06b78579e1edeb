"""Files to a GPU as fast as the page cache gives them: threads read into pinned buffers, a stream of its own copies from those.

    file ──chunks──> [threads: pread into a pinned buffer] ──copy stream──> tensor on the device ──take──> whoever computes with it

Reading goes on while the caller works with what it has taken: files are begun in the order given to the constructor, up to AHEAD_BYTES more
than were taken. A mapped file would be copied page by page, by one thread that takes a fault for each.
"""

import contextlib
import os
import queue
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from turbotriton.contract.errors import WorkspaceError

__all__ = ["FileStream"]

CHUNK_BYTES = 16 * 2**20
AHEAD_BYTES = 2**30
MAX_THREADS = 8


class _Begun(NamedTuple):
    values: torch.Tensor  # uint8, being filled
    chunks: "list[Future[None]]"


class FileStream:
    """`files`: path -> size, in the order they will most likely be taken. Used by one thread; `close` it.

    On a device other than CUDA the same happens without pinning and streams.
    """

    def __init__(self, files: Iterable[tuple[Path, int]], device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._sizes = dict(files)
        self._to_begin = list(reversed(self._sizes))
        self._device, self._chunk_bytes = device, chunk_bytes
        self._begun: dict[Path, _Begun] = {}
        self._num_ahead = 0  # bytes begun and not taken
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._buffers: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event | None]] = queue.SimpleQueue()
        for _ in range(num_threads + 2):  # one a thread, and some whose copies are under way
            buffer = torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
            self._buffers.put((buffer, None if self._stream is None else torch.cuda.Event()))  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="read-weights")

    def take(self, path: Path) -> torch.Tensor:
        """The file's bytes, [size], uint8, the caller's own; on CUDA the current stream waits for them, the host does not.

        Raises WorkspaceError when the file is shorter than its size said.
        """
        if path not in self._begun:
            self._begin(path)
        self._begin_ahead()
        begun = self._begun.pop(path)
        for chunk in begun.chunks:
            chunk.result()
        self._num_ahead -= self._sizes[path]
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return begun.values

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()
        self._begun.clear()

    def _begin_ahead(self) -> None:
        while self._to_begin and self._num_ahead < AHEAD_BYTES:
            path = self._to_begin.pop()
            if path not in self._begun:
                self._begin(path)

    def _begin(self, path: Path) -> None:
        size = self._sizes.get(path)
        assert size is not None, f"{path} is none of the files that were announced, or was taken before"
        values = torch.empty(size, dtype=torch.uint8, device=self._device)
        if self._stream is not None:  # what used this memory before has to end first
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        starts = range(0, size, self._chunk_bytes)
        chunks = [self._threads.submit(self._read, path, at, values[at : at + self._chunk_bytes]) for at in starts]
        self._begun[path] = _Begun(values, chunks)
        self._num_ahead += size

    @torch.inference_mode()
    def _read(self, path: Path, offset: int, values: torch.Tensor) -> None:
        """values: [chunk], where the file's bytes from `offset` on belong."""
        buffer, copied = self._buffers.get()
        try:
            if copied is not None:
                copied.synchronize()  # the copy that read this buffer last
            staged = buffer[: values.numel()]
            _read_fully(path, offset, memoryview(staged.numpy().data))
            with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                values.copy_(staged, non_blocking=True)
            if copied is not None:
                copied.record(self._stream)
        finally:
            self._buffers.put((buffer, copied))


def _read_fully(path: Path, offset: int, into: memoryview) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(into):
            count = os.preadv(file, [into[done:]], offset + done)
            if count == 0:
                raise WorkspaceError(f"{path}: ends after {offset + done} bytes while it is read; convert the model again")
            done += count
    finally:
        os.close(file)
