"""turbotriton: convert a model, serve it with a stock tritonserver, chat with it.

The calls of `api.py` are here too, imported when they are first used: tritonserver's stubs import this package and stay small.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import (
        ChatTemplateConfig,
        GenerationConfig,
        Pipeline,
        PytorchEngineConfig,
        Response,
        TurbomindEngineConfig,
        pipeline,
    )
    from .client.api_client import APIClient, client
    from .serving import ApiServer, serve

__version__ = "0.1.0"

__all__ = [
    "APIClient",
    "ApiServer",
    "ChatTemplateConfig",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "Response",
    "TurbomindEngineConfig",
    "__version__",
    "client",
    "pipeline",
    "serve",
]

#: name -> module that has it, where that is not `api`. `client` is the package of that name, which is callable.
_ELSEWHERE = {"APIClient": ".client.api_client", "ApiServer": ".serving", "serve": ".serving"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "client":
        return import_module(".client", __name__)
    return getattr(import_module(_ELSEWHERE.get(name, ".api"), __name__), name)
