"""Compiles kernel variants into triton's cache: launches that are not made tell which ones, and each is compiled once.

    with gathered() as variants:        every launch that would compile is noted, and nothing is launched
        ...                             steps of a runner, over whatever numbers
    compile_all(variants, 14)           forked processes take one after the other, the longest first

Compiling needs no GPU. The processes are forked from the one that gathered: they have everything imported, take no memory of its GPU, and
call nothing of CUDA. The place where a launch turns to compilation is triton's own affair (`JITFunction._do_compile`, alike in 3.6, 3.7 and
3.9); a release that has no such place, or calls it otherwise, raises.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from turbotriton.contract.errors import ServerError

from .compiled import read_triton

__all__ = ["Variant", "compile_all", "gathered"]

INDEX_BYTES = 4
MAX_VARIANTS = 65536 // INDEX_BYTES  # as many as a pipe holds


class Variant(NamedTuple):
    """What `triton.compile` takes for one launch."""

    source: Any
    target: Any
    options: dict[str, Any]

    @property
    def length(self) -> tuple[bool, int]:
        """Rises as time to compile does, roughly: Gluon's inner functions are long, else the kernel's own source says it."""
        return self.source.fn.is_gluon(), len(self.source.fn.src)

    def compile(self) -> None:
        """Into the cache, with the launcher in C of its signature where this triton makes such."""
        kernel = triton.compile(self.source, target=self.target, options=self.options)
        driver.active.launcher_cls(kernel.src, kernel.metadata)


class _Zeros(TorchFunctionMode):
    """Memory that nobody has written is zeros: what kernels would have written may be ids, which others read as such."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like}.get(func, func)
        return made(*args, **(kwargs or {}))


@contextmanager
def gathered() -> Iterator[list[Variant]]:
    """What this thread's launches within would compile, in their order and without repetition. Other threads must not launch meanwhile."""
    variants: dict[tuple[int, str], Variant] = {}
    found: list[Variant] = []
    own = JITFunction._do_compile

    def note(self: Any, key: str, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: bool) -> None:
        if (id(self), key) not in variants:
            target = self.device_caches[device][2]
            variant = Variant(self.ASTSource(self, signature, constexprs, attrs), target, dict(options.__dict__))
            variants[id(self), key] = variant
            found.append(variant)

    JITFunction._do_compile = note
    try:
        with _Zeros():
            yield found
    finally:
        JITFunction._do_compile = own


def compile_all(variants: Sequence[Variant], num_processes: int, note_done: Callable[[], None] = lambda: None) -> None:
    """Returns when all are compiled. note_done: called in the forked processes, after each variant.

    Raises ServerError when one could not be compiled, after the others were; the reason is on stderr.
    """
    assert len(variants) <= MAX_VARIANTS, f"{len(variants)} variants"
    read_triton()  # once, for all that are forked
    todo = sorted(range(len(variants)), key=lambda index: variants[index].length, reverse=True)
    reads, writes = os.pipe()  # whoever reads an index has it: so few bytes are never divided among readers
    os.write(writes, b"".join(index.to_bytes(INDEX_BYTES, "little") for index in todo))
    os.close(writes)
    sys.stdout.flush()
    sys.stderr.flush()
    processes = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: CUDA's, which what is forked never meets
            for _ in range(min(num_processes, len(todo))):
                pid = os.fork()
                if pid == 0:
                    _compile_and_exit(reads, variants, note_done)
                processes.append(pid)
    finally:
        os.close(reads)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]
    if any(codes):
        raise ServerError(f"processes that compile kernels ended with codes {codes}; what they said stands above")


def _compile_and_exit(reads: int, variants: Sequence[Variant], note_done: Callable[[], None]) -> None:
    """Never returns."""
    code = 1
    try:
        failed = False
        while index := os.read(reads, INDEX_BYTES):
            variant = variants[int.from_bytes(index, "little")]
            driver.active.get_current_target = lambda variant=variant: variant.target  # kernels may ask, which asked CUDA
            try:
                variant.compile()
            except Exception:  # noqa: BLE001  of the compiler: the other variants can be had
                traceback.print_exc()
                failed = True
            note_done()
        code = int(failed)
    except BaseException:  # noqa: BLE001  nothing may run what the parent's frames would do next
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
