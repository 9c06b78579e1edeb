"""Starts the engine process that belongs to a tritonserver and a set of weights, once, and connects to it.

    key = (owner pid, weights folder, hash of its manifest and config.ini, engine options)
    <runtime dir>/<owner>-<weights>.lock      held while an engine of this owner and these weights is being started
    <runtime dir>/<owner>-<weights>-<key>.sock

Whoever takes the lock first starts the process; the others wait for the lock and then find the socket. An engine of the same owner
and weights folder but another key (the workspace was converted again) is given CHANGE_WAIT_S to leave, so that two sets of
weights never share the device's memory.
"""

import collections
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import turbotriton
from turbotriton.contract import env
from turbotriton.contract.errors import ServerError, UnavailableError, WorkspaceError
from turbotriton.contract.layout import MANIFEST_NAME

from .client import EngineClient
from .server import alive_path

__all__ = ["EngineLauncher", "connect_engine"]

logger = logging.getLogger(__name__)

CHANGE_WAIT_S = 30.0
MAX_SOCKET_PATH_BYTES = 107  # of sockaddr_un
SOCKET_NAME_BYTES = 7 + 1 + 16 + 1 + 16 + 6  # pid, two hashes, ".alive"
START_LOG_INTERVAL_S = 10.0
MAX_STARTS_A_MINUTE = 3


class EngineLauncher:
    """Connects to one engine, starting it when there is none. Bounded: MAX_STARTS_A_MINUTE starts a minute by this process."""

    def __init__(self, weights_dir: Path, owner_pid: int | None, options: Mapping[str, str] | None = None) -> None:
        self._weights_dir = weights_dir.resolve()
        if not (self._weights_dir / "config.ini").is_file():
            raise WorkspaceError(f"{weights_dir} has no config.ini: run 'turbotriton convert' to fill this model repository")
        self._owner_pid = owner_pid
        self._options = dict(options or {})
        self._starts: collections.deque[float] = collections.deque(maxlen=MAX_STARTS_A_MINUTE)

    def connect(self) -> EngineClient:
        """Blocks while the weights load. Raises UnavailableError (too many starts, an old engine stays), WorkspaceError, ServerError."""
        if self._owner_pid is not None and not Path(f"/proc/{self._owner_pid}").exists():
            raise ServerError(f"process {self._owner_pid}, which the engine belongs to, is gone")
        folder = _runtime_dir()
        stem = f"{self._owner_pid or os.getpid()}-{_short_hash(str(self._weights_dir))}"
        socket_path = folder / f"{stem}-{self._key()}.sock"
        with _locked(folder / f"{stem}.lock"):
            client = _try_connect(socket_path)
            if client is not None:
                return client
            self._wait_for_other_keys(folder, stem, socket_path)
            self._count_start()
            return self._start(socket_path)

    def _key(self) -> str:
        parts = [(self._weights_dir / "config.ini").read_bytes()]
        with suppress(FileNotFoundError):  # LMDeploy writes none
            parts.append((self._weights_dir / MANIFEST_NAME).read_bytes())
        parts.append(repr(sorted(self._options.items())).encode())
        return _short_hash(*parts)

    def _wait_for_other_keys(self, folder: Path, stem: str, wanted: Path) -> None:
        end = time.monotonic() + CHANGE_WAIT_S
        while True:
            others = [path for path in folder.glob(f"{stem}-*.sock") if path != wanted and _has_engine(path)]
            if not others:
                return
            if time.monotonic() > end:
                raise UnavailableError(
                    f"an engine with the former weights of {self._weights_dir} still runs: unload the models that use it, then load"
                )
            time.sleep(0.2)

    def _count_start(self) -> None:
        now = time.monotonic()
        if len(self._starts) == MAX_STARTS_A_MINUTE and now - self._starts[0] < 60:
            raise UnavailableError(
                f"the engine was started {MAX_STARTS_A_MINUTE} times within a minute and ended each time: see the server's log"
            )
        self._starts.append(now)

    def _start(self, socket_path: Path) -> EngineClient:
        command = [_interpreter(), "-m", "turbotriton.backend.engine", "--weights", str(self._weights_dir)]
        command += ["--socket", str(socket_path)]
        if self._owner_pid is not None:
            command += ["--owner-pid", str(self._owner_pid)]
        logger.info("starting the engine: %s", " ".join(command))
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            env=_child_environment(self._options),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # signals to the server's group do not reach it; pidfd and EOF do
        )
        tail = _forward_log(process)
        next_log = began + START_LOG_INTERVAL_S
        while True:
            client = _try_connect(socket_path)
            if client is not None:
                logger.info("the engine is ready after %.1f s", time.monotonic() - began)
                return client
            code = process.poll()
            if code is not None:
                raise _start_error(code, tail)
            if time.monotonic() > next_log:
                logger.info("the engine has been loading for %.0f s", time.monotonic() - began)
                next_log += START_LOG_INTERVAL_S
            time.sleep(0.05)


def connect_engine(weights_dir: Path, owner_pid: int | None, options: Mapping[str, str] | None = None) -> EngineClient:
    """`EngineLauncher(...).connect()`, for callers that connect once. `options`: config.ini keys to override."""
    return EngineLauncher(weights_dir, owner_pid, options).connect()


def _start_error(code: int, tail: "collections.deque[str]") -> ServerError | WorkspaceError:
    time.sleep(0.1)  # let the log's last lines come in
    marked = [line for line in tail if "error:" in line]
    reason = marked[-1].split("error:", 1)[1].strip() if marked else (tail[-1].strip() if tail else "it said nothing")
    if code == 2:
        return WorkspaceError(reason)
    return ServerError(f"the engine ended with code {code} while it started: {reason}")


def _forward_log(process: "subprocess.Popen[bytes]") -> "collections.deque[str]":
    """Copies the engine's log to ours, line by line, for as long as it lives; returns its newest lines (filled meanwhile)."""
    tail: collections.deque[str] = collections.deque(maxlen=50)

    def copy() -> None:
        assert process.stderr is not None
        for raw in process.stderr:
            line = raw.decode(errors="replace")
            tail.append(line)
            sys.stderr.write(line)
            sys.stderr.flush()
        process.wait()

    threading.Thread(target=copy, name="engine-log", daemon=True).start()
    return tail


def _interpreter() -> str:
    """TURBOTRITON_PYTHON, else the first Python of our version that has torch: inside a stub sys.executable may be another one."""
    explicit = env.python_executable()
    if explicit:
        return explicit
    spec = importlib.util.find_spec("numpy")  # sits beside torch in the environment's site-packages
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable]
    if spec is not None and spec.origin is not None:
        site_packages = Path(spec.origin).parents[1]
        candidates.insert(0, str(site_packages.parents[2] / "bin" / version))
    candidates += [found for name in (version, "python3") if (found := shutil.which(name))]
    probe = f"import sys, torch, turbotriton; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    for candidate in dict.fromkeys(candidates):
        if candidate and Path(candidate).is_file():
            done = subprocess.run([candidate, "-c", probe], env=_child_environment({}), capture_output=True, check=False)
            if done.returncode == 0:
                return candidate
    raise ServerError(
        f"no {version} with torch and turbotriton was found among {', '.join(dict.fromkeys(candidates))}; "
        "set TURBOTRITON_PYTHON to the interpreter of the environment that has them"
    )


def _child_environment(options: Mapping[str, str]) -> dict[str, str]:
    """Ours, with every folder that this process imports from on PYTHONPATH (stubs get theirs by other ways)."""
    inherited = env.environment()
    roots = [str(Path(turbotriton.__file__).parents[1]), *env.site_dirs()]
    roots += [part for part in inherited.get("PYTHONPATH", "").split(os.pathsep) if part]
    inherited["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(roots))
    inherited.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads made steps 10 times slower on two busy cores
    inherited.setdefault("GOMP_SPINCOUNT", "0")
    inherited.update({env.ENGINE_OPTION_PREFIX + name.upper(): value for name, value in options.items()})
    return inherited


def _runtime_dir() -> Path:
    folder = env.runtime_dir()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ServerError(f"{folder} must belong to this user with mode 0700: fix it or set TURBOTRITON_RUNTIME_DIR")
    longest = folder / ("x" * SOCKET_NAME_BYTES)
    if len(os.fsencode(longest)) > MAX_SOCKET_PATH_BYTES:
        raise ServerError(f"{folder} is too long for a socket's path: set TURBOTRITON_RUNTIME_DIR to a shorter one")
    for leftover in folder.iterdir():  # of servers that are gone
        owner = leftover.name.split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            leftover.unlink(missing_ok=True)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_connect(path: Path) -> EngineClient | None:
    try:
        return EngineClient.connect(path)
    except OSError:
        return None


def _has_engine(socket_path: Path) -> bool:
    """Whether an engine lives behind this socket: it holds a lock beside it (a connection would keep it alive)."""
    try:
        with open(alive_path(socket_path), encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _short_hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]
