"""The calls of LMDeploy's Python API. `from turbotriton import pipeline` gets them from here; nothing heavy is imported before use."""

import logging
import os

from turbotriton.backend.pipeline.inference import Pipeline
from turbotriton.backend.pipeline.options import (
    GenerationConfig,
    PytorchEngineConfig,
    Response,
    TurbomindEngineConfig,
    engine_options,
)
from turbotriton.contract.chat_templates import ChatTemplateConfig
from turbotriton.contract.errors import ConfigError

__all__ = [
    "ChatTemplateConfig",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "Response",
    "TurbomindEngineConfig",
    "pipeline",
]

LOG_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")


def pipeline(
    model_path: str | os.PathLike[str],
    model_name: str | None = None,
    backend_config: TurbomindEngineConfig | PytorchEngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    log_level: str = "ERROR",
    *,
    revision: str | None = None,
    download_dir: str | os.PathLike[str] | None = None,
) -> Pipeline:
    """Loads a model into this process: a workspace, a checkpoint's folder, or a hub id.

    model_name: a chat template's name ('turbotriton list'); by default the checkpoint's own template is used.
    revision, download_dir: of a hub id; the same fields of backend_config count where these are None.
    Raises CheckpointError, WorkspaceError, ConfigError.
    """
    if log_level not in LOG_LEVELS:
        raise ConfigError(f"log_level is {log_level!r}; it must be one of {', '.join(LOG_LEVELS)}")
    logging.getLogger("turbotriton").setLevel(log_level)
    from turbotriton.backend.pipeline.loading import load_pipeline

    return load_pipeline(
        model_path,
        engine_options(
            backend_config or TurbomindEngineConfig(), model_name=model_name, revision=revision, download_dir=download_dir
        ),
        chat_template_config,
    )
