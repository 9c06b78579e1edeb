"""Documentation as a test: a page's blocks run in their order and have to print what the page says.

    ```console
    $ command            run by bash in the page's folder; "..." in what follows stands for anything
    output               printed, on a line of its own, in this order (what comes between is not asked about)
    $ NAME=$(command)    kept for the commands that follow
    $ command &          in the background; its output is waited for
    $ kill %1            ends the first of these, which must leave with 0
    >>> text             the command runs on a terminal, where this is typed
    ```
    ```python            a program of its own; a ```text block right behind it is what it prints
    Open <http://...>    in the prose: a browser visits that page

Blocks of other languages (sh, json, text) are for reading. A command may fail only where the page shows its `turbotriton: error:`.
The ports of the page stand for free ones: PORTS names them, and the flags that tell a server of ours.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.client.terminal_driver import TerminalProgram

from turbotriton.cli.main import build_parser

__all__ = ["PORTS", "ROOT", "PageRun", "blocks_of", "commands_of", "leaf_commands", "parser_of"]

ROOT = Path(__file__).resolve().parents[1]
#: First words of a command -> its port flags -> the port that the documentation uses.
PORTS: dict[str, dict[str, int]] = {
    "turbotriton serve tritonserver": {"--http-port": 8000, "--grpc-port": 8001, "--metrics-port": 8002},
    "turbotriton serve api_server": {"--server-port": 23333},
    "turbotriton serve gradio": {"--server-port": 6006},
}
COMMAND_TIMEOUT_S = 280.0
_PARTS = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$|^(?:\d+\. )?Open <(?P<url>http://\S+)>", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """A block, or with language "open" an address to visit."""

    language: str
    text: str


@dataclass(slots=True)
class Step:
    command: str
    output: list[str] = field(default_factory=list)


def blocks_of(page: Path) -> list[Part]:
    found = []
    for match in _PARTS.finditer(page.read_text(encoding="utf-8")):
        found.append(Part("open", match["url"]) if match["url"] else Part(match["language"], match["text"]))
    return found


def commands_of(page: Path) -> list[str]:
    """Every command of the blocks that run."""
    return [step.command for part in blocks_of(page) if part.language == "console" for step in _steps(part.text)]


def _steps(block: str) -> list[Step]:
    steps: list[Step] = []
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            steps.append(Step(re.sub(r"\s+#.*$", "", line[2:]).strip()))
        elif line.strip():
            assert steps, f"output before any command: {line!r}"
            steps[-1].output.append(line)
    return steps


@dataclass
class PageRun:
    """Runs a page in `folder`; leaving the block ends what the page left running.

    ports: the documentation's port -> the one that it stands for.   visit: what a browser does at an address.
    """

    folder: Path
    ports: Mapping[int, int]
    visit: Callable[[str], None] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tools = self.folder / ".tools"
        tools.mkdir()
        for name, words in (("python", ""), ("turbotriton", "-m turbotriton ")):
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
            (tools / name).chmod(0o755)
        path = os.pathsep.join([str(tools), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"} | (
            self.environment
        )
        self._jobs: list[tuple[subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> "PageRun":
        return self

    def __exit__(self, *unused: object) -> None:
        for process, log in self._jobs:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait(180)
                print(log.read_text(errors="replace")[-3000:])

    def run(self, page: Path) -> list[str]:
        """Every step, and the commands that were run."""
        done = []
        parts = blocks_of(page)
        for number, part in enumerate(parts):
            if part.language == "console":
                for step in _steps(part.text):
                    self._run_step(step)
                    done.append(step.command)
            elif part.language == "python":
                shown = parts[number + 1].text if number + 1 < len(parts) and parts[number + 1].language == "text" else ""
                self._run_program(part.text, shown.splitlines())
            elif part.language == "open":
                assert self.visit is not None, f"{page.name} opens {part.text}, but there is no browser"
                self.visit(self._with_ports(part.text))
        assert not [process for process, _ in self._jobs if process.poll() is None], f"{page.name} leaves something running"
        return done

    def _run_step(self, step: Step) -> None:
        command = self._with_ports(step.command)
        output = [self._with_ports(line) for line in step.output]
        for words, flags in PORTS.items():
            if command.startswith(words):
                given = [f"{flag}={self.ports[port]}" for flag, port in flags.items() if flag not in command]
                command = command.replace(words, " ".join([words, *given]), 1)
        if named := re.fullmatch(r"([A-Z_]+)=(.*)", command):
            self.environment[named[1]] = self._shell(f"{command}; printf %s ${named[1]}").stdout
        elif command.endswith("&"):
            self._start(command.removesuffix("&"), output)
        elif stopped := re.fullmatch(r"kill %(\d+)", command):
            self._stop(int(stopped[1]))
        elif any(line.startswith(">>>") for line in output):
            self._talk(command, output)
        else:
            done = self._shell(command)
            said = done.stdout + done.stderr
            fails = any(line.startswith("turbotriton: error:") for line in output)
            assert (done.returncode != 0) == fails, f"$ {command}\n{said}\nended with {done.returncode}"
            _find(output, said, command)

    def _shell(self, command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=COMMAND_TIMEOUT_S, check=False,
        )  # fmt: skip

    def _run_program(self, text: str, output: list[str]) -> None:
        program = self.folder / ".tools" / "program.py"
        program.write_text(self._with_ports(text), encoding="utf-8")
        done = self._shell(f"python {program}")
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        _find([self._with_ports(line) for line in output], done.stdout + done.stderr, text)

    def _start(self, command: str, output: list[str]) -> None:
        log = self.folder / ".tools" / f"job{len(self._jobs) + 1}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._jobs.append((process, log))
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while True:
            said = log.read_text(errors="replace")
            try:
                return _find(output, said, command)
            except AssertionError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _stop(self, job: int) -> None:
        process, log = self._jobs[job - 1]
        assert process.poll() is None, f"job {job} ended by itself:\n{log.read_text(errors='replace')[-3000:]}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 0, log.read_text(errors="replace")[-3000:]

    def _talk(self, command: str, output: list[str]) -> None:
        words = shlex.split(re.sub(r"\$(\w+)", lambda name: self.environment[name[1]], command))
        assert words[0] == "turbotriton", command
        with contextlib.chdir(self.folder), TerminalProgram(words[1:], self.environment) as terminal:
            for line in output:
                if line.startswith(">>> "):
                    terminal.expect(">>> ", timeout_s=120)
                    terminal.type(line.removeprefix(">>> ") + "\r")
                else:
                    terminal.expect(_pattern(line), timeout_s=120)
            assert terminal.wait() == 0

    def _with_ports(self, text: str) -> str:
        return re.sub(r"(?<!\d)\d{4,5}(?!\d)", lambda port: str(self.ports.get(int(port[0]), port[0])), text)


def _pattern(line: str) -> str:
    return ".*?".join(re.escape(piece) for piece in line.rstrip().split("..."))


def _find(lines: list[str], said: str, command: str) -> None:
    """Raises AssertionError unless `said` has the lines in this order."""
    rest = said.replace("\r", "\n")
    for line in lines:
        if line.strip() == "...":
            continue
        found = re.search(rf"^{_pattern(line)}\s*?$", rest, re.MULTILINE)
        assert found is not None, f"$ {command}\nhas to print\n{line}\nand printed\n{said}"
        rest = rest[found.end() :]


def _children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {
        name: child
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, child in action.choices.items()
    }


def leaf_commands() -> Iterator[tuple[str, ...]]:
    """Every command of the command line that has no commands of its own, by its words."""

    def walk(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        children = _children(parser)
        if not children:
            yield words
        for name, child in children.items():
            yield from walk(child, (*words, name))

    return walk(build_parser(), ())


def parser_of(command: str) -> argparse.ArgumentParser:
    """command: its words, such as "serve gradio"."""
    parser = build_parser()
    for word in command.split():
        parser = _children(parser)[word]
    return parser
