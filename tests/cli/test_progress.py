"""What may take a while on a large model shows how far it is, on a terminal and nowhere else."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tests.cli.process import turbotriton

from turbotriton.demo import checkpoint_path

DEMO = str(checkpoint_path())


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"TURBOTRITON_CACHE": str(tmp_path), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def on_a_terminal(*arguments: str, environment: dict[str, str]) -> str:
    """What the command writes to a standard error that is a terminal."""
    mine, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    command = [sys.executable, "-m", "turbotriton", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=its, env=os.environ | environment) as process:
        os.close(its)
        written = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(mine, 4096):
                written += piece
        assert process.wait(60) == 0, written.decode()
    os.close(mine)
    return written.decode()


def test_converting_verifying_and_loading_show_a_bar_on_a_terminal(tmp_path: Path, environment: dict[str, str]) -> None:
    workspace = str(tmp_path / "workspace")
    shown = on_a_terminal("convert", "demo", DEMO, "--dst-path", workspace, "--verify", environment=environment)
    assert re.search("converting: +100%.*verifying: +100%", shown, re.DOTALL)
    shown = on_a_terminal("chat", workspace, "--max-batch-size", "1", "--once", "Hi", environment=environment)
    assert re.search("loading: +100%", shown)


def test_a_pipe_gets_no_bar(tmp_path: Path, environment: dict[str, str]) -> None:
    done = turbotriton("convert", "demo", DEMO, "--dst-path", str(tmp_path / "workspace"), "--verify", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "%" not in done.stdout + done.stderr
