"""turbotriton: convert a model, serve it with a stock tritonserver, chat with it.

The calls of `api.py` are here too, imported when they are first used: tritonserver's stubs import this package and stay small.
"""

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

__version__ = "0.1.0"

__all__ = [
    "ChatTemplateConfig",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "Response",
    "TurbomindEngineConfig",
    "__version__",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
