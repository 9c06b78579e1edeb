"""The terminal chat: reads questions, prints answers as they come, keeps the conversation on the server.

With a terminal: a prompt, line editing, Ctrl-C. Without: one question a line until the end of input, answers only on
standard output, everything else on standard error.
"""

import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol, TextIO

from turbotriton.contract.errors import InvalidInputError, TurbotritonError

from .session import ChatSession, Message, TurnStats
from .turbomind_door import ChatSampling, ServedModel, TurbomindDoor

__all__ = ["Conversation", "Terminal", "TerminalOptions", "run_terminal"]

HELP = """\
  Enter            sends the line; end a line with \\ to continue it on the next
  /multi           switches: a blank line sends instead (as LMDeploy's client does), lines before it are one question
  Ctrl-C           stops the answer and keeps the conversation; at the prompt it clears the line
  /help            this text
  end              ends the conversation: it is forgotten, the next question starts a new one
  exit, Ctrl-D     ends the conversation and leaves
"""


@dataclass(frozen=True, slots=True)
class TerminalOptions:
    session_id: int | None = None  # None: a random one, so that two terminals do not replace each other's conversation
    cap: str = "chat"  # or "completion": no chat template
    stream: bool = True
    system: str | None = None
    once: str | None = None  # ask this only
    multiline: bool = False
    sampling: ChatSampling = field(default_factory=ChatSampling)


def run_terminal(url: str, options: TerminalOptions, *, stdin: TextIO = sys.stdin, out: TextIO = sys.stdout) -> int:
    """Chats until `exit`, the end of input, or the one question of `options.once`. Returns the exit code.

    Raises our errors when the server cannot be reached at the start, or at any time when input is no terminal.
    """
    door = TurbomindDoor(url)
    try:
        model = door.served_model()
        session_id = options.session_id if options.session_id is not None else 1 + secrets.randbelow(2**48)
        session = ChatSession(
            door, model, session_id, render=_make_render(model, options.cap), system=options.system, sampling=options.sampling
        )
        terminal = Terminal(
            session,
            lambda: None if session.last_turn is None else _describe(session.last_turn),
            stream=options.stream,
            multiline=options.multiline,
            stdin=stdin,
            out=out,
        )
        if options.once is not None:
            terminal.answer(options.once)
            session.end()
            return 0
        return terminal.chat(f"{model.name} at {url}, session {session_id}")
    finally:
        door.close()


def _make_render(model: ServedModel, cap: str) -> Callable[[Sequence[Message]], str] | None:
    if cap == "completion":
        return None
    if cap != "chat":
        raise InvalidInputError(f"--cap is {cap!r}; it must be chat or completion")
    if not model.chat_template:
        raise InvalidInputError(f"model {model.name} has no chat template; use --cap completion, which sends the text as it is")
    from turbotriton.text.chat_template import ChatTemplate

    template = ChatTemplate(model.chat_template, model.bos_text, model.eos_text)
    return lambda messages: template.render(list(messages), add_generation_prompt=True)


class Conversation(Protocol):
    """What the terminal needs of a conversation, wherever it is kept."""

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces."""

    def cancel(self) -> None:
        """Ends the running answer, which stays as far as it came. Called from another thread."""

    def end(self) -> None:
        """Forgets the conversation; the next question starts a new one."""


class Terminal:
    """`describe`: a line about the last answer, None for nothing."""

    def __init__(
        self,
        session: Conversation,
        describe: Callable[[], str | None],
        *,
        stream: bool = True,
        multiline: bool = False,
        stdin: TextIO = sys.stdin,
        out: TextIO = sys.stdout,
    ) -> None:
        self._session = session
        self._describe = describe
        self._stream = stream
        self._multiline = multiline
        self._stdin = stdin
        self._out = out
        self._is_terminal = stdin.isatty() and out.isatty()

    def chat(self, title: str) -> int:
        """Until `exit` or the end of input. Returns the exit code; raises our errors when input is no terminal."""
        self._note(f"{title}. /help lists the commands, exit leaves.")
        if self._is_terminal:
            _enable_line_editing()
        try:
            for question in self._questions():
                command = question.strip()
                if command == "exit":
                    break
                if command == "end":
                    self._session.end()
                    self._note("The conversation has ended; the next question starts a new one.")
                elif command == "/help":
                    self._note(HELP.rstrip("\n"))
                elif command == "/multi":
                    self._multiline = not self._multiline
                    self._note("A blank line sends now." if self._multiline else "Enter sends now.")
                elif command.startswith("/") and " " not in command and command[1:].isalpha():
                    self._note(f"No command {command}; /help lists them.")
                elif command:
                    self._answer_or_note(question)
        finally:
            self._end_quietly()
        return 0

    def _answer_or_note(self, question: str) -> None:
        try:
            self.answer(question)
        except TurbotritonError as error:
            if not self._is_terminal:
                raise
            self._note(f"error: {error}")

    def answer(self, question: str) -> None:
        """Prints the answer to question, then its token count and speed as a note."""
        pieces = []
        with _interrupt_calls(self._cancel):
            for piece in self._session.ask(question):
                pieces.append(piece)
                if self._stream:
                    self._write(piece)
        if not self._stream:
            self._write("".join(pieces))
        self._write("\n")
        about = self._describe()
        if about is not None:
            self._note(about)

    def _cancel(self) -> None:
        try:
            self._session.cancel()
        except TurbotritonError as error:
            self._note(f"could not cancel: {error}")

    def _end_quietly(self) -> None:
        try:
            self._session.end()
        except TurbotritonError as error:
            self._note(f"could not end the session: {error}")

    def _questions(self) -> Iterator[str]:
        lines: list[str] = []
        while True:
            try:
                line = self._read_line(is_first=not lines)
            except EOFError:
                if lines:
                    yield "\n".join(lines)
                return
            except KeyboardInterrupt:
                self._write("\n")
                lines = []
                continue
            if not self._is_terminal:
                yield line
            elif self._multiline:
                if line == "" and lines:
                    yield "\n".join(lines)
                    lines = []
                elif not lines and line.strip() in ("exit", "end", "/help", "/multi"):
                    yield line
                elif line:
                    lines.append(line)
            elif line.endswith("\\"):
                lines.append(line[:-1])
            else:
                yield "\n".join([*lines, line])
                lines = []

    def _read_line(self, *, is_first: bool) -> str:
        if self._is_terminal:
            return input(">>> " if is_first else "... ")
        line = self._stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _note(self, text: str) -> None:
        """What is not part of an answer: dim on a terminal, on standard error otherwise."""
        if self._is_terminal:
            self._write(f"\x1b[2m{text}\x1b[0m\n")
        else:
            print(text, file=sys.stderr, flush=True)


def _enable_line_editing() -> None:
    """Arrow keys and history for input(), where Python was built with readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def _describe(turn: TurnStats) -> str:
    first = "" if turn.first_token_s is None else f", first token after {turn.first_token_s:.2f} s"
    cancelled = "cancelled, " if turn.is_cancelled else ""
    return (
        f"[{cancelled}{turn.num_output_tokens} tokens, {turn.tokens_per_s:.1f} tokens/s{first}; "
        f"sent {turn.num_sent_tokens}, kept {turn.num_kept_tokens} on the server]"
    )


@contextmanager
def _interrupt_calls(cancel: Callable[[], None]) -> Iterator[None]:
    """While inside, the first Ctrl-C calls `cancel` in a thread (it is an RPC); a second one raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    workers: list[threading.Thread] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if workers:
            raise KeyboardInterrupt
        workers.append(threading.Thread(target=cancel, daemon=True))
        workers[0].start()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for worker in workers:
            worker.join(timeout=10)
