"""What talks to a running tritonserver: Python client, terminal chat, web demo."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .grpc_stream import AsyncClient, Client, Delta, Result

__all__ = ["AsyncClient", "Client", "Delta", "Result"]


def __getattr__(name: str) -> Any:
    """Client and its kin on first use: importing a door or the command line must not load gRPC."""
    if name in __all__:
        from . import grpc_stream

        return getattr(grpc_stream, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
