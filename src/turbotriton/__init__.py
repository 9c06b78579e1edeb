"""turbotriton: convert a model, serve it with a stock tritonserver, chat with it."""

__version__ = "0.1.0"

__all__ = ["__version__"]
