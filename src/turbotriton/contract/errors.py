"""Every error that turbotriton raises on purpose.

    TurbotritonError                 one line for the user; the command line exits with `exit_code`
    ├── InvalidInputError            the caller's values are wrong                       exit 2, INVALID_ARG
    │   ├── CheckpointError          a model folder that cannot be converted
    │   ├── WorkspaceError           a workspace that cannot be loaded
    │   └── ConfigError              an option or config.ini value out of range
    ├── UnavailableError             try again later: queue full, engine starting        exit 1, UNAVAILABLE
    │   └── EngineDiedError          the engine process ended under the request
    ├── DeadlineExceededError        the request's own deadline passed                   exit 1, UNAVAILABLE
    ├── RequestCancelledError        cancelled by the caller                             exit 1, CANCELLED
    └── ServerError                  tritonserver or the connection to it failed         exit 1, INTERNAL

Messages name the value and the remedy: what happened, which value, what to do.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeadlineExceededError",
    "EngineDiedError",
    "InvalidInputError",
    "RequestCancelledError",
    "ServerError",
    "TurbotritonError",
    "UnavailableError",
    "WorkspaceError",
]


class TurbotritonError(Exception):
    """Base of all errors that a user can cause or meet. `str(error)` is one line."""

    exit_code = 1
    #: Name of the tritonserver status that a door answers with (`pb_utils.TritonError.<status>`).
    triton_status = "INTERNAL"


class InvalidInputError(TurbotritonError):
    exit_code = 2
    triton_status = "INVALID_ARG"


class CheckpointError(InvalidInputError):
    pass


class WorkspaceError(InvalidInputError):
    pass


class ConfigError(InvalidInputError):
    pass


class UnavailableError(TurbotritonError):
    triton_status = "UNAVAILABLE"


class EngineDiedError(UnavailableError):
    pass


class DeadlineExceededError(TurbotritonError):
    triton_status = "UNAVAILABLE"


class RequestCancelledError(TurbotritonError):
    triton_status = "CANCELLED"


class ServerError(TurbotritonError):
    pass
