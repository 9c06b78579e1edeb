"""A path becomes a `Pipeline`: files, tokenizer, prompt format, engine."""

import os

from turbotriton.contract.chat_templates import ChatTemplateConfig
from turbotriton.text.detokenizer import TextTokenizer
from turbotriton.text.prompt_format import choose_format

from .engine_thread import EngineThread, load_engine
from .inference import Pipeline
from .model_files import open_model
from .options import EngineOptions

__all__ = ["load_pipeline"]


def load_pipeline(
    model_path: str | os.PathLike[str], options: EngineOptions, chat_template: ChatTemplateConfig | None = None
) -> Pipeline:
    """Raises CheckpointError, WorkspaceError, ConfigError."""
    with open_model(model_path, options) as files:
        tokenizer = TextTokenizer.load(files.tokenizer)
        prompt_format = choose_format(
            tokenizer, config=chat_template, template_name=options.model_name, guessed_name=files.template_name
        )
        return Pipeline(EngineThread(load_engine(files, options)), tokenizer, prompt_format)
