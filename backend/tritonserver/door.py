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

from .errors import error_response

__all__ = ["Door", "final_error"]

GRACE_S = 3.0
NOT_FILLED = "this model repository holds no model yet: run 'turbotriton convert' and serve the workspace that it writes"

_ERRORS: dict[str, type[TurbotritonError]] = {"INVALID_ARG": InvalidInputError, "UNAVAILABLE": UnavailableError}


class Door(abc.ABC):
    """The methods that tritonserver calls. A door overrides `open`, `serve` and `close`.

    needs: what `convert` puts beside model.py for this door.   is_decoupled: answers through response senders.
    """

    needs: tuple[str, ...] = ("tokenizer",)
    is_decoupled = False

    def initialize(self, args: dict[str, str]) -> None:
        server_pid = _prepare_stub()
        folder = Path(args["model_repository"]) / args["model_version"]
        self._is_filled = all((folder / name).is_dir() for name in self.needs)
        if self._is_filled:
            self.open(folder, args, server_pid)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        if self._is_filled:
            return self.serve(requests)
        refusals = [error_response(UnavailableError(NOT_FILLED)) for _ in requests]
        if not self.is_decoupled:
            return refusals
        for request, refusal in zip(requests, refusals, strict=True):
            request.get_response_sender().send(refusal, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def finalize(self) -> None:
        if self._is_filled:
            self.close()

    @abc.abstractmethod
    def open(self, folder: Path, args: dict[str, str], server_pid: int) -> None:
        """folder: the model's version folder;  args: tritonserver's. Whatever it raises keeps the model from loading."""

    @abc.abstractmethod
    def serve(self, requests: Sequence[Any]) -> list[Any] | None:
        """One response a request, or None when they go through response senders."""

    def close(self) -> None:  # noqa: B027  a door without threads has nothing to end
        """Ends within a few seconds and leaves nothing behind."""


def _prepare_stub() -> int:
    """Logs to stderr (tritonserver's own logger costs a round trip a line), and leaves with the server. Returns its pid.

    A stub whose server was killed can hang in its own teardown for ever, holding shared memory.
    """
    server_pid = os.getppid()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s door %(process)d %(levelname)s %(name)s: %(message)s"
    )
    watched = os.pidfd_open(server_pid)
    threading.Thread(target=_leave_with, args=(watched,), name="leave-with-server", daemon=True).start()
    return server_pid


def _leave_with(server: int) -> None:
    """server: a pidfd, readable when tritonserver has ended."""
    select.select([server], [], [])
    time.sleep(GRACE_S)
    os._exit(1)


def final_error(delta: TokenDelta) -> TurbotritonError:
    """The error that a last delta carries."""
    assert delta.error is not None
    if delta.error_status == "UNAVAILABLE" and "engine process ended" in delta.error:
        return EngineDiedError(delta.error)
    return _ERRORS.get(delta.error_status, TurbotritonError)(delta.error)
