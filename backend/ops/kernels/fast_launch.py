"""kernel[grid](*args, **options) for a fraction of the host's time, where the same kernel was launched in the same way before.

Triton finds out at each launch which of a kernel's compiled forms its arguments want, checks the globals that the kernel reads and makes
every tile descriptor anew, which is most of what a launch costs the host. A step launches the same few kernels in every layer. So

    first time    launch it as triton does, and keep what it launched by a key of all that chooses the compiled form
    again         the key is known: hand this launch's addresses and numbers to triton's launcher in C

The key has everything that triton specialises for: each tensor's dtype and whether its address is a multiple of 16, whether an integer is
1, a multiple of 16, longer than 31 or 63 bits, the types of other numbers, which arguments are None, dtype, tile and layout of each
descriptor, every constexpr and option by name, the kernel, the device. What is not in it makes launches plain while it is there: hooks,
and triton's debugging. So a step of a number of tokens that never was has known launches, too.

A descriptor in the form that the chip reads follows from address, shape, strides, dtype, tile and layout alone. It is kept by them, so
weights have theirs made once, and nothing here holds a tensor.

Plain as well: kernels that are no triton kernels (the interpreter's, tests' own), kernels that want scratch memory, and releases of triton
whose launcher nobody has read yet.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import chosen

__all__ = ["Tiles", "forget_launches", "launch"]

#: Releases whose launcher takes its arguments one by one, and those whose launcher takes them as one tuple.
ONE_BY_ONE, AS_TUPLE = ("3.6.",), ("3.7.", "3.9.")
MAX_LAUNCHES, MAX_DESCRIPTORS = 4096, 16384  # kept; more of them: from the beginning


class Tiles(NamedTuple):
    """What a descriptor is made of: `base` in tiles of `block_shape`; `layout`: Gluon's, a constant of a module, or None in triton."""

    base: torch.Tensor
    block_shape: tuple[int, ...]
    layout: Any = None

    def descriptor(self) -> Any:
        if self.layout is None:
            return TensorDescriptor.from_tensor(self.base, list(self.block_shape))
        return GluonDescriptor.from_tensor(self.base, list(self.block_shape), self.layout)


class _Known(NamedTuple):
    """A launch but for its grid, its stream and its values. Holds what the key names by its id."""

    call: Callable[..., None]
    head: tuple[Any, ...]  # what triton's launcher takes between the stream and the kernel's arguments
    constants: tuple[Any, ...]  # the constexprs, which follow the values
    descriptors: tuple[tuple[dict[Any, list[Any]], Callable[[Any], list[Any]]], ...]  # of each: those made, and how to make one
    kept: tuple[Any, ...]


_known: dict[tuple[Any, ...], _Known | None] = {}  # None: launched plainly
_descriptors: dict[str, dict[Any, list[Any]]] = {}


def forget_launches() -> None:
    """After a change of what nobody expects to change: a global that a kernel or a choice of tiles reads, triton's driver."""
    _known.clear()
    _descriptors.clear()
    chosen.cache_clear()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch on the current device and stream.

    args: for the kernel's parameters that are no constexprs, in order: tensors, Tiles, numbers, None
    options: its constexprs, num_warps and the like
    """
    if type(kernel) not in TAKEN or kernel.pre_run_hooks or _is_watched():
        kernel[grid](*map(_plain, args), **options)
        return
    active = driver.active
    device = active.get_current_device()
    chosen_by: list[Any] = [id(kernel), device]
    values: list[Any] = []
    tiles = []
    for arg in args:
        kind = type(arg)
        if kind is torch.Tensor:
            address = arg.data_ptr()
            chosen_by.append((arg.dtype,) if address & 15 else arg.dtype)
            values.append(address)
        elif kind is int:
            magnitude = arg if arg >= 0 else ~arg
            chosen_by.append(1 if arg == 1 else 2 + (arg & 15 == 0) + (magnitude.bit_length() >> 5 << 1))
            values.append(arg)
        elif arg is None:
            chosen_by.append(None)
            values.append(None)
        elif kind is Tiles:
            base, block_shape, layout = arg
            chosen_by += Tiles, base.dtype, block_shape, id(layout)
            tiles.append((len(values), (base.data_ptr(), base.shape, base.stride()), arg))
            values.append(None)
        elif kind is float or kind is bool:
            chosen_by.append(kind)
            values.append(arg)
        else:
            kernel[grid](*map(_plain, args), **options)
            return
    chosen_by += options
    chosen_by += options.values()
    key = tuple(chosen_by)
    known = _known.get(key)
    if known is None:
        compiled = kernel[grid](*map(_plain, args), **options)
        if key not in _known:
            if len(_known) >= MAX_LAUNCHES:
                _known.clear()
            _known[key] = _prepared(kernel, compiled, args, options)
        return
    call, head, constants, descriptors, _kept = known
    for index in range(len(tiles) - 1, -1, -1):  # from the last, since each takes several places
        place, geometry, tile = tiles[index]
        made, make = descriptors[index]
        parts = made.get(geometry)
        if parts is None:
            if len(made) >= MAX_DESCRIPTORS:
                made.clear()
            made[geometry] = parts = make(tile.descriptor())
        values[place : place + 1] = parts
    num_dims = len(grid)
    x, y, z = grid[0], grid[1] if num_dims > 1 else 1, grid[2] if num_dims > 2 else 1
    stream = active.get_current_stream(device)
    if _IS_ONE_BY_ONE:
        call(x, y, z, stream, *head, *values, *constants)
    else:
        call(x, y, z, stream, *head, (*values, *constants))


def _plain(arg: Any) -> Any:
    return arg.descriptor() if type(arg) is Tiles else arg


def _is_watched() -> bool:
    """Whether someone wants to see every launch, or kernels that check themselves."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return enter is not _ENTER or enter.calls or leave is not _EXIT or leave.calls or runtime.debug


def _prepared(kernel: Any, compiled: Any, args: tuple[Any, ...], options: dict[str, Any]) -> _Known | None:
    """What the launch that gave `compiled` comes to, or None where it is not quite as this module takes it."""
    params = kernel.params
    if type(compiled) is not CompiledKernel or knobs.compilation.instrumentation_mode:
        return None
    launcher = compiled.run
    if type(launcher) is not nvidia.CudaLauncher or launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    is_split = [param.is_constexpr for param in params] == [index >= len(args) for index in range(len(params))]
    constants = [param.name for param in params[len(args) :]]
    if not is_split or not all(name in options for name in constants) or getattr(launcher, "gsan_enabled", False):
        return None
    signature = compiled.src.signature
    types = [signature[param.name] for param, arg in zip(params, args, strict=False) if type(arg) is Tiles]
    metas = list(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    if len(types) != len(metas) or None in metas:
        return None
    call, head = launcher.launch, (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    if _IS_ONE_BY_ONE:
        if types:
            call = inspect.getclosurevars(call).nonlocals["launcher"]  # what is below the making of descriptors
        head += (None, None, compiled.packed_metadata, None, None, None)
    else:
        call = driver.active.utils.launch
        head += (compiled.packed_metadata, None, None, None, None, None, launcher.arg_annotations, launcher.kernel_signature)
    descriptors = tuple(
        (_descriptors.setdefault(repr(sorted(meta.items())), {}), _maker(kind, meta))
        for kind, meta in zip(types, metas, strict=True)
    )
    layouts = [arg.layout for arg in args if type(arg) is Tiles]
    return _Known(call, head, tuple(options[name] for name in constants), descriptors, (kernel, compiled, layouts))


def _maker(kind: str, meta: Any) -> Callable[[Any], list[Any]]:
    """From a descriptor as the kernel's author writes it to what triton's launcher takes in its place: by triton's own code."""

    def collect(*found: Any) -> Any:
        return found

    expand = nvidia.wrap_handle_tensordesc(collect, {0: kind}, [meta])
    if _IS_ONE_BY_ONE:
        before = (None,) * nvidia._BASE_ARGS_FORMAT_LEN
        return lambda descriptor: list(expand(*before, descriptor)[len(before) :])
    return lambda descriptor: list(expand((descriptor,))[0])


_ENTER, _EXIT = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook  # chains, empty unless someone watches
_IS_ONE_BY_ONE = triton.__version__.startswith(ONE_BY_ONE)
TAKEN = (JITFunction, GluonJITFunction) if _IS_ONE_BY_ONE or triton.__version__.startswith(AS_TUPLE) else ()
