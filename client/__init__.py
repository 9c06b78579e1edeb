"""What talks to a running tritonserver: Python client, terminal chat, web demo.

The package is callable: `turbotriton.client(url)` is a call of LMDeploy's API, and a sub-module's name as well.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api_client import APIClient
    from .grpc_stream import AsyncClient, Client, Delta, Result

__all__ = ["AsyncClient", "Client", "Delta", "Result"]


def __getattr__(name: str) -> Any:
    """Client and its kin on first use: importing a door or the command line must not load gRPC."""
    if name in __all__:
        from . import grpc_stream

        return getattr(grpc_stream, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    def __call__(self, api_server_url: str = "http://127.0.0.1:23333", api_key: str | None = None) -> "APIClient":
        from .api_client import client

        return client(api_server_url, api_key)


sys.modules[__name__].__class__ = _Callable
