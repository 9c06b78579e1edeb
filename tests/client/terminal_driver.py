"""A program on a pseudo terminal: what a person at the keyboard sees and types. Standard library only."""

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence

CTRL_C, CTRL_D = "\x03", "\x04"
#: Seconds until what the screen has to show counts as missing: only a test that fails waits for so long.
PATIENCE_S = 60.0
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])")


class TerminalProgram:
    """`turbotriton <arguments>` on a terminal of its own. Use as a context manager; it is killed at the end if it still runs."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", **(environment or {})}
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what it runs in the background, and so for us
            os.execve(sys.executable, [sys.executable, "-m", "turbotriton", *arguments], env)
        self._screen = ""  # what was printed and not yet expected

    def __enter__(self) -> "TerminalProgram":
        return self

    def __exit__(self, *unused: object) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self._fd)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """Waits until pattern appears after the last match, without colours. Raises AssertionError with the screen."""
        deadline = time.monotonic() + timeout_s
        while True:
            match = re.search(pattern, self._screen, re.DOTALL)
            if match is not None:
                self._screen = self._screen[match.end() :]
                return match
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready or not self._read():
                raise AssertionError(f"{pattern!r} did not appear; the screen shows:\n{self._screen}")

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            select.select([self._fd], [], [], 0.02)
            self._read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running; the screen shows:\n{self._screen}")

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 0)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the program closed its side
            return False
        self._screen = _ESCAPES.sub("", self._screen + data.decode(errors="replace").replace("\r\n", "\n"))
        return bool(data)
