"""Where triton keeps what it has compiled, and which triton that is."""

from pathlib import Path

import triton
from triton.runtime.cache import triton_key

__all__ = ["cache_folder", "read_triton", "triton_version"]

triton_version: str = triton.__version__


def cache_folder() -> Path:
    """TRITON_CACHE_DIR, else what triton takes; shared by all processes of a user."""
    return Path(triton.knobs.cache.dir)


def read_triton() -> None:
    """Has triton hash itself, 400 MB, which its first look into the cache waits for: 0.3 s once a process, mostly beside Python."""
    triton_key()
