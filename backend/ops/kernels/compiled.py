"""What triton's cache of compiled kernels asks of a process."""

from triton.runtime.cache import triton_key

__all__ = ["read_triton"]


def read_triton() -> None:
    """Has triton hash itself, 400 MB, which its first look into the cache waits for: 0.3 s once a process, mostly beside Python."""
    triton_key()
