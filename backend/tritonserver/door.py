"""What all doors share: the life that tritonserver gives them, where their model lies, their log, their end.

A door in a model repository that `turbotriton convert` has not filled loads, and answers every request with what to do.
"""

import abc
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from turbotriton.contract.errors import EngineDiedError, InvalidInputError, TurbotritonError, UnavailableError
from turbotriton.contract.wire import TokenDelta

from .errors import status_text, triton_error

__all__ = ["DecoupledDoor", "UnaryDoor", "final_error"]

logger = logging.getLogger(__name__)

GRACE_S = 3.0
NOT_FILLED = "this model repository holds no model yet: run 'turbotriton convert' and serve the workspace that it writes"

_ERRORS: dict[str, type[TurbotritonError]] = {"INVALID_ARG": InvalidInputError, "UNAVAILABLE": UnavailableError}


class Door(abc.ABC):
    """The methods that tritonserver calls. `needs`: what `convert` puts beside model.py for this door."""

    needs: tuple[str, ...] = ("tokenizer",)

    def initialize(self, args: dict[str, str]) -> None:
        server_pid = _prepare_stub()
        folder = Path(args["model_repository"]) / args["model_version"]
        self._is_filled = all((folder / name).is_dir() for name in self.needs)
        if self._is_filled:
            self.open(folder, args, server_pid)

    def finalize(self) -> None:
        if self._is_filled:
            self.close()

    def _check_filled(self) -> None:
        if not self._is_filled:
            raise UnavailableError(NOT_FILLED)

    def error_text(self, error: TurbotritonError) -> str:
        """A gRPC stream carries no status code, so the message begins with it."""
        return status_text(error)

    def _error_response(self, error: Exception) -> Any:
        if not isinstance(error, TurbotritonError):
            logger.error("a request failed in the door", exc_info=error)
            error = TurbotritonError(f"the door failed: {error}")
        return pb_utils.InferenceResponse(error=triton_error(error, self.error_text(error)))

    @abc.abstractmethod
    def open(self, folder: Path, args: dict[str, str], server_pid: int) -> None:
        """folder: the model's version folder;  args: tritonserver's. Whatever it raises keeps the model from loading."""

    def close(self) -> None:  # noqa: B027  a door without threads has nothing to end
        """Ends within a few seconds and leaves nothing behind."""


class UnaryDoor(Door):
    """One response a request, made while tritonserver waits."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer_or_error(request) for request in requests]

    def _answer_or_error(self, request: Any) -> Any:
        try:
            self._check_filled()
            return self.answer(request)
        except Exception as error:  # noqa: BLE001  the border: the stub would fail the whole batch with it
            return self._error_response(error)

    @abc.abstractmethod
    def answer(self, request: Any) -> Any:
        """The InferenceResponse. Raises TurbotritonError."""


class DecoupledDoor(Door):
    """`execute` returns at once; responses go through the request's sender."""

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._check_filled()
                self.start(request, sender)
            except Exception as error:  # noqa: BLE001  the border, as above
                sender.send(self._error_response(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    @abc.abstractmethod
    def start(self, request: Any, sender: Any) -> None:
        """Must see to it that `sender` gets a last response, unless it raises."""


def _prepare_stub() -> int:
    """Logs to stderr (tritonserver's own logger costs a round trip a line), and leaves with the server. Returns its pid.

    A stub whose server was killed can hang in its own teardown for ever, holding shared memory.
    """
    server_pid = os.getppid()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s door %(process)d %(levelname)s %(name)s: %(message)s"
    )
    watched = os.pidfd_open(server_pid)
    threading.Thread(
        target=_leave_with, args=(watched, _shared_memory(server_pid)), name="leave-with-server", daemon=True
    ).start()
    return server_pid


def _shared_memory(server_pid: int) -> Path | None:
    """The region between tritonserver and this stub; only the server removes it, which a killed one cannot.

    From the stub's command line: MODEL.PY REGION SIZE GROWTH SERVER_PID ...; None where it reads otherwise.
    """
    arguments = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")[1:]
    if len(arguments) < 5 or arguments[4] != str(server_pid) or "/" in arguments[1]:
        return None
    return Path("/dev/shm") / arguments[1]


def _leave_with(server: int, region: Path | None) -> None:
    """server: a pidfd, readable when tritonserver has ended."""
    select.select([server], [], [])
    time.sleep(GRACE_S)
    if region is not None:
        region.unlink(missing_ok=True)
    os._exit(1)


def final_error(delta: TokenDelta) -> TurbotritonError:
    """The error that a last delta carries."""
    assert delta.error is not None
    if delta.error_status == "UNAVAILABLE" and "engine process ended" in delta.error:
        return EngineDiedError(delta.error)
    return _ERRORS.get(delta.error_status, TurbotritonError)(delta.error)
