"""The device that a Gluon kernel is emulated on: its memory, barriers, copies and matrix products (gluon_emulation.py says what for).

A partition of a program is a thread. What a device may do at any time is done at a random one, so that a missing wait shows up as NaN, as
an assertion or as partitions that all wait for ever:

    a tile's copy       its destination is NaN from the request until it lands, mostly when every partition waits for something
    a matrix product    reads its operands when it is issued or when it is waited for; its result is no tensor before that, but another
                        product may add to it
    a tile's store      reads its source when it is issued or when it is waited for
    a copy by threads   as a tile's, but it lands when its group is waited for or at a wait before

Programs of a launch run at once and meet at atomic additions. With programmatic launch (PDL) each partition waits for the kernel before
this one before it touches memory, but for what `emulate` is told of.
"""

import math
import random
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

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

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
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


class Failures:
    """A context in which threads of a launch fail quietly; whoever waits for them raises what the first one failed with."""

    def __init__(self, of_launch: Launch) -> None:
        self.of_launch = of_launch
        self.errors: list[BaseException] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is not None:
            self.of_launch.has_failed = True
            self.errors.append(error)
        return True

    def raise_first(self) -> None:
        if self.errors:
            raise self.errors[0]


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
        self.failures = Failures(of_launch)

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
            target.data.copy_(load(source, as_tensor(mask).expand(target.data.shape), 0).to(target.dtype))

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
                if self.failures.errors:
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
            with self.failures:
                function(*args)
                assert not self.products(), "a product is never waited for"
                assert not self.stores(), "a store is never waited for"
            with self.changed:
                self.num_running -= 1
                self.changed.notify_all()

        self.num_running = len(partitions)
        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.failures.raise_first()
        assert not self.copies, "a tile is never waited for"


def _box(coordinates: Sequence[Any], tile: Shared) -> tuple[slice, ...]:
    assert len(coordinates) == tile.data.dim()
    return tuple(slice(int(start), int(start) + size) for start, size in zip(coordinates, tile.data.shape, strict=True))


def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if dtype is torch.int64:
        barriers = [Barrier() for _ in range(shape[0])]
        return barriers[0] if len(shape) == 1 else types.SimpleNamespace(index=lambda index: barriers[int(index)])
    return Shared(fill_as_not_there(torch.zeros(tuple(shape), dtype=dtype)))


def as_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def load(pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "") -> torch.Tensor:
    offsets = as_tensor(pointer.offsets).long()
    if mask is None:
        return pointer.flat[offsets]
    mask = as_tensor(mask)
    return torch.where(mask, pointer.flat[torch.where(mask, offsets, 0)], other)


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    value = as_tensor(value).to(pointer.flat.dtype)
    mask = as_tensor(mask).expand(value.shape)
    pointer.flat[as_tensor(pointer.offsets).expand(value.shape)[mask].long()] = value[mask]
