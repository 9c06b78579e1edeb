"""The warp-specialised kernel over int8 against exact sums, as `w8a8_linear` launches it on sm_90.

On the CPU in an emulation of its barriers, rings and counters (gluon_emulation.py), compiled ahead for sm_90, and on a GPU. Tolerance as in
test_kernels_w8a8_linear.py: sums are exact.
"""

from dataclasses import replace

import pytest
import torch
from tests.backend.ops.conftest import Target
from tests.backend.ops.gluon_emulation import emulate, plant, shows_a_mistake
from tests.backend.ops.hopper_code import compiled_for_hopper, loops_of, ptxas_report, skip_unless_hopper
from tests.backend.ops.test_kernels_compile_ahead import SHARED_LIMIT_BYTES, Recorder, resource_usage
from tests.backend.ops.test_kernels_w8a8_linear import Shape, product64, weight_of

from turbotriton.backend.ops import triton_column
from turbotriton.backend.ops.kernels import hopper_w8a8_linear as module
from turbotriton.backend.ops.kernels import quantize_rows as rows_module
from turbotriton.backend.ops.kernels import w8a8_linear as launcher
from turbotriton.backend.ops.kernels.hopper_tuning import HopperTiles, hopper_w8a8_config, hopper_w8a8_tiles
from turbotriton.backend.ops.kernels.quantize_rows import quantize_rows
from turbotriton.backend.ops.kernels.split_sum import workspace
from turbotriton.backend.ops.kernels.w8a8_linear import w8a8_linear, w8a8_split_linear
from turbotriton.backend.ops.operands import Added, NormWeight, QuantizedRows, SplitSums, W8A8Weight

BF16, FP16, INT8 = torch.bfloat16, torch.float16, torch.int8
KERNEL = "_hopper_w8a8_kernel"


def tolerance(dtype, *, gated=False):
    eps = torch.finfo(dtype).eps
    if gated:
        return {"max_error": 8 * eps, "rms_error": 1.5 * eps}
    return {"max_error": 4 * eps + 2e-6, "rms_error": 0.6 * eps + 1e-6}


def gated64(rows, weight):
    gate, up = product64(rows, weight).to(rows.dtype).double().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def run(shape, dtype, monkeypatch, *, config=None, num_parts=0, gated=False, seed=0, patience=1000):
    """(result, exact result), emulated; rows of no meaning behind x. num_parts: of SplitSums."""
    target = Target("cpu", dtype, torch.Generator().manual_seed(seed))
    weight = weight_of(target, shape, INT8, by_outputs=True)
    values = torch.randint(-127, 128, (shape.num_rows + 5, shape.k), generator=target.generator, dtype=INT8)
    rows = QuantizedRows(values, torch.rand(shape.num_rows + 5, generator=target.generator) / 100, shape.num_rows, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "is_hopper", lambda device: True)
        patch.setattr(launcher, "takes_hopper_w8a8", lambda *args, is_hopper: is_hopper)
        patch.setattr(module, "PATIENCE", patience)
        if config is not None:
            patch.setattr(launcher, "hopper_w8a8_config", lambda *args: config)
        patch.setattr(module, "has_pdl", lambda device: True)
        emulate(module, KERNEL, patch, seed, early=("weight_desc",))
        if gated:
            return module.gate_up(rows, weight, replace(config, whole=True)), gated64(rows, weight)
        y = module.split_linear(rows, weight, config, num_parts) if num_parts else w8a8_linear(rows, weight)
    assert not workspace(torch.device("cpu"))[1].any(), "counters did not return to zero"
    return y, product64(rows, weight)


SHAPES = [
    Shape(129, 256, 256, bias=True),  # a tile of 128 rows and one of 32 beside it
    Shape(150, 128, 384),
    Shape(192, 384, 128, bias=True),  # of 64
    Shape(200, 384, 256),  # two row blocks of 128, by 256 outputs
    Shape(256, 128, 128),  # a step in all
    Shape(300, 256, 256, bias=True),  # two blocks of rows, the last of them short
]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_and_output(shape, dtype, monkeypatch, assert_close, guarded_outputs):
    assert_close(*run(shape, dtype, monkeypatch), **tolerance(dtype))


WIDE = HopperTiles(128, 2, 2, 132)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (Shape(256, 256, 768, bias=True), replace(WIDE, num_programs=4, whole=True)),  # six tiles, neighbours with one column
        (Shape(200, 256, 512), replace(WIDE, num_programs=3, whole=True)),
        (Shape(200, 512, 512, bias=True), replace(WIDE, num_programs=8)),  # two programs for each tile, equal parts
        (Shape(130, 384, 512), replace(WIDE, num_programs=7)),
        (Shape(100, 384, 256, bias=True), replace(WIDE, num_programs=1, whole=True)),
        (Shape(60, 256, 768), HopperTiles(64, 2, 3, 2)),
        (Shape(17, 384, 256, bias=True), HopperTiles(32, 1, 2, 2)),
        (Shape(90, 384, 256, bias=True), HopperTiles(96, 2, 2, 2)),
        (Shape(100, 384, 256, bias=True), HopperTiles(128, 1, 2, 2)),
        (Shape(200, 512, 256, bias=True), HopperTiles(256, 1, 2, 2)),  # two products of 128 rows
        (Shape(256, 768, 256), HopperTiles(256, 1, 3, 1, whole=True)),
    ],
    ids=str,
)
def test_tiles_of_other_forms(shape, config, dtype, monkeypatch, assert_close, guarded_outputs):
    assert_close(*run(shape, dtype, monkeypatch, config=config), **tolerance(dtype))


@pytest.mark.parametrize("num_programs", [1, 2, 5, 7])
@pytest.mark.parametrize("patience", [0, 3, 1000])
def test_equal_shares_cover_every_tile_once_whoever_waits(num_programs, patience, monkeypatch, assert_close):
    """6 tiles of 3 turns, every second with few rows: shares that end inside a tile, at its end, hold several tiles, are one turn."""
    config = HopperTiles(160, 1, 2, num_programs)
    for seed in range(2):
        found = run(Shape(200, 384, 384, bias=True), BF16, monkeypatch, config=config, seed=seed, patience=patience)
        assert_close(*found, **tolerance(BF16))


@pytest.mark.parametrize(
    ("shape", "num_programs"),
    [
        (Shape(150, 256, 384, bias=True), 3),  # a tile each
        (Shape(200, 256, 384), 1),
        (Shape(200, 384, 384, bias=True), 3),  # two row blocks: six tiles, two each
        (Shape(150, 1152, 640), 3),  # the last has one tile where the others have two; an equal share would end within a tile
    ],
    ids=str,
)
def test_programs_have_whole_tiles(shape, num_programs, monkeypatch, assert_close, guarded_outputs):
    def refuse(device):
        raise AssertionError("whole tiles take no workspace")

    monkeypatch.setattr(module, "workspace", refuse)
    assert_close(*run(shape, BF16, monkeypatch, config=HopperTiles(160, 1, 2, num_programs, whole=True)), **tolerance(BF16))


def test_more_tiles_than_programs_that_do_not_fill_them_twice(monkeypatch, assert_close):
    """Five tiles on four multiprocessors: equal shares that end in a tile."""
    monkeypatch.setattr(launcher, "num_sms", lambda device: 4)
    assert_close(*run(Shape(150, 256, 640), BF16, monkeypatch), **tolerance(BF16))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(
    ("shape", "block_m", "asked_for", "num_parts"),
    [
        (Shape(150, 512, 256), 160, 4, 4),
        (Shape(200, 896, 128), 256, 3, 3),  # 3, 3 and 1 turns
        (Shape(130, 640, 256), 160, 4, 3),  # of four parts the last would have none
        (Shape(300, 256, 128), 160, 2, 2),  # two row blocks
        (Shape(192, 128, 128), 192, 2, 1),
    ],
    ids=str,
)
def test_programs_leave_their_parts_to_who_reads_them(
    shape, block_m, asked_for, num_parts, dtype, monkeypatch, assert_close, guarded_outputs
):
    sums, expected = run(shape, dtype, monkeypatch, config=HopperTiles(block_m, 1, 2, 132), num_parts=asked_for)
    assert sums.parts.shape == (num_parts, shape.num_rows, shape.n)
    assert sums.parts.dtype is torch.float32
    assert_close(sums[:], expected, **tolerance(dtype))


GATED_CASES = [
    (Shape(130, 384, 128, bias=True), HopperTiles(160, 1, 2, 1)),  # 64 gates with their ups
    (Shape(180, 256, 384), HopperTiles(192, 1, 2, 2)),  # the second program has one tile
    (Shape(300, 128, 256, bias=True), HopperTiles(160, 1, 3, 2)),  # a tile of either row block each
    (Shape(256, 256, 512), HopperTiles(256, 1, 2, 4)),
    (Shape(256, 256, 768, bias=True), HopperTiles(128, 2, 2, 4)),
    (Shape(70, 256, 256), HopperTiles(96, 2, 3, 1)),
]


@pytest.mark.parametrize("dtype", [FP16, BF16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "config"), GATED_CASES, ids=str)
def test_gates_meet_their_ups(shape, config, dtype, monkeypatch, assert_close, guarded_outputs):
    y, expected = run(shape, dtype, monkeypatch, config=config, gated=True)
    assert y.shape == (shape.num_rows, shape.n // 2)
    assert_close(y, expected, **tolerance(BF16 if dtype is torch.float32 else dtype, gated=True))


ARRIVE = "    mbarrier.arrive(free.index((number + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=is_first == 0)\n"
MISTAKES = {
    "x read before it is there": ("_step", "    mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)\n", ""),
    "x freed while it is read": ("_step", "warpgroup_mma_wait(2, [acc, high])", "warpgroup_mma_wait(4, [acc, high])"),
    "never freed": ("_step", ARRIVE, ""),
    "freed before a tile's first product": ("_step", "pred=is_first == 0", "pred=True"),
    "more W asked for early than the tile has": (
        "_fetch",
        "gl.minimum(end - first_tile * num_turns, num_turns) - first_turn",
        "end - begin",
    ),
    "W asked for twice": ("_fetch", "if number >= num_early:", "if number >= num_early - 1:"),
    "turns of another share": ("_fetch", "for turn in range(first, last):", "for turn in range(first * 0, last - first):"),
    "weights of the other group": ("_step", "slice(GROUP * OUT, OUT, 0)", "slice(0, OUT, 0)"),
    "parts of both groups in one place": ("_compute", "parts_ptr += GROUP * OUT * BLOCK_M * 2 * gl.num_programs(0)", "pass"),
    "a counter of both groups": ("_compute", "counters_ptr += GROUP * num_row_blocks * (N // (NUM_GROUPS * OUT))", "pass"),
    "sums used too early": ("_compute", "warpgroup_mma_wait(0, [acc, high])", "warpgroup_mma_wait(1, [acc, high])"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulation_finds_what_a_kernel_may_not_do(mistake, monkeypatch):
    function, *change = MISTAKES[mistake]
    plant(module, function, [change], monkeypatch)
    shape, config = Shape(150, 640, 256), HopperTiles(160, 1, 2, 3)
    assert shows_a_mistake(lambda seed: run(shape, FP16, monkeypatch, config=config, seed=seed))


MISTAKES_OF_TILES = {
    "tiles of the first program": (0, "my_tiles", "gl.program_id(0) * num_turns", "gl.program_id(0) * 0"),
    "a tile left out": (0, "my_tiles", "num_tiles * num_turns", "(num_tiles - 1) * num_turns"),
    "tiles of the next program": (0, "_compute", "1 if HAS_SHARES else gl.num_programs(0)", "1"),
    "parts at one place": (3, "_compute", "first // share * num_rows * N", "0"),
    "parts by their turns": (3, "_compute", "first // share * num_rows * N", "first * num_rows * N"),
    "another part of the turns": (3, "my_part", " + gl.program_id(0) // num_tiles * share", ""),
    "turns past a tile": (3, "_compute", "gl.minimum(end - tile * num_turns, num_turns)", "end - tile * num_turns"),
    "all parts in one tile": (3, "my_part", "gl.program_id(0) % num_tiles", "gl.program_id(0) // num_parts"),
}


@pytest.mark.parametrize("mistake", MISTAKES_OF_TILES)
def test_the_emulation_finds_wrong_tiles_and_parts(mistake, monkeypatch):
    num_parts, function, *change = MISTAKES_OF_TILES[mistake]
    plant(module, function, [change], monkeypatch)

    def attempt(seed):
        found, exact = run(
            Shape(150, 640, 384), FP16, monkeypatch, config=HopperTiles(160, 1, 2, 2, whole=True), num_parts=num_parts, seed=seed
        )
        return found[:], exact

    assert shows_a_mistake(attempt)


WAIT_OF_A_STEP = "        acc = warpgroup_mma_wait(1, [acc])"
NEXT_X_SCALES = "_x_scales(x_scale_ptr, row + CHUNK, num_rows, CHUNK, CHUNK_LAYOUT)"
MISTAKES_OF_WIDE_TILES = {
    "x freed while it is read": ("_step", WAIT_OF_A_STEP, WAIT_OF_A_STEP.replace("1", "2")),
    "sums used too early": ("_compute", "acc = warpgroup_mma_wait(0, [acc])", "acc = warpgroup_mma_wait(1, [acc])"),
    "x scales of the chunk before": ("_compute", NEXT_X_SCALES, NEXT_X_SCALES.replace("row + CHUNK", "row")),
    "another row block": ("_fetch", "tile % num_row_blocks * BLOCK_M", "(tile + 1) % num_row_blocks * BLOCK_M"),
    "columns that do not follow each other": ("_fetch", "1 if HAS_SHARES else gl.num_programs(0)", "1"),
}


@pytest.mark.parametrize("mistake", MISTAKES_OF_WIDE_TILES)
def test_the_emulation_finds_mistakes_in_wide_tiles(mistake, monkeypatch):
    function, *change = MISTAKES_OF_WIDE_TILES[mistake]
    plant(module, function, [change], monkeypatch)

    def attempt(seed):
        return run(Shape(200, 384, 512), FP16, monkeypatch, config=replace(WIDE, num_programs=2, whole=True), seed=seed)

    assert shows_a_mistake(attempt)


MISTAKES_OF_SHARES = {
    "parts of a tile in another order": ("find_parts", "begin // share - first", "gl.program_id(0) - first"),
    "a program's slot": ("_compute", "2 * (begin // share) + ", "2 * gl.program_id(0) + "),
    "two programs with one share": (
        "_place",
        "gl.program_id(0) % num_tiles * num_parts",
        "gl.program_id(0) % num_parts * num_tiles",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES_OF_SHARES)
def test_the_emulation_finds_wrong_places_of_shares(mistake, monkeypatch):
    """Three programs for each of two tiles, so that neighbours have different tiles."""
    function, *change = MISTAKES_OF_SHARES[mistake]
    plant(module, function, [change], monkeypatch)

    def attempt(seed):
        return run(Shape(150, 768, 256), FP16, monkeypatch, config=HopperTiles(160, 1, 2, 6), seed=seed, patience=3)

    assert shows_a_mistake(attempt)


MISTAKES_OF_GATES = {
    "gates of other ups": ("_outputs", "outputs // 16 * 8 + outputs % 8", "outputs // 16 * 8 + outputs % 4"),
    "scales of gates for ups": ("_outputs", "+ outputs // 8 % 2 * (N // 2)", ""),
    "a gate not rounded": ("_store", "        gate = rounded(gate, dtype)\n", ""),
    "another tile": ("_fetch_weights", "column // 16", "column // 8"),
}


@pytest.mark.parametrize("mistake", MISTAKES_OF_GATES)
def test_the_emulation_finds_wrong_gates(mistake, monkeypatch):
    function, *change = MISTAKES_OF_GATES[mistake]
    plant(module, function, [change], monkeypatch)

    def attempt(seed):
        y, expected = run(Shape(130, 256, 384), BF16, monkeypatch, config=HopperTiles(160, 1, 2, 3), gated=True, seed=seed)
        return y, expected.bfloat16().double()

    assert shows_a_mistake(attempt, atol=1e-3)


@pytest.mark.parametrize(
    ("num_rows", "n", "kernels", "gated"),
    [
        (256, 28672, [KERNEL, "_quantize_rows_kernel"], [True]),
        (256, 4096, [KERNEL, "_silu_and_mul_rows_kernel"], [False]),  # shares
        (17, 28672, [KERNEL, "_quantize_rows_kernel"], [True]),
        (16, 28672, ["_w8a8_linear_kernel", "_silu_and_mul_rows_kernel"], []),
        (0, 28672, [], []),
    ],
)
def test_a_gate_is_applied_where_tiles_are_whole(num_rows, n, kernels, gated, unlaunched):
    _, weight = empty_operands(0, 4096, n, BF16)
    norm, x = NormWeight(torch.empty(4096, dtype=BF16), 1e-5), torch.empty(num_rows, 4096, dtype=BF16)
    y, _ = triton_column.norm_gate_up_silu(x, x, norm, weight)
    assert isinstance(y, QuantizedRows)
    assert (y.values.shape[1], y.num_rows, y.dtype) == (n // 2, num_rows, BF16)
    assert [kernel.__name__ for kernel, _ in unlaunched] == ["_rms_norm_rows_kernel"] * (num_rows > 0) + kernels
    assert [arguments["GATED"] for kernel, arguments in unlaunched if kernel.__name__ == KERNEL] == gated


@pytest.mark.parametrize(
    ("num_rows", "k", "n", "is_hopper", "expected"),
    [
        (129, 4096, 6144, True, KERNEL),
        (256, 14336, 4096, True, KERNEL),
        (17, 4096, 6144, True, KERNEL),
        (16, 4096, 6144, True, "_w8a8_linear_kernel"),
        (2048, 4096, 6144, True, "_w8a8_linear_kernel"),
        (256, 4096, 6144, False, "_w8a8_linear_kernel"),
        (256, 4032, 6144, True, "_w8a8_linear_kernel"),
        (256, 4096, 6080, True, "_w8a8_linear_kernel"),
    ],
)
def test_what_it_does_not_take_is_the_plain_kernels(num_rows, k, n, is_hopper, expected, unlaunched, monkeypatch):
    monkeypatch.setattr(launcher, "is_hopper", lambda device: is_hopper)
    w8a8_linear(*empty_operands(num_rows, k, n, BF16))
    assert [kernel.__name__ for kernel, _ in unlaunched] == [expected]


@pytest.fixture
def unlaunched(monkeypatch):
    """The names of the kernels that are launched as on sm_90 with 132 multiprocessors."""
    launches = []
    names = ("_rms_norm_rows_kernel", "_quantize_rows_kernel", "_silu_and_mul_rows_kernel")
    for owner, name in ((module, KERNEL), (launcher, "_w8a8_linear_kernel"), *((rows_module, name) for name in names)):
        monkeypatch.setattr(owner, name, Recorder(getattr(owner, name), launches))
    monkeypatch.setattr(launcher, "is_hopper", lambda device: True)
    monkeypatch.setattr(launcher, "num_sms", lambda device: 132)
    return launches


@pytest.mark.parametrize(
    ("num_rows", "k", "n", "bias", "num_parts"),
    [
        (256, 4096, 6144, False, 2),
        (144, 14336, 4096, False, 3),
        (256, 14336, 4096, False, 0),
        (256, 4096, 6144, True, 0),
        (256, 4096, 28672, False, 0),
        (64, 14336, 4096, False, 2),
        (192, 4096, 4096, False, 2),
        (16, 4096, 6144, False, 0),
        (0, 4096, 6144, False, 0),
    ],
)
def test_where_parts_are_left(num_rows, k, n, bias, num_parts, unlaunched):
    y = w8a8_split_linear(*empty_operands(num_rows, k, n, BF16, bias=bias))
    assert isinstance(y, SplitSums) == (num_parts > 0)
    assert y.shape == (num_rows, n)
    assert y.dtype is BF16
    if num_parts:
        assert y.parts.shape[0] == num_parts


def test_a_projection_is_split_before_a_norm_or_rotary_and_nowhere_else(unlaunched):
    rows, weight = empty_operands(192, 4096, 4096, BF16)
    norm, residual = NormWeight(torch.empty(4096, dtype=BF16), 1e-5), torch.empty(192, 4096, dtype=BF16)
    projected = triton_column.down_projection(rows, weight)
    assert isinstance(projected, SplitSums)
    assert isinstance(triton_column.linear(rows, weight), torch.Tensor)
    unlaunched.clear()
    y, r = triton_column.norm_linear(projected, residual, norm, weight)
    assert isinstance(y, torch.Tensor)
    assert r.dtype is BF16
    y, _ = triton_column._norm_linear_before_rotary(projected, r, norm, weight)
    assert isinstance(y, SplitSums)
    assert [kernel.__name__ for kernel, _ in unlaunched] == ["_rms_norm_rows_kernel", KERNEL] * 2, (
        "parts go to the norm as they are"
    )
    y, r = triton_column._norm_linear_before_rotary(Added(residual), residual, norm, weight)
    assert r is residual


def empty_operands(num_rows, k, n, dtype, *, bias=False):
    rows = QuantizedRows(torch.empty((num_rows, k), dtype=INT8), torch.empty(num_rows), num_rows, dtype)
    weight = torch.empty((n, k), dtype=INT8).t()
    return rows, W8A8Weight(weight, torch.empty(n), torch.empty(n, dtype=dtype) if bias else None)


@pytest.mark.parametrize(
    ("tiles", "bias"),
    [
        (hopper_w8a8_tiles(128, 132, 2), False),
        pytest.param(hopper_w8a8_tiles(32, 132), True, marks=pytest.mark.slow),
        pytest.param(hopper_w8a8_tiles(64, 132, 2), True, marks=pytest.mark.slow),
        pytest.param(hopper_w8a8_tiles(96, 132, 2), True, marks=pytest.mark.slow),
        pytest.param(hopper_w8a8_tiles(128, 132), False, marks=pytest.mark.slow),
        pytest.param(hopper_w8a8_tiles(256, 132), False, marks=pytest.mark.slow),
        pytest.param(hopper_w8a8_tiles(192, 132), True, marks=pytest.mark.slow),
        pytest.param(hopper_w8a8_tiles(160, 132), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(("num_parts", "gated"), [(0, False), (4, False), (0, True)])
def test_products_follow_each_other(tiles, bias, num_parts, gated, monkeypatch, tmp_path):
    """Integer products, nothing spilled, not serialised by ptxas, a step's products waited for while the next run, by either group."""
    launches = []
    monkeypatch.setattr(module, KERNEL, Recorder(getattr(module, KERNEL), launches))
    monkeypatch.setattr(module, "has_pdl", lambda device: True)
    if num_parts:
        module.split_linear(*empty_operands(tiles.block_m, 4096, 28672, BF16), tiles, num_parts)
    elif gated:
        tiles = replace(tiles, whole=True)
        module.gate_up(*empty_operands(tiles.block_m, 4096, 28672, BF16, bias=bias), tiles)
    else:
        module.linear(*empty_operands(tiles.block_m, 4096, 28672, BF16, bias=bias), tiles)
    compiled = compiled_for_hopper(*launches[0])
    assert compiled.metadata.shared <= SHARED_LIMIT_BYTES[90]
    usage = resource_usage(compiled.asm["cubin"], tmp_path)
    assert usage["LOCAL"] == usage["STACK"] == 0, usage
    said = ptxas_report(compiled, tmp_path)
    assert "serialized" not in said
    assert "0 bytes spill stores" in said
    code, loops = loops_of(compiled, tmp_path)
    first, second = sorted((e - b, b) for b, e in loops if any("IGMMA" in each for each in code[b:e]))[:2]
    assert abs(first[1] - second[1]) > first[0], "one loop for both groups"
    for length, begin in (first, second):
        inner = code[begin : begin + length]
        assert sum("IGMMA" in each for each in inner) == 4 * tiles.strips * (1 + (tiles.block_m not in (32, 64, 128)))
        assert sum("DEPBAR" in each and "gsb0" in each for each in inner) == 1
        assert all("0x80" in each for each in inner if each.startswith("BAR.")), "a barrier of more than a group"


GPU_SHAPES = [
    *SHAPES,
    Shape(17, 4096, 6144),
    Shape(64, 4096, 4096, bias=True),
    Shape(100, 14336, 1152),
    Shape(256, 4096, 6144),
    Shape(200, 14336, 1024, bias=True),
    Shape(150, 4096, 4096),
    Shape(176, 4096, 4096, bias=True),
    Shape(512, 1024, 1152),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_every_row_and_output_on_a_gpu(shape, dtype, assert_close):
    skip_unless_hopper()
    rows, weight = operands_on_gpu(shape, dtype)
    config = hopper_w8a8_config(shape.num_rows, shape.n, 132)
    y = module.linear(rows, weight, config)
    assert_close(y, product64(rows, weight), **tolerance(dtype))
    if not shape.bias:
        sums = module.split_linear(rows, weight, config, 4)
        assert_close(sums[:], product64(rows, weight), **tolerance(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(
    ("shape", "num_programs"),
    [
        (Shape(130, 384, 128, bias=True), 1),
        (Shape(180, 1024, 2176), 9),
        (Shape(24, 512, 1280), 10),
        (Shape(256, 4096, 28672), 112),
        (Shape(256, 4096, 22016), 86),
        (Shape(400, 512, 1280), 20),
    ],
    ids=str,
)
def test_gates_meet_their_ups_on_a_gpu(shape, num_programs, dtype, assert_close):
    skip_unless_hopper()
    rows, weight = operands_on_gpu(shape, dtype)
    config = replace(hopper_w8a8_config(shape.num_rows, shape.n, 132), num_programs=num_programs, whole=True)
    y = module.gate_up(rows, weight, config)
    assert_close(y, gated64(rows, weight), **tolerance(dtype, gated=True))
    assert all(torch.equal(module.gate_up(rows, weight, config), y) for _ in range(20))


def operands_on_gpu(shape, dtype):
    target = Target("cuda", dtype, torch.Generator().manual_seed(0))
    weight = weight_of(target, shape, INT8, by_outputs=True)
    return quantize_rows(target.randn(shape.num_rows, shape.k), INT8), weight


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        hopper_w8a8_tiles(256, 132),
        hopper_w8a8_tiles(256, 50),
        hopper_w8a8_tiles(128, 48, 2),  # six programs for each of eight tiles
        hopper_w8a8_tiles(128, 45, 2),
        hopper_w8a8_tiles(192, 132),
        hopper_w8a8_tiles(160, 7),
        hopper_w8a8_tiles(256, 4),
    ],
    ids=str,
)
def test_sums_are_the_same_again_and_again(config, assert_close):
    """A race in the ring or at the counters would show as a difference between runs: integer sums are exact."""
    skip_unless_hopper()
    rows, weight = operands_on_gpu(Shape(256, 4096, 1024), BF16)
    y = module.linear(rows, weight, config)
    assert_close(y, product64(rows, weight), **tolerance(BF16))
    assert all(torch.equal(module.linear(rows, weight, config), y) for _ in range(200))
