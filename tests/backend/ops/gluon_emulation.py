"""Runs a Gluon kernel of a Hopper chip on the CPU, since triton's interpreter takes no Gluon: what its barriers, rings and waits allow.

`emulate(module, monkeypatch, seed)` puts plain Python in the place of the module's Gluon functions and of the launch. Each partition of
`warp_specialize` is a thread, tensors are torch's, layouts are nothing, numbers are rounded where the kernel rounds them. Memory, barriers,
copies and matrix products are those of gluon_device.py, which does at a random time what a device may do at any.

It knows one block of threads a partition: no warps, no lanes, no registers, no proxies of memory and no fences. Those are read in PTX.
`plant` puts a mistake into a kernel, for a test that the emulation finds it (`shows_a_mistake`).
"""

import inspect
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.backend.ops import inline_assembly
from tests.backend.ops.gluon_device import Device, Failures, Launch, Pointer, allocate, as_tensor, load, store
from triton.runtime.jit import JITFunction

from turbotriton.backend.ops.kernels.split_sum import workspace


def _halves(words: torch.Tensor, dtype: torch.dtype, *, high: bool) -> torch.Tensor:
    return (words >> (16 if high else 0)).to(torch.int16).view(dtype).float()


def _word(low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    low, high = (value.to(dtype).view(torch.int16).int() for value in (low, high))
    return high << 16 | low & 0xFFFF


ASSEMBLY: dict[str, Callable[..., torch.Tensor]] = {
    "ex2.approx.ftz.f32 $0, $1": torch.exp2,
    "rcp.approx.ftz.f32 $0, $1": torch.reciprocal,
    "cvt.rn.bf16x2.f32 $0, $2, $1": lambda low, high: _word(low, high, torch.bfloat16),
    "cvt.rn.f16x2.f32 $0, $2, $1": lambda low, high: _word(low, high, torch.float16),
    "shl.b32 $0, $1, 16": lambda words: _halves(words, torch.bfloat16, high=False),
    "and.b32 $0, $1, 0xffff0000": lambda words: _halves(words, torch.bfloat16, high=True),
    "cvt.f32.f16 $0, low": lambda words: _halves(words, torch.float16, high=False),
    "cvt.f32.f16 $0, high": lambda words: _halves(words, torch.float16, high=True),
}


def _inline_assembly(asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    if not is_pure:  # a hint to the memory or to the compiler
        return args[0]
    if "mov.b32 {$0, high}, $1" in asm or "mov.b32 {low, $0}, $1" in asm:
        return _halves(args[0], dtype, high="{low, $0}" in asm).to(dtype)
    found = [function for text, function in ASSEMBLY.items() if text in asm]
    if len(found) == 1:
        return found[0](*args)
    dtypes = list(dtype) if isinstance(dtype, tuple) else [dtype]
    words = [arg.expand(args[0].shape).contiguous().view(torch.int32).numpy() for arg in args]
    arrays = inline_assembly.run(asm, words, [np.dtype(f"int{8 * each.itemsize}") for each in dtypes], pack)
    results = [torch.from_numpy(array).view(each) for array, each in zip(arrays, dtypes, strict=True)]
    return tuple(results) if isinstance(dtype, tuple) else results[0]


def _language(device: Device) -> types.SimpleNamespace:
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def touching(function: Callable[..., Any]) -> Callable[..., Any]:
        def touch(pointer: Pointer, *args: Any, **kwargs: Any) -> Any:
            if not pointer.is_early:
                device.touch()
            return function(pointer, *args, **kwargs)

        return touch

    return types.SimpleNamespace(
        constexpr=None,
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
        bfloat16=torch.bfloat16,
        float16=torch.float16,
        NVMMADistributedLayout=nothing,
        BlockedLayout=nothing,
        SwizzledSharedLayout=nothing,
        SliceLayout=nothing,
        DotOperandLayout=nothing,
        DistributedLinearLayout=nothing,
        program_id=lambda axis: device.program,
        num_programs=lambda axis: device.num_programs,
        num_warps=lambda: device.num_warps,
        static_range=range,
        allocate_shared_memory=allocate,
        warp_specialize=device.specialize,
        load=touching(load),
        store=touching(store),
        atomic_add=touching(device.atomic_add),
        debug_barrier=nothing,
        arange=lambda start, end, layout: torch.arange(start, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        zeros_like=torch.zeros_like,
        convert_layout=lambda value, layout, assert_trivial=False: value,
        reshape=lambda value, shape: value.reshape(shape),
        permute=lambda value, order: value.permute(order),
        split=lambda value: value.unbind(-1),
        expand_dims=lambda value, axis: value.unsqueeze(axis),
        broadcast=torch.broadcast_tensors,
        join=lambda a, b: torch.stack((a, b), dim=-1),
        inline_asm_elementwise=_inline_assembly,
        where=lambda condition, a, b: torch.where(as_tensor(condition), a, b),
        minimum=lambda a, b: torch.minimum(as_tensor(a), as_tensor(b)),
        maximum=lambda a, b: torch.maximum(as_tensor(a), as_tensor(b)),
        max=lambda value, axis: value.amax(axis),
        sum=lambda value, axis: value.sum(axis),
        exp=torch.exp,
        exp2=torch.exp2,
        rsqrt=torch.rsqrt,
    )


def _names_with_owners(module_names: dict[str, Any]) -> dict[str, Any]:
    """And those of the modules that its Gluon functions come from."""
    owners = {value.fn.__module__ for value in module_names.values() if isinstance(value, JITFunction)}
    return {name: value for owner in owners for name, value in vars(sys.modules[owner]).items()} | module_names


def plant(module: types.ModuleType, function: str, changes: Sequence[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes the source of a Gluon function of the module, or of one that it takes from elsewhere.

    changes: what stands there once, and what shall stand there
    """
    target = _names_with_owners(vars(module))[function]
    source = inspect.getsource(target.fn).removeprefix("@gluon.jit\n")
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    names: dict[str, Any] = {}
    exec(source, dict(vars(sys.modules[target.fn.__module__])), names)
    monkeypatch.setattr(target, "fn", names[function])


def shows_a_mistake(attempt: Callable[[int], tuple[torch.Tensor, torch.Tensor]], *, atol: float = 0.01) -> bool:
    """Whether one of 20 seeds finds what was planted: attempt(seed), which gives (result, exact result), fails, or they differ.

    Counters of the workspace, which a mistake may leave as they are, are zero for each of them and for the next test.
    """
    _, counters = workspace(torch.device("cpu"))

    def is_wrong(seed: int) -> bool:
        try:
            out, exact = attempt(seed)
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError):
            return True
        finally:
            counters.zero_()
        return not torch.allclose(out.double(), exact, rtol=0.01, atol=atol)

    return any(map(is_wrong, range(20)))


def _as_python(module_names: dict[str, Any], device: Device) -> dict[str, Any]:
    """The names of a module, its Gluon functions as plain ones that see these names."""
    names = _names_with_owners(module_names)
    for name, value in list(names.items()):
        if isinstance(value, JITFunction):
            names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        elif type(value).__name__ == "constexpr":
            names[name] = value.value
    language = _language(device)

    def multiply_at_once(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
        return acc + a.float() @ b.float()

    names.update(
        gl=language,
        tl=language,  # of functions that triton's own kernels have too
        gdc_launch_dependents=lambda: None,
        gdc_wait=device.wait_for_previous,
        mbarrier=types.SimpleNamespace(
            MBarrierLayout=lambda: None, init=device.init, arrive=device.arrive, expect=device.expect, wait=device.wait
        ),
        copy_async=device.copy_async,
        commit_copies=device.commit_copies,
        wait_copies=device.wait_copies,
        load_tile=device.load_tile,
        store_tile=device.store_tile,
        tma=types.SimpleNamespace(store_wait=device.wait_stores),
        mma_v2=multiply_at_once,
        warpgroup_mma=device.multiply,
        warpgroup_mma_wait=device.wait_products,
        fence_async_shared=lambda: None,
        thread_barrier=lambda: None,
        range=lambda *bounds: (torch.tensor(index) for index in range(*map(int, bounds))),
    )
    return names


def emulate(
    module: types.ModuleType, kernel: str, monkeypatch: pytest.MonkeyPatch, seed: int = 0, early: Sequence[str] = ()
) -> None:
    """The module's `kernel` runs on the CPU when it is launched, all its programs at once.

    early: arguments, descriptors of or pointers to what no other kernel writes
    """

    def argument(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            num_elements = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
            return Pointer(value.as_strided((num_elements,), (1,)))
        if hasattr(value, "base"):
            return types.SimpleNamespace(
                base=value.base, dtype=value.base.dtype, block_shape=value.block_shape, layout=None, is_early=False
            )
        return value

    original = getattr(module, kernel)

    class Launcher:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(*args: Any, num_warps: int, maxnreg: int = 0, launch_pdl: bool = False, **constants: Any) -> None:
                values = dict(zip(original.arg_names, map(argument, args), strict=False)) | constants
                for name in early:
                    if values[name] is not None:
                        values[name].is_early = True
                of_launch = Launch()
                failures = Failures(of_launch)

                def run(program: int) -> None:
                    with failures:
                        device = Device(seed + program, program, grid[0], of_launch, num_warps=num_warps, pdl=launch_pdl)
                        _as_python(vars(module) | {kernel: original}, device)[kernel](**values)
                        assert not any(device.groups()), "a copy is never waited for"

                programs = [threading.Thread(target=run, args=(program,)) for program in range(grid[0])]
                for program in programs:
                    program.start()
                for program in programs:
                    program.join()
                failures.raise_first()

            return launch

    monkeypatch.setattr(module, kernel, Launcher())
