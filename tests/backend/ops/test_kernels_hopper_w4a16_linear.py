"""The warp-specialised kernel over 4 bit weights against float64, as `w4a16_linear` launches it on sm_90.

On the CPU in an emulation of its barriers, rings and counters (gluon_emulation.py), compiled ahead for sm_90, and on a GPU. Tolerances as
in test_kernels_w4a16_linear.py.
"""

import dataclasses
import re

import pytest
import torch
from tests.backend.ops.conftest import Target
from tests.backend.ops.gluon_emulation import emulate, plant, shows_a_mistake
from tests.backend.ops.hopper_code import compiled_for_hopper, loops_of, ptxas_report, skip_unless_hopper
from tests.backend.ops.test_kernels_compile_ahead import SHARED_LIMIT_BYTES, Recorder, resource_usage
from tests.backend.ops.test_kernels_w4a16_linear import Shape, weight_of

from turbotriton.backend.ops.kernels import hopper_w4a16_linear as module
from turbotriton.backend.ops.kernels import w4a16_linear as launcher
from turbotriton.backend.ops.kernels.hopper_tuning import (
    HopperTiles,
    hopper_w4a16_config,
    hopper_w4a16_tiles,
)
from turbotriton.backend.ops.kernels.split_sum import workspace
from turbotriton.backend.ops.kernels.w4a16_linear import w4a16_gate_up, w4a16_linear, w4a16_split_linear
from turbotriton.backend.ops.operands import SplitSums, W4A16Tiles

BF16, FP16 = torch.bfloat16, torch.float16
KERNEL = "_hopper_w4a16_kernel"


def tolerance(dtype, *, gated=False):
    eps = torch.finfo(dtype).eps
    if gated:
        return {"max_error": 8 * eps, "rms_error": 1.5 * eps}
    return {"max_error": 2 * eps + 2e-6, "rms_error": 0.6 * eps + 1e-6}


def wanted(x, weight, values):
    y = x.double() @ values + (0 if weight.bias is None else weight.bias.double())
    if weight.gated:
        gate, up = y.to(x.dtype).double().chunk(2, dim=1)
        y = torch.nn.functional.silu(gate) * up
    return y


def run(shape, dtype, monkeypatch, *, config=None, gated=False, seed=0, patience=1000):
    """(result, float64 result), emulated."""
    target = Target("cpu", dtype, torch.Generator().manual_seed(seed))
    weight, values = weight_of(target, shape, gated=gated)
    x = target.randn(shape.num_rows, shape.k + 8)[:, :-8]  # rows of another stride
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "is_hopper", lambda device: True)
        patch.setattr(launcher, "takes_hopper_w4a16", lambda *args, is_hopper: is_hopper)
        patch.setattr(module, "PATIENCE", patience)
        if config is not None:
            patch.setattr(launcher, "hopper_w4a16_config", lambda *args: config)
        patch.setattr(module, "has_pdl", lambda device: True)
        emulate(module, KERNEL, patch, seed, early=("words_desc", "params_desc"))
        y = (w4a16_gate_up if gated else w4a16_linear)(x, weight)
    _, counters = workspace(x.device)
    assert not counters.any(), "counters did not return to zero"
    return y, wanted(x, weight, values)


CASES = [
    (Shape(1, 256, 256, 128), False),
    (Shape(20, 128, 384, 128, bias=True), False),
    (Shape(65, 256, 256, 128), False),
    (Shape(100, 256, 128, 128, bias=True), False),  # 128 outputs: one strip a warp
    (Shape(128, 384, 256, 64), False),  # groups of one step
    (Shape(129, 256, 256, 256, bias=True), False),  # a tile of 128 rows and one of 32 beside it
    (Shape(192, 256, 256, 128), False),  # of 64
    (Shape(256, 128, 128, 128), False),  # a turn in all
    (Shape(300, 256, 256, 128, bias=True), False),  # several blocks of rows, the last of them short
    (Shape(1000, 128, 256, 128), False),  # about the most that come here
    (Shape(16, 256, 128, 128), True),
    (Shape(40, 384, 256, 128, bias=True), True),
    (Shape(70, 256, 256, 64), True),
    (Shape(170, 256, 384, 128), True),
    (Shape(200, 256, 384, 128, bias=True), True),
]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(("shape", "gated"), CASES, ids=str)
def test_every_row_and_output(shape, gated, dtype, monkeypatch, assert_close, guarded_outputs):
    assert_close(*run(shape, dtype, monkeypatch, gated=gated), **tolerance(dtype, gated=gated))


@pytest.mark.parametrize("num_programs", [1, 2, 5, 7, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_equal_shares_cover_every_tile_once(num_programs, num_stages, monkeypatch, assert_close):
    """6 tiles of 3 turns: shares that end inside a tile, at its end, hold several tiles, are one turn; programs without work."""
    config = HopperTiles(64, 1, num_stages, num_programs)
    for seed in range(2):
        out, expected = run(Shape(90, 384, 384, 128, bias=True), BF16, monkeypatch, config=config, seed=seed)
        assert_close(out, expected, **tolerance(BF16))


@pytest.mark.parametrize("strips", [1, 2])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("group_size", [64, 128, 256])
def test_steps_of_one_and_two_halves(strips, halves, group_size, monkeypatch, assert_close):
    config = HopperTiles(64, strips, 3, 3, halves)
    for gated in (False, True):
        out, expected = run(Shape(50, 256, 256, group_size), BF16, monkeypatch, config=config, gated=gated)
        assert_close(out, expected, **tolerance(BF16, gated=gated))


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_who_does_not_wait_leaves_its_chunks_to_the_last(patience, monkeypatch, assert_close):
    for seed in range(4):
        config = HopperTiles(64, 2, 2, 5)
        out, expected = run(Shape(64, 896, 256, 128), FP16, monkeypatch, config=config, seed=seed, patience=patience)
        assert_close(out, expected, **tolerance(FP16))


@pytest.mark.parametrize("num_programs", [1, 4, 6])
def test_the_sums_of_parts_do_not_depend_on_who_adds_them(num_programs, monkeypatch):
    shape, config = Shape(64, 896, 256, 128), HopperTiles(64, 1, 3, num_programs)
    first, _ = run(shape, FP16, monkeypatch, config=config)
    weight, _ = weight_of(Target("cpu", FP16, torch.Generator().manual_seed(0)), shape)
    assert weight.in_features == 896
    for patience in (0, 1000):
        assert torch.equal(run(shape, FP16, monkeypatch, config=config, patience=patience)[0], first)


def run_split(shape, dtype, config, num_parts, monkeypatch, *, seed=0):
    """(SplitSums, float64 result), emulated."""
    target = Target("cpu", dtype, torch.Generator().manual_seed(seed))
    weight, values = weight_of(target, shape)
    x = target.randn(shape.num_rows, shape.k + 8)[:, :-8]
    with monkeypatch.context() as patch:
        patch.setattr(module, "has_pdl", lambda device: True)
        emulate(module, KERNEL, patch, seed, early=("words_desc", "params_desc"))
        sums = module.split_linear(x, weight, config, num_parts)
    return sums, wanted(x, weight, values)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(
    ("shape", "config", "num_parts", "found_parts"),
    [
        (Shape(33, 512, 256, 128), HopperTiles(64, 1, 3, 8, 2), 4, 4),
        (Shape(64, 896, 256, 64), HopperTiles(64, 2, 2, 3, 2), 3, 3),  # 3, 3 and 1 turns
        (Shape(20, 640, 384, 128), HopperTiles(32, 1, 2, 12), 4, 3),  # of four parts the last would have none
        (Shape(150, 256, 128, 128), HopperTiles(160, 1, 3, 9), 9, 2),
        (Shape(16, 128, 128, 128), HopperTiles(16, 1, 2, 1, 2), 1, 1),
    ],
    ids=str,
)
def test_programs_leave_their_parts_to_who_reads_them(
    shape, config, num_parts, found_parts, dtype, monkeypatch, assert_close, guarded_outputs
):
    sums, expected = run_split(shape, dtype, config, num_parts, monkeypatch)
    assert sums.parts.shape == (found_parts, shape.num_rows, shape.n)
    assert sums.parts.dtype is torch.float32
    assert_close(sums[:], expected, **tolerance(dtype))


@pytest.mark.parametrize("num_rows", [40, 150])
def test_more_tiles_than_programs_that_do_not_fill_them_twice(num_rows, monkeypatch, assert_close):
    """Five tiles of 128 outputs on four multiprocessors: equal shares that end in a tile."""
    monkeypatch.setattr(launcher, "num_sms", lambda device: 4)
    assert_close(*run(Shape(num_rows, 256, 640, 128), FP16, monkeypatch), **tolerance(FP16))


ARRIVE = "    mbarrier.arrive(free.index(stage), count=1)\n"
MISTAKES = {
    "x read before it is there": ("_step", "    mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)\n", ""),
    "another phase": ("_step", "number // NUM_STAGES & 1", "number // NUM_STAGES + 1 & 1"),
    "x freed while it is read": ("_step", "warpgroup_mma_wait(0, [acc])", "warpgroup_mma_wait(1, [acc])"),
    "never freed": ("_step", ARRIVE, ""),
    "freed by one group for both": ("_step", "free.index(stage), count=1)", "free.index(stage), count=2)"),
    "the other group's words": ("_step", "S, HALVES, GROUP)", "S, HALVES, 1 - GROUP)"),
    "the other group's params": ("_step", "index(stage), 0, S, GROUP)", "index(stage), 0, S, 1 - GROUP)"),
    "the first half's rows twice": ("_step", "HALVES * stage + 1, rings", "HALVES * stage, rings"),
    "the first half's params twice": ("_step", "index(stage), 1, S, GROUP)", "index(stage), 0, S, GROUP)"),
    "weights asked for twice": ("_fetch", "if number >= num_early:", "if number >= num_early - 1:"),
    "more weights asked for early than the tile has": (
        "_fetch",
        "gl.minimum(end - first_tile * num_turns, num_turns)",
        "(end - first_tile * num_turns)",
    ),
    "parts at one place": ("_compute", "parts_ptr += GROUP *", "parts_ptr += 0 *"),
    "no wait for the other parts": ("_chunks_to_add", "    is_whole = is_last\n", "    is_whole = is_last | True\n"),
    "nobody adds what was left": ("_chunks_to_add", "seen >> 16 & 0xFF", "0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulation_finds_what_a_kernel_may_not_do(mistake, monkeypatch):
    function, *change = MISTAKES[mistake]
    plant(module, function, [change], monkeypatch)
    workspace(torch.device("cpu"))[0].fill_(float("nan"))  # nothing of an earlier run
    shape, config = Shape(64, 640, 256, 128), HopperTiles(64, 1, 2, 3)
    if "half's" in mistake:
        shape, config = shape._replace(group_size=64), dataclasses.replace(config, halves=2)
    if "early" in mistake:
        config = dataclasses.replace(config, num_stages=6)

    def attempt(seed):
        return run(shape, FP16, monkeypatch, config=config, seed=seed, patience=1 + seed % 2)

    try:
        assert shows_a_mistake(attempt, atol=0.1)
    finally:
        workspace(torch.device("cpu"))[0].zero_()


@pytest.mark.parametrize(
    ("num_rows", "k", "n", "is_hopper", "expected"),
    [
        (33, 4096, 6144, True, KERNEL),
        (256, 4096, 28672, True, KERNEL),
        (512, 4096, 6144, True, KERNEL),
        (32, 4096, 6144, True, "_w4a16_linear_kernel"),
        (64, 4096, 28672, True, KERNEL),
        (128, 4096, 28672, True, KERNEL),
        (256, 4096, 6144, False, "_w4a16_linear_kernel"),
        (256, 192, 6144, True, "_w4a16_linear_kernel"),
        (256, 4096, 192, True, "_w4a16_linear_kernel"),
        (256, 4096, 22016, True, KERNEL),  # 1.3 tiles for each multiprocessor
    ],
)
def test_what_it_does_not_take_is_the_plain_kernels(num_rows, k, n, is_hopper, expected, monkeypatch):
    launches = []
    for owner, name in ((module, KERNEL), (launcher, "_w4a16_linear_kernel")):
        monkeypatch.setattr(owner, name, Recorder(getattr(owner, name), launches))
    monkeypatch.setattr(launcher, "is_hopper", lambda device: is_hopper)
    monkeypatch.setattr(launcher, "num_sms", lambda device: 132)
    words, params = torch.empty((n // 16, k // 64, 32, 4), dtype=torch.int32), torch.empty((k // 64, n), dtype=torch.int32)
    w4a16_linear(torch.empty((num_rows, k), dtype=BF16), W4A16Tiles(words, params, None, BF16))
    assert [kernel.__name__ for kernel, _ in launches] == [expected]


def test_what_stands_before_a_norm_leaves_its_parts_to_it(monkeypatch):
    launches = []
    monkeypatch.setattr(module, KERNEL, Recorder(getattr(module, KERNEL), launches))
    monkeypatch.setattr(launcher, "is_hopper", lambda device: True)
    monkeypatch.setattr(launcher, "num_sms", lambda device: 132)
    words, params = torch.empty((256, 64, 32, 4), dtype=torch.int32), torch.empty((32, 4096), dtype=torch.int32)
    weight = W4A16Tiles(words, params, None, BF16)
    y = w4a16_split_linear(torch.empty((40, 4096), dtype=BF16), weight)
    assert isinstance(y, SplitSums)
    assert y.parts.shape == (4, 40, 4096)
    with_bias = dataclasses.replace(weight, bias=torch.empty(4096, dtype=BF16))
    assert isinstance(w4a16_split_linear(torch.empty((40, 4096), dtype=BF16), with_bias), torch.Tensor)
    assert isinstance(w4a16_split_linear(torch.empty((200, 4096), dtype=BF16), weight), torch.Tensor)
    assert [arguments["LEAVES_PARTS"] for _, arguments in launches] == [True, False, False]


def launched(dtype, config, monkeypatch, *, gated=False, bias=False, group_size=128, num_parts=0):
    """The kernel, and what a call on sm_90 gives it. num_parts: that are left to a norm."""
    launches = []
    monkeypatch.setattr(module, KERNEL, Recorder(getattr(module, KERNEL), launches))
    monkeypatch.setattr(module, "has_pdl", lambda device: True)
    n, k = 28672, 4096
    words, params = (
        torch.empty((n // 16, k // 64, 32, 4), dtype=torch.int32),
        torch.empty((k // group_size, n), dtype=torch.int32),
    )
    weight = W4A16Tiles(words, params, torch.empty(n, dtype=dtype) if bias else None, dtype, gated)
    x = torch.empty((config.block_m, k), dtype=dtype)
    if num_parts:
        module.split_linear(x, weight, config, num_parts)
    else:
        module.linear(x, weight, config)
    ((kernel, arguments),) = launches
    return kernel, arguments


def product_loop(compiled, folder):
    """The shortest loop of the machine code with matrix instructions, from its start on, without predicates."""
    code, loops = loops_of(compiled, folder)
    bare = [re.sub(r"^@!?U?P\d+ ", "", each).strip() for each in code]
    with_products = [bare[begin:end] for begin, end in loops if any("HGMMA" in each for each in bare[begin:end])]
    return min(with_products, key=len)


def written_registers(instruction):
    """Registers of a thread whose numbers the instruction changes, of those that are written before a product."""
    name, _, operands = instruction.partition(" ")
    found = re.match(r"\s*R(\d+)", operands)
    if not found or name.startswith(("ST", "BAR", "HGMMA", "SYNCS", "RED", "ATOM")):
        return set()
    width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    return set(range(int(found[1]), int(found[1]) + width))


TILES = [
    (BF16, hopper_w4a16_tiles(256, 1, 132), True, True),
    (FP16, hopper_w4a16_tiles(256, 1, 132), False, False),
    (BF16, hopper_w4a16_tiles(128, 2, 132), True, False),
    (FP16, hopper_w4a16_tiles(128, 2, 132), False, True),
    (BF16, hopper_w4a16_tiles(128, 1, 132), False, False),
    (BF16, hopper_w4a16_tiles(64, 2, 132), True, False),
    (FP16, hopper_w4a16_tiles(64, 1, 132), False, False),
    (BF16, hopper_w4a16_tiles(32, 2, 132), False, False),
    (BF16, hopper_w4a16_tiles(16, 2, 132), True, False),
    (BF16, hopper_w4a16_tiles(192, 1, 132), True, False),
    (FP16, hopper_w4a16_tiles(160, 1, 132), False, True),
]


@pytest.mark.parametrize(
    ("dtype", "config", "gated", "bias"),
    [
        *TILES[:1],
        *TILES[5:6],
        *TILES[9:10],
        *(pytest.param(*tile, marks=pytest.mark.slow) for tile in (*TILES[1:5], *TILES[6:9], *TILES[10:])),
    ],
    ids=str,
)
def test_a_step_has_one_wait_for_its_products(dtype, config, gated, bias, monkeypatch, tmp_path):
    compiled = compiled_for_hopper(*launched(dtype, config, monkeypatch, gated=gated, bias=bias))
    assert_products_keep_their_registers(compiled, config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (hopper_w4a16_config(64, 28672, 132), {"gated": True}),  # whole tiles
        (hopper_w4a16_config(128, 28672, 132), {"gated": True, "group_size": 64}),
        (hopper_w4a16_config(256, 28672, 132), {"bias": True}),
        (hopper_w4a16_tiles(64, 1, 132), {"num_parts": 4}),
        (hopper_w4a16_tiles(128, 1, 132), {"num_parts": 2, "group_size": 64}),
        (hopper_w4a16_tiles(192, 1, 132), {"group_size": 64}),
    ],
    ids=str,
)
def test_so_has_a_step_of_whole_tiles_and_parts(dtype, config, options, monkeypatch, tmp_path):
    compiled = compiled_for_hopper(*launched(dtype, config, monkeypatch, **options))
    assert_products_keep_their_registers(compiled, config, tmp_path)


def assert_products_keep_their_registers(compiled, config, tmp_path):
    """Nothing spilled, products not serialised by ptxas, room for the ring; the registers of a product stay until it has ended."""
    assert compiled.metadata.shared <= SHARED_LIMIT_BYTES[90]
    usage = resource_usage(compiled.asm["cubin"], tmp_path)
    assert usage["LOCAL"] == usage["STACK"] == 0, usage
    said = ptxas_report(compiled, tmp_path)
    assert "registers" in said
    assert "serialized" not in said
    assert "0 bytes spill stores" in said
    loop = product_loop(compiled, tmp_path)
    products = [each for each in loop if "HGMMA" in each]
    per_step = 1 if config.block_m.bit_count() == 1 else 2
    assert len(products) == 4 * config.strips * config.halves * per_step
    waits = [each for each in loop if "DEPBAR" in each and "gsb0" in each]
    assert [re.findall(r"0x\d", each)[-1] for each in waits] == ["0x0"], waits
    # twice around: the registers of a group of products are theirs from the first of them until all have ended
    groups: list[set[int]] = [set()]
    for each in loop + loop:
        if "HGMMA" in each:
            columns, sums, left = map(int, re.match(r"HGMMA\.64x(\d+)\S+ R(\d+), R(\d+)", each).groups())
            groups[-1] |= set(range(left, left + 4)) | set(range(sums, sums + columns // 2))
            if "gsb0" in each:
                groups.append(set())
        elif "DEPBAR" in each and "gsb0" in each:
            groups = [set()]
        assert not any(written_registers(each) & group for group in groups), each


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(
    ("shape", "gated"),
    [
        *CASES,
        (Shape(256, 4096, 6144, 128), False),
        (Shape(65, 4096, 4096, 128, bias=True), False),
        (Shape(150, 4096, 4096, 128, bias=True), False),
        (Shape(176, 4096, 4096, 128), True),
        (Shape(200, 14336, 1024, 64), False),
        (Shape(256, 4096, 4096, 128), True),
        (Shape(300, 4096, 2048, 64, bias=True), True),
        (Shape(1000, 1024, 1152, 128), False),
        (Shape(64, 2048, 28672, 128), True),  # whole tiles
        (Shape(100, 2048, 28672, 64), True),
        (Shape(190, 2048, 28672, 128), True),
        (Shape(300, 1024, 12288, 128, bias=True), False),
        (Shape(64, 1024, 22016, 128), True),  # 1.3 tiles for each multiprocessor
        (Shape(256, 1024, 22016, 128), True),
    ],
    ids=str,
)
def test_every_row_and_output_on_a_gpu(shape, gated, dtype, monkeypatch, assert_close):
    skip_unless_hopper()
    target = Target("cuda", dtype, torch.Generator().manual_seed(0))
    weight, values = weight_of(target, shape, gated=gated)
    x = target.randn(shape.num_rows, shape.k + 8)[:, :-8]
    y = module.linear(x, weight, hopper_w4a16_config(shape.num_rows, shape.n, 132))
    assert_close(y, wanted(x, weight, values), **tolerance(dtype, gated=gated))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(
    ("shape", "num_parts"),
    [(Shape(64, 14336, 4096, 128), 4), (Shape(40, 4096, 4096, 64), 4), (Shape(100, 4096, 6144, 128), 2)],
    ids=str,
)
def test_parts_on_a_gpu(shape, num_parts, dtype, assert_close):
    skip_unless_hopper()
    target = Target("cuda", dtype, torch.Generator().manual_seed(0))
    weight, values = weight_of(target, shape)
    x = target.randn(shape.num_rows, shape.k)
    sums = w4a16_split_linear(x, weight)
    assert sums.parts.shape[0] == num_parts
    assert_close(sums[:], wanted(x, weight, values), **tolerance(dtype))
    assert all(torch.equal(w4a16_split_linear(x, weight).parts, sums.parts) for _ in range(50))


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        hopper_w4a16_tiles(256, 1, 132),
        hopper_w4a16_tiles(256, 1, 50),
        hopper_w4a16_tiles(192, 1, 132),
        hopper_w4a16_tiles(160, 1, 50),
        hopper_w4a16_tiles(128, 2, 132),
        hopper_w4a16_tiles(128, 1, 7),
        hopper_w4a16_tiles(64, 2, 132),
        hopper_w4a16_tiles(64, 1, 100),
        hopper_w4a16_tiles(32, 2, 132),
        hopper_w4a16_tiles(16, 1, 132),
    ],
    ids=str,
)
def test_long_sums_are_right_again_and_again(config, gated, assert_close):
    """A race in the ring, in the registers or at the counters would show as a difference between runs."""
    skip_unless_hopper()
    target = Target("cuda", BF16, torch.Generator().manual_seed(0))
    weight, values = weight_of(target, Shape(256, 4096, 1024, 128), gated=gated)
    x = target.randn(256, 4096)
    y = module.linear(x, weight, config)
    assert_close(y, wanted(x, weight, values), **tolerance(BF16, gated=gated))
    assert all(torch.equal(module.linear(x, weight, config), y) for _ in range(200))


@pytest.mark.gpu
@pytest.mark.parametrize("patience", [0, 4])
def test_programs_that_do_not_wait_give_the_same_bits(patience, monkeypatch):
    skip_unless_hopper()
    target = Target("cuda", BF16, torch.Generator().manual_seed(0))
    weight, _ = weight_of(target, Shape(256, 4096, 1024, 128))
    x, config = target.randn(256, 4096), hopper_w4a16_tiles(256, 1, 132)
    y = module.linear(x, weight, config)
    monkeypatch.setattr(module, "PATIENCE", patience)
    assert all(torch.equal(module.linear(x, weight, config), y) for _ in range(100))


@pytest.mark.gpu
def test_a_graph_replays_it(assert_close):
    skip_unless_hopper()
    target = Target("cuda", BF16, torch.Generator().manual_seed(0))
    weight, values = weight_of(target, Shape(256, 4096, 1024, 128))
    x, config = target.randn(256, 4096), hopper_w4a16_tiles(256, 1, 132)
    module.linear(x, weight, config)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = module.linear(x, weight, config)
        again = module.linear(x * 0.5, weight, config)
    x.copy_(target.randn(256, 4096))
    for _ in range(20):
        graph.replay()
    assert_close(first, wanted(x, weight, values), **tolerance(BF16))
    assert_close(again, wanted(x * 0.5, weight, values), **tolerance(BF16))
