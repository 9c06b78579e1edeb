"""The sizes of a model that has not been converted, from its config.json (or params.json) alone: no weights, no tokenizer."""

from pathlib import Path

from turbotriton.contract.errors import CheckpointError

from .archs import META_LLAMA, find_architecture
from .raw_config import CheckpointConfig, ConfigFile

__all__ = ["read_shape"]


def read_shape(folder: Path) -> CheckpointConfig:
    """Raises CheckpointError for a folder without a config or an architecture that cannot be converted."""
    if (folder / "config.json").is_file():
        file = ConfigFile(folder / "config.json")
        arch = find_architecture(file)
    elif (folder / "params.json").is_file():
        file, arch = ConfigFile(folder / "params.json"), META_LLAMA
    else:
        raise CheckpointError(f"{folder}: is no model folder (config.json or params.json) and no workspace")
    config = arch.read_config(file)
    if config.vocab_size < 1 or config.inter_size < 1:
        raise CheckpointError(
            f"{file.path}: does not say vocab_size and the feed-forward size; plan a converted workspace instead"
        )
    return config
