"""A launch that is known by its key is the launch that triton makes: the same compiled kernel, grid, stream and arguments.

Of kernels made for these tests; launch_recorder.py says how it is seen without a GPU.
"""

import gc
import weakref

import pytest
import torch
import triton
import triton.language as tl
from tests.backend.ops.launch_recorder import assert_same, recorded_launches
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turbotriton.backend.ops.kernels import fast_launch
from turbotriton.backend.ops.kernels.fast_launch import Tiles, forget_launches, launch

ONE = tl.constexpr(1)
BF16, FP16 = torch.bfloat16, torch.float16


@triton.jit(do_not_specialize=["free"])
def _probe_kernel(x_ptr, y_ptr, size, free, scale, HAS_Y: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * size, mask=offs < free).to(tl.float32) * scale
    if HAS_Y:
        x += tl.load(y_ptr + offs) * ONE
    tl.store(x_ptr + offs, x)


@triton.jit(do_not_specialize=["free"])
def _other_kernel(x_ptr, y_ptr, size, free, scale, HAS_Y: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), scale)


@triton.jit
def _tiles_kernel(x_desc, out_ptr, num_rows, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = x_desc.load([num_rows - BLOCK, 0])
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], tile)


@gluon.jit
def _layout_kernel(x_desc, out_ptr, BLOCK: gl.constexpr):
    tile = gl.allocate_shared_memory(x_desc.dtype, [BLOCK, BLOCK], x_desc.layout)
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    offs = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))[None, :]
    offs += gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))[:, None] * BLOCK
    gl.store(out_ptr + offs, tile.load(layout))


@pytest.fixture
def launched(monkeypatch):
    with recorded_launches(monkeypatch) as launches:
        yield launches


def test_what_triton_specialises_for_is_told_apart(launched, monkeypatch):
    whole = torch.zeros(4096)
    tensors = [whole, whole.to(FP16), whole.to(BF16), whole[1:], whole.to(FP16)[1:], whole.to(FP16)[8:]]
    cases = [(x, None, 16, 5, 0.5, 4) for x in tensors]
    cases += [
        (whole, None, size, 5, 0.5, 4) for size in (0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**40, -16, -(2**31), -(2**31) - 1)
    ]
    cases += [(whole, None, 16, free, 0.5, 4) for free in (1, 16, 2**40)]
    cases += [(whole, None, 16, 5, scale, 4) for scale in (1, 1.0, 2, 2.0, True)]
    cases += [(whole, y, 16, 5, 0.5, 4) for y in (whole, whole[1:], whole.to(FP16))]
    cases += [(whole, None, 16, 5, 0.5, 8)]

    def run(x, y, size, free, scale, num_warps, block=64):
        options = {"HAS_Y": y is not None, "BLOCK": block, "num_warps": num_warps}
        launch(_probe_kernel, (3,), x, y, size, free, scale, **options)

    assert_same(launched, monkeypatch, [lambda case=case: run(*case) for case in (*cases, (*cases[0], 128))])
    compiled = {known.kept[1].function for known in fast_launch._known.values()}
    assert len(compiled) == len(_probe_kernel.device_caches[launched.driver.get_current_device()][0])


def test_other_numbers_of_the_same_kind_are_known(launched, monkeypatch):
    x = torch.zeros(4096)

    def run(size, free, scale):
        launch(_probe_kernel, (3,), x, None, size, free, scale, HAS_Y=False, BLOCK=64)

    run(17, 5, 0.5)
    cases = [(19, 5, 0.5), (8191, 6, 0.25), (2, 7, -1.0)]
    assert_same(launched, monkeypatch, [lambda case=case: run(*case) for case in cases])
    assert len(fast_launch._known) == 1


@pytest.mark.parametrize("grid", [(5,), (5, 6), (5, 6, 7)])
def test_grid_and_stream_are_those_of_the_launch(launched, monkeypatch, grid):
    x = torch.zeros(64)
    launch(_probe_kernel, (1,), x, None, 16, 5, 0.5, HAS_Y=False, BLOCK=64)
    launched.driver.stream = 9
    assert_same(launched, monkeypatch, [lambda: launch(_probe_kernel, grid, x, None, 16, 5, 0.5, HAS_Y=False, BLOCK=64)])
    assert launched.all[-1][:4] == (*grid, *(1, 1, 1)[len(grid) :], 9)


def test_kernel_and_options_belong_to_the_key(launched, monkeypatch):
    x = torch.zeros(64)
    options = ({}, {"launch_pdl": True}, {"launch_cooperative_grid": True}, {"launch_pdl": False}, {"maxnreg": 64})
    runs = [
        lambda kernel=kernel, each=each: launch(kernel, (1,), x, None, 16, 5, 0.5, HAS_Y=False, BLOCK=64, **each)
        for kernel in (_probe_kernel, _other_kernel)
        for each in options
    ]
    assert_same(launched, monkeypatch, runs)


def test_descriptors_follow_shape_strides_dtype_and_tile(launched, monkeypatch):
    whole = torch.zeros(256, 128, dtype=FP16)
    bases = [whole, whole[:100], whole[4:], whole[:, :64], whole.to(BF16), whole.view(128, 256)]
    bases += [whole[:64, :64], whole.flatten()[:4096].view(64, 64)]
    out = torch.zeros(4096, dtype=FP16)
    runs = [
        lambda x=base, block=block: launch(_tiles_kernel, (1,), Tiles(x, (block, block)), out, x.shape[0], BLOCK=block)
        for base in bases
        for block in (32, 64)
    ]
    assert_same(launched, monkeypatch, runs)


def test_descriptors_follow_tile_and_layout_of_gluon(launched, monkeypatch):
    x, out = torch.zeros(64, 64, dtype=FP16), torch.zeros(4096, dtype=FP16)
    layouts = [gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=16, rank=2) for width in (0, 64, 128)]
    runs = [
        lambda tile=tile, layout=layout: launch(_layout_kernel, (1,), Tiles(x, tile, layout), out, BLOCK=64)
        for tile in ((64, 64), (32, 64), (128, 64))
        for layout in layouts
    ]
    assert_same(launched, monkeypatch, runs)


def test_a_descriptor_is_made_once_and_holds_no_tensor(launched):
    def run(x):
        launch(_tiles_kernel, (1,), Tiles(x, (32, 32)), out, 64, BLOCK=32)

    x, out = torch.zeros(64, 64, dtype=FP16), torch.zeros(1024, dtype=FP16)
    run(x)  # plainly
    before = launched.driver.num_descriptors
    for _ in range(3):
        run(x)
    assert launched.driver.num_descriptors == before + 1
    dead = weakref.ref(x)
    launched.all.clear()
    del x
    gc.collect()
    assert dead() is None


def test_what_is_kept_is_bounded(launched, monkeypatch):
    monkeypatch.setattr(fast_launch, "MAX_LAUNCHES", 3)
    monkeypatch.setattr(fast_launch, "MAX_DESCRIPTORS", 2)
    x, out = torch.zeros(128, 64, dtype=FP16), torch.zeros(1024, dtype=FP16)
    for num_rows in range(32, 64):
        for _ in range(2):
            launch(_tiles_kernel, (1,), Tiles(x[:num_rows], (32, 32)), out, num_rows, BLOCK=32)
            assert launched.all[-1][0] == 1
        assert len(fast_launch._known) <= 3
    assert all(len(made) <= 2 for made in fast_launch._descriptors.values())


@pytest.mark.parametrize("chain", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_every_launch(launched, chain):
    seen = []
    x = torch.zeros(64)

    def run():
        launch(_probe_kernel, (1,), x, None, 16, 5, 0.5, HAS_Y=False, BLOCK=64)

    def given():
        return [each for each in launched.all[-1] if isinstance(each, triton.knobs.HookChain)]

    run()
    run()
    assert not given()
    hooks = getattr(triton.knobs.runtime, chain)
    hooks.add(seen.append)
    try:
        run()
        assert hooks in given()
    finally:
        hooks.remove(seen.append)
    run()
    assert not given()


def test_a_hook_of_the_kernel_sees_every_launch(launched):
    seen = []
    x = torch.zeros(64)

    def hook(*args, **kwargs):
        seen.append(args)

    for _ in range(2):
        launch(_probe_kernel, (1,), x, None, 16, 5, 0.5, HAS_Y=False, BLOCK=64)
    _probe_kernel.add_pre_run_hook(hook)
    try:
        launch(_probe_kernel, (1,), x, None, 16, 5, 0.5, HAS_Y=False, BLOCK=64)
    finally:
        _probe_kernel.pre_run_hooks.remove(hook)
    assert len(seen) == 1


def test_debugging_compiles_its_own_kernel(launched, monkeypatch):
    x = torch.zeros(64)
    for is_debugging in (False, False, True, False):
        monkeypatch.setattr(triton.knobs.runtime, "debug", is_debugging)
        launch(_probe_kernel, (1,), x, None, 16, 5, 0.5, HAS_Y=False, BLOCK=64)
    functions = [args[4] for args in launched.all]
    assert functions[0] == functions[1] == functions[3] != functions[2]


def test_a_changed_global_is_found_once_launches_are_forgotten(launched, monkeypatch):
    x = torch.zeros(64)

    def run():
        launch(_probe_kernel, (1,), x, x, 16, 5, 0.5, HAS_Y=True, BLOCK=64)

    run()
    monkeypatch.setitem(_probe_kernel.__globals__, "ONE", tl.constexpr(2))
    run()
    forget_launches()
    with pytest.raises(RuntimeError, match="Global variable ONE has changed"):
        run()


def test_what_is_no_kernel_of_triton_gets_descriptors():
    given = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: given.append((grid, args, kwargs))

    x = torch.zeros(64, 64)
    launch(Recorder(), (2,), Tiles(x, (32, 32)), 5, BLOCK=32)
    ((grid, (descriptor, number), options),) = given
    assert (grid, number, options) == ((2,), 5, {"BLOCK": 32})
    assert descriptor.base is x
    assert descriptor.block_shape == [32, 32]
