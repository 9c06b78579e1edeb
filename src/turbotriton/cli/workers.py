"""`serve api_server --workers N`: N processes behind one port, by uvicorn's supervisor, and what they share.

this process: supervisor, Hub (conversations, _qos), HandingServer (accepts connections), owner of tritonserver
  ├── worker: the app; gets its connections from the parent, who hands them out in turn
  └── worker: ...
"""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import SIGNALS

from turbotriton.client.openai.app import ServerOptions, make_app, make_gate
from turbotriton.client.openai.hub import Hub, hub_path
from turbotriton.contract import env
from turbotriton.contract.errors import ConfigError, InvalidInputError, ServerError

from .handing import Entrance, HandingServer, entrance_path
from .leftovers import end_with_parent
from .process_setup import collect_seldom, set_up_logging

__all__ = ["run_workers"]

logger = logging.getLogger(__name__)

UNHEARD_S = 30  # a worker that does not answer its supervisor so long is killed; to import the app it gets as much
KILL_AFTER_S = 10  # a stop, beyond what answers under way get
MAX_DEATHS_A_MINUTE = 10
BACKLOG = 2048  # uvicorn's
LOOP = "turbotriton.cli.handing:HandedLoop"


def run_workers(options: ServerOptions, num_workers: int, **config: Any) -> None:
    """Returns when SIGINT or SIGTERM has ended the workers. config: of uvicorn, with host, port and timeout_graceful_shutdown.

    Raises InvalidInputError for an address that cannot be taken, ConfigError for a QoS file that cannot be read, ServerError when
    workers do not start or die again and again.
    """
    with (
        tempfile.TemporaryDirectory(prefix="turbotriton-workers-") as name,
        _listening(config["host"], config["port"]) as listeners,
        _hub(options, Path(name), listeners) as stop_accepting,
        env.metrics_folder(Path(name)),
        _ctrl_c_is_ours(),
    ):
        app = functools.partial(_worker_app, replace(options, shared=Path(name)), os.getpid())
        supervisor = _Supervisor(
            uvicorn.Config(app, factory=True, workers=num_workers, timeout_worker_healthcheck=UNHEARD_S, loop=LOOP, **config),
            stop_accepting,
            Path(name),
        )
        supervisor.run()  # its handlers stay: a tritonserver of ours has yet to be stopped in peace
    if supervisor.failure is not None:
        raise ServerError(supervisor.failure)


@contextlib.contextmanager
def _ctrl_c_is_ours() -> Iterator[None]:
    """A terminal sends SIGINT to workers, too: those that still import would end by it and be started again.

    They inherit this thread's mask. The hub's thread takes the signal, and Python runs its handler in this one.
    """
    resource_tracker.ensure_running()  # multiprocessing's; it unblocks SIGINT when it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _worker_app(options: ServerOptions, parent: int) -> object:
    """The app; called in the worker, before it listens."""
    end_with_parent()
    if os.getppid() != parent:  # it ended before that
        raise SystemExit(STARTUP_FAILURE)
    set_up_logging()
    app = make_app(options)
    collect_seldom()
    return app


class _Supervisor(Multiprocess):
    """A worker that dies is started again, and its share of the gauges forgotten; `failure` says why that was given up."""

    def __init__(self, config: uvicorn.Config, stop_accepting: Callable[[], None], folder: Path) -> None:
        before = {number: signal.getsignal(number) for number in SIGNALS}
        super().__init__(config, [Entrance(entrance_path(folder))])
        for number in before.keys() - {signal.SIGINT, signal.SIGTERM}:
            signal.signal(number, before[number])  # SIGHUP, of a terminal that closes, ends this server as one of one process
        self.failure: str | None = None
        self._stop_accepting = stop_accepting
        self._folder = folder
        self._pids: set[int | None] = set()
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS_A_MINUTE)

    def keep_subprocess_alive(self) -> None:
        for process in self.processes:
            self._pids.add(process.pid)
            process.child_conn.close()  # the worker has its own; with this one open its death would not end a wait for its answer
        super().keep_subprocess_alive()
        if any(process.exitcode == STARTUP_FAILURE for process in self.processes):
            self.failure = "a worker did not start; its log lines above tell why"
        for pid in self._pids - {process.pid for process in self.processes}:
            self._pids.remove(pid)
            mark_process_dead(pid, str(self._folder))  # type: ignore[no-untyped-call]
            logger.warning("worker %s ended; another one takes its place", pid)
            self._deaths.append(time.monotonic())
        if len(self._deaths) == MAX_DEATHS_A_MINUTE and self._deaths[-1] - self._deaths[0] < 60 and not self.failure:
            self.failure = f"{MAX_DEATHS_A_MINUTE} workers ended within a minute; their log lines above tell why"
            self.should_exit.set()

    def terminate_all(self) -> None:
        self._stop_accepting()
        super().terminate_all()

    def join_all(self) -> None:
        """uvicorn would wait for ever. A second Ctrl-C ends the wait."""
        deadline = time.monotonic() + (self.config.timeout_graceful_shutdown or 0) + KILL_AFTER_S
        for process in self.processes:
            while process.process.is_alive():
                process.process.join(0.1)
                if time.monotonic() > deadline or signal.SIGINT in self.signal_queue:
                    process.process.kill()


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets that listen on every address of `host`. Raises InvalidInputError."""
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            places = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
            sockets = [
                stack.enter_context(socket.create_server(address, family=family, backlog=BACKLOG)) for family, address in places
            ]
        except OSError as error:
            reason = str(error.strerror).partition(" (")[0]  # create_server repeats the address there
            raise InvalidInputError(
                f"{host}:{port} cannot be taken ({reason}); choose another --server-name or --server-port"
            ) from None
        yield sockets


@contextlib.contextmanager
def _hub(options: ServerOptions, folder: Path, listeners: Sequence[socket.socket]) -> Iterator[Callable[[], None]]:
    """A `Hub` and a `HandingServer` in a thread, for as long as the block runs; yields what ends the latter. Raises ConfigError."""
    hub = Hub(make_gate(options))
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(_unix_socket(hub_path(folder), socket.SOCK_STREAM))
        entrance = stack.enter_context(_unix_socket(entrance_path(folder), socket.SOCK_SEQPACKET))
        loop = asyncio.new_event_loop()
        until = asyncio.Event()
        handing = loop.create_task(HandingServer(listeners).serve(entrance))

        async def serve() -> None:
            await hub.serve(sock, until)
            with contextlib.suppress(asyncio.CancelledError):
                await handing

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="hub", daemon=True)
        thread.start()

        def stop_accepting() -> None:
            loop.call_soon_threadsafe(handing.cancel)

        try:
            yield stop_accepting
        finally:
            stop_accepting()
            loop.call_soon_threadsafe(until.set)
            thread.join()
            loop.close()


def _unix_socket(path: Path, kind: int) -> socket.socket:
    """It listens. Raises ConfigError."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        sock.bind(str(path))
    except OSError as error:  # a path of more than 107 bytes
        sock.close()
        raise ConfigError(f"{path} cannot be a socket ({error}); set TMPDIR to a folder with a short name") from None
    sock.listen(1024)
    return sock
