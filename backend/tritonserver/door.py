"""What all doors share: where their model lies, their log, errors that deltas carry."""

import logging
import sys
from pathlib import Path

from turbotriton.contract.errors import EngineDiedError, InvalidInputError, TurbotritonError, UnavailableError
from turbotriton.contract.wire import TokenDelta

__all__ = ["final_error", "model_dir", "start_logging"]

_ERRORS: dict[str, type[TurbotritonError]] = {"INVALID_ARG": InvalidInputError, "UNAVAILABLE": UnavailableError}


def model_dir(args: dict[str, str]) -> Path:
    """The version folder of the model (`.../NAME/1`)."""
    return Path(args["model_repository"]) / args["model_version"]


def start_logging() -> None:
    """To stderr, which tritonserver passes on: its own logger costs a round trip a line."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s door %(process)d %(levelname)s %(name)s: %(message)s"
    )


def final_error(delta: TokenDelta) -> TurbotritonError:
    """The error that a last delta carries."""
    assert delta.error is not None
    if delta.error_status == "UNAVAILABLE" and "engine process ended" in delta.error:
        return EngineDiedError(delta.error)
    return _ERRORS.get(delta.error_status, TurbotritonError)(delta.error)
