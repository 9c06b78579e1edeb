"""`serve api_server --workers N` as processes, with no tritonserver behind it: what starts, is started again, and ends."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from turbotriton.cli import process_setup
from turbotriton.cli.api_server import MAX_WORKERS, workers_for
from turbotriton.cli.main import main
from turbotriton.cli.running_server import held_ports

PATIENCE_S = 60.0
#: `turbotriton` where two dead workers are too many.
IMPATIENT = (
    "import sys; from turbotriton.cli import main, workers; workers.MAX_DEATHS_A_MINUTE = 2; sys.exit(main.main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def nobody() -> Iterator[str]:
    """An address that no tritonserver listens on."""
    with held_ports(1) as (port,):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def workers(target: str, log_path: Path, *options: str, start: tuple[str, ...] = ("-m", "turbotriton")) -> Iterator["Server"]:
    with (
        held_ports(1) as (port,),
        open(log_path, "wb") as log,
        tempfile.TemporaryDirectory(prefix="turbotriton-", dir="/tmp") as folder,  # short enough for a socket
    ):
        command = [sys.executable, *start, "serve", "api_server", target, "--workers=2", f"--server-port={port}", *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": folder}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        server = Server(process, f"http://127.0.0.1:{port}", log_path, Path(folder))
        try:
            wait_until(lambda: len(server.answering()) == 2, server)
            yield server
        finally:
            process.kill()
            process.wait()


class Server:
    def __init__(self, process: "subprocess.Popen[bytes]", url: str, log_path: Path, folder: Path) -> None:
        self.process, self.url, self.log_path, self.folder = process, url, log_path, folder

    def page(self, path: str) -> str:
        """Whatever its status."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}{path}", timeout=PATIENCE_S) as reply:
                return str(reply.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError:
            return ""

    def answered(self) -> dict[int, float]:
        """pid -> requests that it has answered."""
        found = re.findall(
            r'^turbotriton_openai_worker_requests_total\{pid="(\d+)"\} (\S+)$', self.page("/metrics"), re.MULTILINE
        )
        return {int(pid): float(count) for pid, count in found}

    def answering(self) -> set[int]:
        return {pid for pid in self.answered() if Path(f"/proc/{pid}").exists()}

    def processes(self) -> list[int]:
        """Those that it has started."""
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]


def wait_until(condition: Callable[[], object], server: Server) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, server.log_path.read_text()
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_killed_worker_is_replaced_and_its_requests_still_count(nobody: str, tmp_path: Path) -> None:
    with workers(nobody, tmp_path / "log") as server:
        wait_until(lambda: all(server.answered().values()), server)
        old = server.answering()
        before = server.answered()
        victim = min(old)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(server.answering() | old) == 3, server)
        assert server.answered()[victim] >= before[victim] > 0
        assert re.search(r"^turbotriton_openai_requests_running 1.0$", server.page("/metrics"), re.MULTILINE)
        (new,) = server.answering() - old
        wait_until(lambda: server.answered()[new] > 0, server)
        assert f"worker {victim} ended; another one takes its place" in server.log_path.read_text()
        children = server.processes()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
        wait_until(lambda: all(is_gone(pid) for pid in children), server)
        assert len(children) >= 2
        assert not list(server.folder.iterdir())


def test_a_burst_of_connections_is_spread_evenly(nobody: str, tmp_path: Path) -> None:
    async def ask(port: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(b"GET /v1/none HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        reply = await reader.read()
        writer.close()
        return reply

    async def burst(port: str) -> list[bytes]:
        return await asyncio.gather(*(ask(port) for _ in range(64)))

    with workers(nobody, tmp_path / "log") as server:
        wait_until(lambda: all(server.answered().values()), server)
        before = server.answered()
        assert all(reply.startswith(b"HTTP/1.1 404 ") for reply in asyncio.run(burst(server.url.rpartition(":")[2])))
        after = server.answered()
        grown = [after[pid] - before[pid] for pid in after]
        assert sum(grown) in (65, 66)  # the metrics page is one more
        assert max(grown) - min(grown) <= 1


def test_ctrl_c_ends_all_of_them_also_while_they_start(nobody: str, tmp_path: Path) -> None:
    with workers(nobody, tmp_path / "log") as server:
        old = set(server.processes())
        os.kill(min(server.answering()), signal.SIGKILL)
        wait_until(lambda: set(server.processes()) - old, server)
        children = server.processes()
        for pid in (server.process.pid, *children):  # as a terminal does
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        began = time.monotonic()
        assert server.process.wait(PATIENCE_S) == 0
        assert time.monotonic() - began < 20
        wait_until(lambda: all(is_gone(pid) for pid in children), server)
        assert "Traceback" not in server.log_path.read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_workers_do_not_outlive_a_killed_server(nobody: str, tmp_path: Path, number: int) -> None:
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # of a suite that was started by nohup children inherit that it is ignored
    with workers(nobody, tmp_path / "log") as server:
        children = server.processes()
        server.process.send_signal(number)
        assert server.process.wait(PATIENCE_S) == -number
        wait_until(lambda: all(is_gone(pid) for pid in children), server)


def test_workers_that_die_again_and_again_end_the_server(nobody: str, tmp_path: Path) -> None:
    with workers(nobody, tmp_path / "log", start=("-c", IMPATIENT)) as server:
        for pid in server.answering():
            os.kill(pid, signal.SIGKILL)
        assert server.process.wait(PATIENCE_S) == 1
        assert "turbotriton: error: 2 workers ended within a minute" in server.log_path.read_text()


def test_a_taken_port_and_a_bad_qos_file_are_one_line(nobody: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with workers(nobody, tmp_path / "log", "--api-keys", "secret") as server:
        assert json.loads(server.page("/v1/models"))["error"]["code"] == "invalid_api_key"
        port = server.url.rpartition(":")[2]
        assert main(["serve", "api_server", nobody, "--workers", "2", "--server-port", port]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(rf"turbotriton: error: 127.0.0.1:{port} cannot be taken \(.+\); choose another .*--server-port", line)
    assert main(["serve", "api_server", nobody, "--workers", "2", "--qos-config-path", "/no/such.json"]) == 2
    assert "--qos-config-path /no/such.json" in capsys.readouterr().err


@pytest.mark.parametrize("number", [-1, MAX_WORKERS + 1])
def test_a_number_of_workers_that_cannot_be_is_one_line(nobody: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "api_server", nobody, f"--workers={number}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"turbotriton: error: --workers is {number}; it must be from 0 to {MAX_WORKERS}"


@pytest.mark.parametrize(
    ("cores", "quota", "expected"),
    [
        (2, "max 100000", 1),
        (7, "max 100000", 1),
        (16, "max 100000", 8),
        (12, None, 6),
        (128, "max 100000", 8),
        (128, "450000 100000", 1),
        (128, "1600000 100000", 8),
        (4, "50000 100000", 1),
    ],
)
def test_without_a_number_the_cores_decide(
    cores: int, quota: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_setup.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(process_setup, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        process_setup.CPU_QUOTA.write_text(f"{quota}\n")
    assert workers_for(process_setup.usable_cores()) == expected
