"""Where triton keeps what it has compiled, and which triton that is."""

from pathlib import Path

import triton

__all__ = ["cache_folder", "triton_version"]

triton_version: str = triton.__version__


def cache_folder() -> Path:
    """TRITON_CACHE_DIR, else what triton takes; shared by all processes of a user."""
    return Path(triton.knobs.cache.dir)
