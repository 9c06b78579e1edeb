"""Reads checkpoints tensor by tensor: Hugging Face safetensors and .bin, Meta .pth. Knows file formats, no architecture."""

from .base import Source, TensorInfo
from .folder import open_source
from .meta import MetaSource

__all__ = ["MetaSource", "Source", "TensorInfo", "open_source"]
