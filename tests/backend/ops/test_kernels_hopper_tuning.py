"""The tile choice of the Hopper kernels that share their tiles, over 4 bit and int8 weights: numbers only."""

import itertools

import pytest
from tests.backend.ops.test_kernels_compile_ahead import SHARED_LIMIT_BYTES
from tests.bench import w8a8_choices

from turbotriton.backend.ops.kernels import hopper_w4a16_linear
from turbotriton.backend.ops.kernels.hopper_tuning import (
    MAX_HOPPER_W8A8_ROWS,
    MIN_HOPPER_W4A16_ROWS,
    MIN_HOPPER_W8A8_ROWS,
    hopper_w4a16_config,
    hopper_w4a16_parts,
    hopper_w8a8_config,
    hopper_w8a8_parts,
    takes_hopper_w4a16,
)
from turbotriton.backend.ops.kernels.split_sum import NUM_COUNTERS
from turbotriton.backend.ops.kernels.tuning import MAX_W4A16_ROWS, ceil_div
from turbotriton.backend.runner import warm_up


@pytest.mark.parametrize("num_sms", [4, 78, 114, 132])
def test_there_are_programs_for_any_number_of_outputs(num_sms):
    for num_rows, n in itertools.product((17, 33, 64, 100, 128, 160, 256, 300, 1023), range(128, 40000, 128)):
        for config in (hopper_w4a16_config(num_rows, n, num_sms), hopper_w8a8_config(min(num_rows, 512), n, num_sms)):
            assert 0 < config.num_programs <= num_sms
            assert n % config.block_n == 0


@pytest.mark.parametrize(
    ("num_rows", "n", "block_n", "num_programs", "num_parts"),
    [
        (64, 28672, 256, 112, 1),  # of an 8B model on 132 multiprocessors, K = 4096: gate and up
        (128, 28672, 256, 112, 1),
        (256, 28672, 128, 112, 1),  # two tiles each
        (64, 6144, 128, 96, 2),
        (128, 6144, 128, 96, 2),
        (129, 6144, 128, 96, 1),
        (64, 4096, 128, 128, 4),
        (65, 4096, 128, 128, 1),
        (65, 6144, 128, 96, 2),
        (500, 6144, 128, 96, 1),  # a tile each
        (1000, 6144, 128, 132, 1),  # 192 tiles in equal shares
        (33, 512, 128, 132, 1),  # too few programs
    ],
)
def test_a_layer_of_4_bits_has_whole_tiles_or_parts_or_shares(num_rows, n, block_n, num_programs, num_parts):
    config = hopper_w4a16_config(num_rows, n, 132)
    assert (config.block_n, config.num_programs) == (block_n, num_programs)
    assert config.whole == (n == 28672)
    assert hopper_w4a16_parts(num_rows, n, 4096, 132) == num_parts


@pytest.mark.parametrize("num_sms", [78, 114, 132])
@pytest.mark.parametrize("n", [128, 256, 384, 6144, 28672, 106496])
@pytest.mark.parametrize("num_rows", [1, 17, 64, 65, 128, 129, 161, 193, 256, 257, 300, 512, MAX_W4A16_ROWS])
def test_tiles_of_4_bits_fit_what_there_is(num_rows, n, num_sms):
    config = hopper_w4a16_config(num_rows, n, num_sms)
    assert n % config.block_n == 0
    assert config.block_m * config.strips <= 256, "more than 128 registers of sums"
    assert config.num_stages * config.halves >= 5
    assert config.num_stages * config.halves * (config.block_m * 128 + config.strips * 4608) <= SHARED_LIMIT_BYTES[90] - (
        18 << 10
    )
    assert 0 < config.num_programs <= num_sms
    num_tiles = ceil_div(num_rows, config.block_m) * (n // config.block_n)
    assert hopper_w4a16_linear.NUM_GROUPS.value * num_tiles <= NUM_COUNTERS


@pytest.mark.parametrize(
    ("group_size", "is_taken"), [(64, True), (128, True), (192, False), (256, True), (320, False), (384, True)]
)
def test_a_step_of_two_halves_meets_whole_groups(group_size, is_taken):
    assert takes_hopper_w4a16(64, 4096, 3840, group_size, is_hopper=True) == is_taken


@pytest.mark.parametrize(
    ("num_rows", "tile", "layers"),
    [
        (17, (128, 32), {"qkv": (96, 2), "o": (128, 2), "gate_up": (112, 1), "down": (128, 2)}),
        (33, (128, 64), {"qkv": (96, 2), "o": (128, 2), "gate_up": (112, 1), "down": (128, 2)}),
        (128, (128, 128), {"qkv": (96, 2), "o": (128, 2), "gate_up": (112, 1), "down": (128, 2)}),
        (144, (128, 160), {"qkv": (96, 2), "o": (128, 2), "gate_up": (112, 1), "down": (128, 3)}),
        (192, (128, 192), {"qkv": (96, 2), "o": (128, 2), "gate_up": (112, 1), "down": (128, 3)}),
        (193, (256, 128), {"qkv": (96, 2), "o": (128, 1), "gate_up": (112, 1), "down": (128, 1)}),
        (256, (256, 128), {"qkv": (96, 2), "o": (128, 1), "gate_up": (112, 1), "down": (128, 1)}),
        (400, (128, 256), {"qkv": (96, 1), "o": (128, 1), "gate_up": (112, 1), "down": (128, 1)}),
    ],
)
def test_how_int8_layers_of_an_8b_model_are_shared(num_rows, tile, layers):
    """On 132 multiprocessors: outputs by rows of a tile; programs and parts of each layer."""
    shapes = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
    configs = {name: hopper_w8a8_config(num_rows, n, 132) for name, (n, _) in shapes.items()}
    assert {(config.block_n, config.block_m) for config in configs.values()} == {tile}
    assert configs["gate_up"].whole
    parts = {name: hopper_w8a8_parts(num_rows, n, k, 132) for name, (n, k) in shapes.items()}
    assert {name: (configs[name].num_programs, parts[name]) for name in shapes} == layers


@pytest.mark.parametrize("num_rows", [17, 64, 128, 144, 192, 200, 256, 320, 512])
def test_a_sweep_of_int8_tiles_times_what_a_layer_has(num_rows):
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        config, num_parts = hopper_w8a8_config(num_rows, n, 132), hopper_w8a8_parts(num_rows, n, k, 132)
        choices = list(w8a8_choices.choices(num_rows, n, k, 132))
        assert len({name for name, _, _ in choices}) == len(choices)
        assert (config.block_m, config.strips, num_parts) in {(tiles.block_m, tiles.strips, parts) for _, tiles, parts in choices}


def test_int8_layers_of_a_small_model_keep_gates_and_ups_together():
    """A 1.8B's 16,384 outputs: one row block of wide tiles fills half of the multiprocessors, two all of them."""
    for num_rows in (64, 192, 256, 400):
        assert hopper_w8a8_config(num_rows, 16384, 132).whole


@pytest.mark.parametrize("num_sms", [78, 114, 132])
@pytest.mark.parametrize("n", [128, 6144, 28672])
@pytest.mark.parametrize("num_rows", [17, 33, 64, 65, 129, 160, 161, 193, 256, 257, 512])
def test_tiles_of_int8_fit_what_there_is(num_rows, n, num_sms):
    config = hopper_w8a8_config(num_rows, n, num_sms)
    assert config.block_m * config.strips <= 256, "more than 128 registers of sums"
    assert config.num_stages >= 4
    assert config.num_stages * 128 * (config.block_m + config.block_n) <= SHARED_LIMIT_BYTES[90] - (18 << 10)
    assert 0 < config.num_programs <= num_sms


@pytest.mark.parametrize("n", [128, 2048, 4096, 6144, 28672])
@pytest.mark.parametrize("num_rows", [33, 128, 129, 192, 193, 256, 257, 512])
def test_parts_of_int8_have_inputs_and_multiprocessors(num_rows, n):
    tiles = hopper_w8a8_config(num_rows, n, 132)
    num_tiles = n // tiles.block_n * ceil_div(num_rows, tiles.block_m)
    for k in (128, 512, 1024, 4096, 14336):
        num_parts = hopper_w8a8_parts(num_rows, n, k, 132)
        assert 1 <= num_parts <= max(k // 512, 1)
        assert num_parts == 1 or (52 <= num_parts * num_tiles <= 132 and num_parts * num_rows <= 576)


KINDS = {
    "4 bits": (hopper_w4a16_config, hopper_w4a16_parts, range(MIN_HOPPER_W4A16_ROWS, MAX_W4A16_ROWS + 1)),
    "int8": (hopper_w8a8_config, hopper_w8a8_parts, range(MIN_HOPPER_W8A8_ROWS, MAX_HOPPER_W8A8_ROWS + 1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_sms", [78, 114, 132])
@pytest.mark.parametrize("layers", [(6144, 4096, 28672, 4096), (4096, 2048, 16384, 2048), (5120, 5120, 27648, 5120)], ids=str)
def test_a_runner_warms_up_with_every_form_of_the_kernels(kind, layers, num_sms):
    config_of, parts_of, rows = KINDS[kind]

    def forms(num_rows):
        for index, n in enumerate(layers):
            config, is_gated = config_of(num_rows, n, num_sms), index == 2
            num_parts = 1 if is_gated else parts_of(num_rows, n, 4096, num_sms)
            is_whole = config.whole and num_parts == 1
            yield is_gated, config.block_m, config.strips, config.halves, config.num_stages, num_parts, is_whole

    warm = {form for num_rows in warm_up.TOKEN_COUNTS if num_rows in rows for form in forms(num_rows)}
    assert {form for num_rows in rows for form in forms(num_rows)} <= warm
