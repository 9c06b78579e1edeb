"""What all doors share: where their model lies, their log, errors that deltas carry."""

import logging
import os
import select
import sys
import threading
import time
from pathlib import Path

from turbotriton.contract.errors import EngineDiedError, InvalidInputError, TurbotritonError, UnavailableError
from turbotriton.contract.wire import TokenDelta

__all__ = ["final_error", "model_dir", "prepare_stub"]

GRACE_S = 3.0

_ERRORS: dict[str, type[TurbotritonError]] = {"INVALID_ARG": InvalidInputError, "UNAVAILABLE": UnavailableError}


def model_dir(args: dict[str, str]) -> Path:
    """The version folder of the model (`.../NAME/1`)."""
    return Path(args["model_repository"]) / args["model_version"]


def prepare_stub() -> int:
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
