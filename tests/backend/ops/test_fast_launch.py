"""A launch that is known by its key is the launch that triton makes: the same compiled kernel, grid, stream and arguments.

Triton's driver is a stand-in, whose launcher in C writes down what it is given, on a device that no GPU test has. Everything above it is
triton's own: what specialises arguments, the compiler (for sm_90), and what makes descriptors.
"""

import gc
import itertools
import pkgutil
import types
import weakref
from importlib import import_module

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime import driver

from turbotriton.backend.ops import kernels
from turbotriton.backend.ops.kernels import fast_launch
from turbotriton.backend.ops.kernels.fast_launch import Tiles, forget_launches, launch
from turbotriton.backend.ops.operands import Fp8Weight, QuantizedPages, QuantizedRows, StaticInt8Pages, W4A16Tiles, W8A8Weight

DEVICES = itertools.count(1000)  # one a test: triton keeps what it compiled for a device, and its launcher
ONE = tl.constexpr(1)
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


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
    """What triton's launcher in C was given, launch by launch, descriptors as what they were made of."""
    launches, handles, number = [], itertools.count(1), next(DEVICES)

    def record(*args):
        launches.append(args)

    def fill(address, *description):
        device_driver.num_descriptors += 1
        return "descriptor", address, *(tuple(part) if isinstance(part, (list, torch.Size)) else part for part in description)

    device_driver = types.SimpleNamespace(
        num_descriptors=0,
        stream=7,
        launcher_cls=nvidia.CudaLauncher,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: number,
        get_current_stream=lambda device: device_driver.stream,
        utils=types.SimpleNamespace(
            launch=record,
            fill_tma_descriptor=fill,
            fill_tma_descriptor_tiled=fill,
            build_signature_metadata=tuple,
            load_binary=lambda *args: (object(), next(handles), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132},
            unload_module=lambda module: None,
        ),
    )
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: types.SimpleNamespace(launch=record), raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", lambda: [])
    for name in ("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):
        monkeypatch.setattr(nvidia, name, lambda nested_tuple, type: type, raising=False)
    before = driver._active
    driver.set_active(device_driver)
    forget_launches()
    launches_of = types.SimpleNamespace(all=launches, driver=device_driver)
    yield launches_of
    forget_launches()
    driver.set_active(before)


def plain(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(fast_launch, "TAKEN", ())
        run()


def as_numbers(given):
    """Tensors as their addresses, chains of hooks as the nothing that they call: what triton's launcher in C reads of them."""
    flat = []
    for each in given:
        if isinstance(each, torch.Tensor):
            flat.append(each.data_ptr())
        elif isinstance(each, (tuple, list)) and not (each and each[0] == "descriptor"):
            flat.append(as_numbers(each))
        elif isinstance(each, triton.knobs.HookChain) or type(each).__name__ == "LazyDict":
            flat.append(None)
        else:
            flat.append(each)
    return flat


def assert_same(launched, monkeypatch, runs):
    """Each of `runs` launches the same plainly, the first time and again, also when all others are known."""
    for run in runs:
        run()
    num_known = len(fast_launch._known)
    assert num_known
    assert None not in fast_launch._known.values(), "some launch is not taken"
    for run in runs:
        launched.all.clear()
        plain(monkeypatch, run)
        run()
        middle = len(launched.all) // 2
        expected, found = launched.all[:middle], launched.all[middle:]
        assert middle
        assert list(map(as_numbers, found)) == list(map(as_numbers, expected))
    assert len(fast_launch._known) == num_known, "a launch was not known again"


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


def empty(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def operations():
    """Of each op that a step with prompts launches: calls with other weights, other rows, with and without what may be None."""
    package = f"{kernels.__name__}."
    names = ("rms_norm", "rotary_store_kv", "silu_and_mul", "paged_decode_attention", "paged_prefill_attention")
    rms_norm, rotary, silu, decode, prefill = (getattr(import_module(package + name), name) for name in names)
    gate_up = import_module(package + "hopper_gate_up").gate_up
    w4a16 = import_module(package + "w4a16_linear")
    norms = [empty(512) for _ in range(3)]
    x = empty(600, 512)
    pages = [(empty(20, 2, 64, 128), empty(20, 2, 64, 128)) for _ in range(2)]
    cos, slots = empty(600, 64, dtype=FP32), torch.zeros(600, dtype=torch.int64)
    tables, lens = torch.zeros((103, 64), dtype=torch.int32), torch.ones(103, dtype=torch.int32)
    cu_seqlens = torch.zeros(4, dtype=torch.int32)
    qkv, gate_and_up = empty(600, 1536), empty(600, 1024)
    q, scales = empty(600, 8, 128), empty(600, dtype=FP32)
    gated = [empty(2048, 512).t() for _ in range(2)]

    def tiles(k, n, *, is_gated=False):
        words, params = empty(n // 16, k // 64, 32, 4, dtype=torch.int32), empty(k // 128, n, dtype=torch.int32)
        return W4A16Tiles(words, params, None, BF16, is_gated)

    narrow, wide = [tiles(512, 768) for _ in range(2)], [tiles(512, 1024, is_gated=True) for _ in range(2)]
    return {
        "rms_norm": [
            *(lambda w=w, r=r: rms_norm(x, w, 1e-5, r) for w in norms for r in (None, x)),
            *(lambda n=n: rms_norm(x[:n], norms[0], 1e-6, x[:n]) for n in (1, 16, 599)),
        ],
        "rotary": [
            lambda kv=kv, scale=scale, n=n: rotary(qkv[:n], cos[:n], cos[:n], scale, *kv, slots[:n], 8, 2)
            for kv in pages
            for scale in (None, scales)
            for n in (600, 1)
        ],
        "silu": [lambda n=n: silu(gate_and_up[:n]) for n in (1, 600)],
        "decode": [
            lambda kv=kv, n=n, first=first: decode(q[:n], *kv, tables[first : first + n, :16], lens[first : first + n], 0.1, 0)
            for kv in pages
            for n in (1, 100)
            for first in (0, 1)
        ],
        "prefill": [
            lambda kv=kv, n=n: prefill(q[n:], *kv, tables[n:], lens[n:], cu_seqlens[: 104 - n], 0.1, 0)
            for kv in pages
            for n in (100, 101)
        ],
        "gate_up": [lambda w=w, n=n: gate_up(x[:n], w) for w in gated for n in (256, 600)],
        "w4a16": [
            *(lambda w=w, n=n: w4a16.w4a16_linear(x[:n], w) for w in narrow for n in (40, 160, 300)),
            *(lambda w=w, n=n: w4a16.w4a16_gate_up(x[:n], w) for w in wide for n in (40, 300)),
        ],
    }


def operations_of_8_and_4_bits():
    """The same of quantised keys and weights, and of the kernels that few rows and other chips have."""
    package = f"{kernels.__name__}."
    names = "rotary_store_quantized_kv", "quantized_decode_attention", "quantized_prefill_attention", "w8a8_linear"
    store, decode, prefill, w8a8_linear = (getattr(import_module(package + name), name) for name in names)
    rows = import_module(package + "quantize_rows")
    narrow, w4a16 = import_module(package + "narrow_linear"), import_module(package + "w4a16_linear")
    dequantize = import_module(package + "w4a16_dequantize").dequantize_w4a16
    x, residual, norm, qkv = empty(600, 512), empty(600, 512), empty(512), empty(600, 1536)
    cos, slots = empty(600, 64, dtype=FP32), torch.zeros(600, dtype=torch.int64)
    q, tables, lens = empty(600, 8, 128), torch.zeros((103, 64), dtype=torch.int32), torch.ones(103, dtype=torch.int32)
    starts = torch.zeros(4, dtype=torch.int32)

    def pages(bits, num_parts):
        data = empty(20, 2, 64, 16 * bits, dtype=torch.uint8)
        return QuantizedPages(data, empty(20, 2, 64, 2 * num_parts), bits)

    def fixed():
        return StaticInt8Pages(empty(20, 2, 64, 128, dtype=torch.uint8), empty(2, dtype=FP32), empty(2, dtype=FP32))

    caches = [(pages(8, 1), pages(8, 1)), (pages(8, 1), pages(8, 1)), (pages(4, 2), pages(4, 1)), (fixed(), fixed())]
    prompts = ((100, 128), (200, 200), (200, 300))
    dense = [empty(1024, 512).t() for _ in range(2)]
    int8 = [W8A8Weight(empty(1024, 512, dtype=torch.int8).t(), empty(1024, dtype=FP32)) for _ in range(2)]
    fp8 = [Fp8Weight(empty(1024, 512, dtype=FP8).t(), empty(1024, dtype=FP32)) for _ in range(2)]
    words = [empty(64, 8, 32, 4, dtype=torch.int32) for _ in range(2)]
    tiles = [W4A16Tiles(each, empty(4, 1024, dtype=torch.int32), None, BF16) for each in words]

    def eight_bit(n, weight):
        values = empty(640, 512, dtype=weight.weight.dtype)
        return lambda: w8a8_linear(QuantizedRows(values, scales, n, BF16), weight)

    scales = empty(640, dtype=FP32)
    return {
        "store": [
            lambda kv=kv, n=n: store(qkv[:n], cos[:n], cos[:n], None, *kv, slots[:n], 8, 2) for kv in caches for n in (1, 600)
        ],
        "decode of codes": [lambda kv=kv, n=n: decode(q[:n], *kv, tables[:n], lens[:n], 0.1) for kv in caches for n in (2, 100)],
        "prefill of codes": [
            lambda kv=kv: prefill(q[100:], *kv, tables[100:], lens[100:], starts, 0.1, 0, prompts) for kv in caches
        ],
        "rows": [
            *(lambda dtype=dtype, n=n: rows.quantize_rows(x[:n], dtype) for dtype in (FP8, torch.int8) for n in (1, 600)),
            *(lambda r=r, n=n: rows.rms_norm_rows(x[:n], norm, 1e-5, r, torch.int8) for r in (None, residual) for n in (1, 600)),
            *(lambda dtype=dtype: rows.silu_and_mul_rows(qkv, dtype) for dtype in (FP8, torch.int8)),
        ],
        "8 bit": [*(eight_bit(n, w) for w in int8 for n in (8, 200, 600)), *(eight_bit(n, w) for w in fp8 for n in (8, 60))],
        "narrow": [
            *(lambda w=w, n=n: narrow.linear(x[:n], w) for w in dense for n in (2, 40)),
            *(lambda w=w, n=n: narrow.gate_up(x[:n], w) for w in dense for n in (2, 40)),
        ],
        "w4a16 of few": [lambda w=w, n=n: w4a16.w4a16_linear(x[:n], w) for w in tiles for n in (1, 16, 32)],
        "dequantize": [lambda w=w: dequantize(w) for w in tiles],
    }


@pytest.fixture
def hopper(launched, monkeypatch):
    facts = {"num_sms": 132, "is_hopper": True, "has_pdl": True, "_compute_capability": 90}
    for info in pkgutil.iter_modules(kernels.__path__):
        module = import_module(f"{kernels.__name__}.{info.name}")
        for fact, value in facts.items():
            if hasattr(module, fact):
                monkeypatch.setattr(module, fact, lambda device, value=value: value)
    return launched


@pytest.mark.parametrize(
    "name",
    [
        *("rms_norm", "rotary", "silu", "decode", "prefill", "gate_up", "w4a16"),
        *("store", "decode of codes", "prefill of codes", "rows", "8 bit", "narrow", "w4a16 of few", "dequantize"),
    ],
)
def test_an_op_launches_what_it_launches_plainly(hopper, monkeypatch, name):
    runs = (operations() | operations_of_8_and_4_bits())[name]
    outputs: dict[object, torch.Tensor] = {}

    def same_output(shape, dtype, device):
        key = tuple(shape), dtype
        if key not in outputs:
            outputs[key] = empty(*shape, dtype=dtype)
        return outputs[key]

    monkeypatch.setattr(torch, "empty", same_output)
    monkeypatch.setattr(torch, "empty_like", lambda x: same_output(x.shape, x.dtype, x.device))
    assert_same(hopper, monkeypatch, runs)
