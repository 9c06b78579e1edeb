"""Runs a Gluon kernel of a Hopper chip on the CPU, since triton's interpreter takes no Gluon: what its barriers, rings and waits allow.

`emulate(module, monkeypatch, seed)` puts plain Python in the place of the module's Gluon functions and of the launch. Each partition of
`warp_specialize` is a thread, tensors are torch's, layouts are nothing, numbers are rounded where the kernel rounds them. What a device may
do at any time is done at a random one, so that a missing wait shows up as NaN, as an assertion or as partitions that all wait for ever:

    a tile's copy       its destination is NaN from the request until it lands, mostly when every partition waits for something
    a matrix product    reads its operands when it is issued or when it is waited for; its result is no tensor before that, but another
                        product may add to it
    a tile's store      reads its source when it is issued or when it is waited for
    a copy by threads   as a tile's, but it lands when its group is waited for or at a wait before

Programs of a launch run at once and meet at atomic additions. With programmatic launch (PDL) each partition waits for the kernel before
this one before it touches memory, but for what `emulate` is told of. It knows one block of threads a partition: no warps, no lanes, no
registers, no proxies of memory and no fences. Those are read in PTX. `plant` puts a mistake into a kernel, for a test that the emulation
finds it.
"""

import inspect
import math
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.backend.ops import inline_assembly
from triton.runtime.jit import JITFunction

LANDS_BY_ITSELF = 0.1  # a copy, at any wait or arrival
BYTE_NOT_THERE = -52  # of integers; floats are NaN


def fill_as_not_there(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.view(torch.int8).fill_(BYTE_NOT_THERE)
    return tensor


class Pointer:
    """flat: the memory from element 0 on; offsets: an int or a tensor of ints; is_early: no other kernel writes there."""

    def __init__(self, flat: torch.Tensor, offsets: Any = 0, *, is_early: bool = False) -> None:
        self.flat, self.offsets, self.is_early = flat, offsets, is_early

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.flat, self.offsets + more, is_early=self.is_early)

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.flat.dtype)


class Shared:
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, index: Any) -> "Shared":
        assert 0 <= int(index) < self.data.shape[0], f"stage {int(index)} of {self.data.shape[0]}"
        return Shared(self.data[int(index)])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.data.permute(*order))

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return Shared(self.data.narrow(dim, start, length))

    def load(self, layout: Any) -> torch.Tensor:
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        self.data.copy_(value)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were asked for have come."""

    def __init__(self) -> None:
        self.count = self.arrivals = self.num_bytes = self.phase = 0


class Product:
    """A matrix product that was issued; `before`: what it adds to, if anything."""

    def __init__(self, a: Any, b: Shared, before: "torch.Tensor | Product | None") -> None:
        self.operands = a.data if isinstance(a, Shared) else a.clone(), b.data, before
        self.result: torch.Tensor | None = None

    def compute(self) -> torch.Tensor:
        """The products before it come first."""
        if self.result is None:
            left, right, before = self.operands
            start = before.compute() if isinstance(before, Product) else 0 if before is None else before
            is_float = left.is_floating_point()
            self.result = start + (left.float() @ right.float() if is_float else (left.double() @ right.double()).int())
        return self.result


class Launch:
    """What the programs of a launch share besides memory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.has_failed = False


class Device:
    """What the partitions of one program share."""

    def __init__(
        self, seed: int, program: int, num_programs: int, of_launch: Launch, *, num_warps: int, pdl: bool = False
    ) -> None:
        self.random = random.Random(seed)
        self.of_launch = of_launch
        self.program, self.num_programs, self.num_warps = program, num_programs, num_warps
        self.pdl = pdl
        self.changed = threading.Condition(threading.RLock())
        self.local = threading.local()
        self.copies: list[Callable[[], None]] = []
        self.num_running = 0
        self.waiters: dict[int, tuple[Barrier, int]] = {}  # thread: the barrier, the parity of the phase that has to end
        self.failures: list[BaseException] = []

    def products(self) -> list[Product]:
        if not hasattr(self.local, "products"):
            self.local.products = []
        return self.local.products

    def wait_for_previous(self) -> None:
        self.local.has_waited = True

    def touch(self) -> None:
        assert not self.pdl or getattr(self.local, "has_waited", False), "memory is touched before the wait for the kernel before"

    def groups(self) -> list[list[Callable[[], None]]]:
        """Of copies by the threads: those under way, group by group; the last one is not committed yet."""
        if not hasattr(self.local, "groups"):
            self.local.groups = [[]]
        return self.local.groups

    def copy_async(self, target: Shared, source: Pointer, mask: Any = True) -> None:
        """Zeros where the mask is false."""
        if not source.is_early:
            self.touch()
        fill_as_not_there(target.data)

        def copy() -> None:
            target.data.copy_(_load(source, _tensor(mask).expand(target.data.shape), 0).to(target.dtype))

        self.groups()[-1].append(copy)

    def commit_copies(self) -> None:
        self.groups().append([])

    def wait_copies(self, num_outstanding: int) -> None:
        """Others may have come as well."""
        *committed, _open = self.groups()
        due = len(committed) - num_outstanding
        for index, group in enumerate(committed):
            while group and (index < due or self.random.random() < LANDS_BY_ITSELF):
                group.pop()()

    def stores(self) -> list[Callable[[], None]]:
        if not hasattr(self.local, "stores"):
            self.local.stores = []
        return self.local.stores

    def settle(self, barrier: Barrier) -> None:
        if barrier.arrivals == 0 and barrier.num_bytes == 0:
            barrier.phase += 1
            barrier.arrivals = barrier.count

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.arrivals = count

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
        with self.changed:
            if pred:
                assert barrier.arrivals >= count, "more arrivals than a phase takes"
                barrier.arrivals -= count
                self.settle(barrier)
                self.land(LANDS_BY_ITSELF)

    def expect(self, barrier: Barrier, num_bytes: int) -> None:
        with self.changed:
            barrier.num_bytes += num_bytes
            self.arrive(barrier)

    def wait(self, barrier: Barrier, parity: Any, pred: Any = True) -> None:
        """As the instruction: until the phase of that parity is over."""
        if not pred:
            return
        me = threading.get_ident()
        with self.changed:
            self.waiters[me] = barrier, int(parity)
            self.land(LANDS_BY_ITSELF)
            while barrier.phase & 1 == int(parity):
                if self.failures:
                    raise RuntimeError("another partition has failed")
                if len(self.waiters) == self.num_running and all(b.phase & 1 == p for b, p in self.waiters.values()):
                    assert self.copies, "every partition waits for ever"
                    self.land(1.0)
                else:
                    self.changed.wait(0.1)
            del self.waiters[me]

    def land(self, probability: float) -> None:
        if self.copies and self.random.random() < probability:
            self.copies.pop(self.random.randrange(len(self.copies)))()
        self.changed.notify_all()

    def load_tile(self, descriptor: Any, coordinates: Sequence[Any], barrier: Barrier, target: Shared) -> None:
        base, begins = descriptor.base, list(map(int, coordinates))
        is_read = all(begin < size for begin, size in zip(begins, base.shape, strict=True))
        if is_read and not descriptor.is_early:
            self.touch()
        assert target.data.numel() == math.prod(descriptor.block_shape)
        fill_as_not_there(target.data)

        def copy() -> None:
            tile = base[tuple(slice(begin, begin + size) for begin, size in zip(begins, descriptor.block_shape, strict=True))]
            lacking = [size - there for size, there in zip(descriptor.block_shape, tile.shape, strict=True)]
            padding = [each for size in reversed(lacking) for each in (0, size)]
            target.data.copy_(torch.nn.functional.pad(tile, padding).view(target.data.shape))  # zeros past the end
            barrier.num_bytes -= target.data.numel() * target.data.element_size()
            self.settle(barrier)

        with self.changed:
            self.copies.append(copy)
            self.changed.notify_all()

    def store_tile(self, descriptor: Any, coordinates: Sequence[Any], source: Shared) -> None:
        """What lies outside of the tensor is not written."""
        target = descriptor.base[_box(coordinates, source)]

        def copy() -> None:
            target.copy_(source.data[tuple(map(slice, target.shape))])

        if self.random.random() < 0.5:
            copy()
        else:
            self.stores().append(copy)

    def wait_stores(self, num_outstanding: int) -> None:
        assert num_outstanding == 0
        while self.stores():
            self.stores().pop(0)()

    def multiply(self, a: Any, b: Shared, acc: torch.Tensor | Product, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        product = Product(a, b, (acc if isinstance(acc, Product) else acc.clone()) if use_acc else None)
        if self.random.random() < 0.5:
            product.compute()
        self.products().append(product)
        return product

    def wait_products(self, num_outstanding: int, deps: Sequence[Product | torch.Tensor]) -> Any:
        products = self.products()
        while len(products) > num_outstanding:
            products.pop(0).compute()
        results = [dep.compute() if isinstance(dep, Product) and dep not in products else dep for dep in deps]
        return results[0] if len(results) == 1 else tuple(results)

    def atomic_add(self, pointer: Pointer, value: Any, sem: str) -> torch.Tensor:
        if self.random.random() < 0.5:
            time.sleep(0.0005)
        with self.of_launch.lock:
            if self.of_launch.has_failed:
                raise RuntimeError("another program has failed")
            before = pointer.flat[int(pointer.offsets)].clone()
            pointer.flat[int(pointer.offsets)] += value
        return before

    def specialize(
        self, partitions: Sequence[tuple[Callable, tuple]], num_warps: Sequence[int], registers: Sequence[int]
    ) -> None:
        def run(function: Callable, args: tuple) -> None:
            try:
                function(*args)
                assert not self.products(), "a product is never waited for"
                assert not self.stores(), "a store is never waited for"
            except BaseException as error:  # noqa: BLE001 (raised again by the thread that started this one)
                self.of_launch.has_failed = True
                with self.changed:
                    self.failures.append(error)
            with self.changed:
                self.num_running -= 1
                self.changed.notify_all()

        self.num_running = len(partitions)
        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]
        assert not self.copies, "a tile is never waited for"


def _box(coordinates: Sequence[Any], tile: Shared) -> tuple[slice, ...]:
    assert len(coordinates) == tile.data.dim()
    return tuple(slice(int(start), int(start) + size) for start, size in zip(coordinates, tile.data.shape, strict=True))


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


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _load(pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "") -> torch.Tensor:
    offsets = _tensor(pointer.offsets).long()
    if mask is None:
        return pointer.flat[offsets]
    mask = _tensor(mask)
    return torch.where(mask, pointer.flat[torch.where(mask, offsets, 0)], other)


def _store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    value = _tensor(value).to(pointer.flat.dtype)
    mask = _tensor(mask).expand(value.shape)
    pointer.flat[_tensor(pointer.offsets).expand(value.shape)[mask].long()] = value[mask]


def _language(device: Device) -> types.SimpleNamespace:
    def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if dtype is torch.int64:
            barriers = [Barrier() for _ in range(shape[0])]
            return barriers[0] if len(shape) == 1 else types.SimpleNamespace(index=lambda index: barriers[int(index)])
        return Shared(fill_as_not_there(torch.zeros(tuple(shape), dtype=dtype)))

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
        load=touching(_load),
        store=touching(_store),
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
        where=lambda condition, a, b: torch.where(_tensor(condition), a, b),
        minimum=lambda a, b: torch.minimum(_tensor(a), _tensor(b)),
        maximum=lambda a, b: torch.maximum(_tensor(a), _tensor(b)),
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
                of_launch, failures = Launch(), []

                def run(program: int) -> None:
                    try:
                        device = Device(seed + program, program, grid[0], of_launch, num_warps=num_warps, pdl=launch_pdl)
                        _as_python(vars(module) | {kernel: original}, device)[kernel](**values)
                        assert not any(device.groups()), "a copy is never waited for"
                    except BaseException as error:  # noqa: BLE001 (raised again by the thread that launched)
                        of_launch.has_failed = True
                        failures.append(error)

                programs = [threading.Thread(target=run, args=(program,)) for program in range(grid[0])]
                for program in programs:
                    program.start()
                for program in programs:
                    program.join()
                if failures:
                    raise failures[0]

            return launch

    monkeypatch.setattr(module, kernel, Launcher())
