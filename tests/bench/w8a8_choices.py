"""The choices that `sweep_tiles.py w8a8` times against each other: pure, so that a test can read them."""

from collections.abc import Iterator
from dataclasses import replace

from turbotriton.backend.ops.kernels.hopper_tuning import HopperTiles, hopper_w8a8_tiles, rows_of_hopper_tile
from turbotriton.backend.ops.kernels.tuning import ceil_div


def choices(rows: int, n: int, k: int, num_sms: int) -> Iterator[tuple[str, HopperTiles, int]]:
    """(form, tiles, parts): whole tiles in waves, equal shares, parts of a tile that are left to who reads them."""
    for strips in (1, 2):
        most = 256 if strips == 1 else 128
        block_m = rows_of_hopper_tile(ceil_div(rows, ceil_div(rows, most)))
        tiles = hopper_w8a8_tiles(block_m, num_sms, strips)
        columns = n // tiles.block_n
        num_tiles = columns * ceil_div(rows, block_m)
        name = f"{tiles.block_n} x {block_m}"
        if 3 * columns > num_sms:
            num_programs = ceil_div(columns, ceil_div(columns, num_sms))
            yield f"{name}, whole", replace(tiles, num_programs=num_programs, whole=True), 1
        yield f"{name}, shares", tiles, 1
        if num_tiles * 2 <= num_sms:
            yield f"{name}, shares in step", replace(tiles, num_programs=num_sms // num_tiles * num_tiles), 1
            for num_parts in range(2, min(num_sms // num_tiles, k // 512) + 1):
                yield f"{name}, {num_parts} parts", tiles, num_parts
