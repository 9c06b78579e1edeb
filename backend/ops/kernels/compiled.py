"""What triton's cache of compiled kernels asks of a process."""

import sys

from triton.runtime.cache import triton_key
from triton.runtime.jit import JITCallable

__all__ = ["name_kernels", "read_triton"]


def read_triton() -> None:
    """Has triton hash itself, 400 MB, which its first look into the cache waits for: 0.3 s once a process, mostly beside Python."""
    triton_key()


def name_kernels() -> dict[str, str]:
    """Has triton find the key of each of these kernels that are imported, in one order, and returns them by name: 0.1 s.

    In triton 3.6 the key of a kernel that calls another function holds that function's constants only where the function's own key is known
    already. Processes that launch kernels in another order would not find each other's in the cache.
    """
    modules = sorted(name for name in sys.modules if name.startswith(f"{__package__}."))
    values = {f"{module}.{name}": value for module in modules for name, value in sorted(vars(sys.modules[module]).items())}
    return {name: value.cache_key for name, value in values.items() if isinstance(value, JITCallable)}
