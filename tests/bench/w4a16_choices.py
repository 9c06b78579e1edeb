"""The choices that `sweep_tiles.py w4a16` times against each other, and what they are for a layer: pure, so that a test can read them."""

from dataclasses import dataclass, field, replace

from turbotriton.backend.ops.kernels.hopper_tuning import HopperTiles, hopper_w4a16_tiles
from turbotriton.backend.ops.kernels.tuning import (
    MAX_PARTS,
    W4A16LinearConfig,
    ceil_div,
    next_power_of_2,
    w4a16_linear_config,
    w4a16_splits,
)

GROUP_SIZE = 128
#: of the 8B shape: inputs, outputs, whether they are gates and ups
LAYERS = {"qkv": (4096, 6144, False), "o": (4096, 4096, False), "gate_up": (4096, 28672, True), "down": (14336, 4096, False)}


@dataclass(frozen=True)
class Tiles:
    """What stands in for fields of today's W4A16LinearConfig."""

    options: dict[str, int] = field(default_factory=dict)
    places: int = 0  # programs a multiprocessor is to have; 0: as today

    def config(self, rows: int, k: int, n: int, num_sms: int) -> W4A16LinearConfig | None:
        """None where the layer does not fit."""
        today = w4a16_linear_config(rows, n, k, GROUP_SIZE, num_sms, has_descriptors=True)
        config = replace(today, **self.options)
        turn = config.block_k * max(config.ahead, 1)
        if n % config.block_n or k % turn or GROUP_SIZE % config.block_k:
            return None
        tiles = ceil_div(rows, config.block_m) * (n // config.block_n)
        splits = (
            w4a16_splits(tiles, self.places * num_sms, k, max(config.block_k, turn // 2)) if self.places else today.num_splits
        )
        if splits > 1 and tiles * splits * config.block_n * config.block_m > MAX_PARTS:
            return None
        return replace(config, num_splits=splits)

    def num_programs(self, rows: int, k: int, n: int, num_sms: int) -> int:
        config = self.config(rows, k, n, num_sms)
        assert config is not None
        return ceil_div(rows, config.block_m) * (n // config.block_n) * config.num_splits

    def __str__(self) -> str:
        words = [f"{name} {int(value)}" for name, value in self.options.items()]
        return ", ".join(words + [f"places {self.places}"] * (self.places > 0)) or "today"


@dataclass(frozen=True)
class Hopper:
    """The kernel in Gluon. num_stages: 0: the most. form: equal "shares", "whole" tiles in waves, or "parts" that are left to a norm, where
    two or more of a tile find room, and otherwise whole tiles."""

    block_m: int
    strips: int = 1
    num_stages: int = 0
    form: str = "shares"

    def config(self, rows: int, k: int, n: int, num_sms: int) -> HopperTiles | None:
        most = hopper_w4a16_tiles(self.block_m, self.strips, num_sms)
        if n % most.block_n or k % 128:
            return None
        most = replace(most, num_stages=self.num_stages or most.num_stages)
        tiles = n // most.block_n
        if self.form == "shares":
            return most
        if self.form == "parts" and rows <= self.block_m and 1 < num_sms // tiles <= k // 128:
            return replace(most, num_programs=num_sms // tiles * tiles)
        return replace(most, num_programs=ceil_div(tiles, ceil_div(tiles, num_sms)), whole=True)

    def num_programs(self, rows: int, k: int, n: int, num_sms: int) -> int:
        config = self.config(rows, k, n, num_sms)
        assert config is not None
        if self.form != "shares":
            return config.num_programs
        turns = ceil_div(rows, config.block_m) * (n // config.block_n) * (k // 128)
        return ceil_div(turns, ceil_div(turns, config.num_programs))

    def __str__(self) -> str:
        stages = f", stages {self.num_stages}" if self.num_stages else ""
        return f"Hopper, {self.form}, block_m {self.block_m}, strips {self.strips}{stages}"


@dataclass(frozen=True)
class Dequantised:
    """Weights made once for each call, then cuBLAS; SiLU apart."""

    def config(self, rows: int, k: int, n: int, num_sms: int) -> "Dequantised":
        return self

    def num_programs(self, rows: int, k: int, n: int, num_sms: int) -> int:
        return 0  # cuBLAS chooses

    def __str__(self) -> str:
        return "dequantised, cuBLAS"


Choice = Tiles | Hopper | Dequantised


def choices(rows: int) -> list[Choice]:
    """Today's first."""
    return _plain(rows) + _hopper(rows)


def _hopper(rows: int) -> list[Choice]:
    forms = ("shares", "whole", "parts")
    if rows <= 128:
        block_m = max(next_power_of_2(rows), 16)
        return [Hopper(block_m, strips, form=form) for strips in (1, 2) for form in forms]
    block_m = -(-rows // 32) * 32 if rows <= 192 else 256
    found: list[Choice] = [Hopper(block_m, form=form) for form in forms]
    return [*found, Hopper(block_m, num_stages=4), Dequantised()] if rows >= 256 else found


def _plain(rows: int) -> list[Choice]:
    plain = {"ahead": 0, "scale_after": False, "descriptors": rows > 32}
    ahead = plain | {"ahead": 2, "num_stages": 3}
    if rows <= 32:
        after = ahead | {"scale_after": True}
        found = [Tiles(plain | {"num_stages": 4}, 3), Tiles(ahead, 2), *(Tiles(after, places) for places in (2, 3))]
        found += [Tiles(after | {"ahead": 4}, places) for places in (2, 3, 4)]
        found += [Tiles(after | {"ahead": 4, "num_warps": 4}, places) for places in (3, 4, 6)]
        return [Tiles(), *found, *(Tiles(after | {"ahead": 4, "block_k": 64}, places) for places in (2, 3))]
    if rows <= 64:
        long = plain | {"block_k": 128, "num_stages": 3, "num_warps": 8}
        found = [Tiles(plain | {"num_stages": stages, "num_warps": 8}, 2) for stages in (4, 6)]
        found += [Tiles(ahead | {"num_warps": 8}, places) for places in (2, 3)] + [Tiles(long, 2)]
        found += [Tiles(ahead | {"ahead": 4, "num_warps": 4}, places) for places in (2, 3)]
        return [Tiles(), *found, *(Tiles(ahead | {"num_warps": 4}, places) for places in (3, 4))]
    wide = {"block_m": 256}
    found = [Tiles(plain | {"num_stages": 4}, places) for places in (1, 2)] + [Tiles(ahead, places) for places in (1, 2)]
    return [Tiles(), *found, Tiles(plain | wide | {"num_stages": 4}, 1), Tiles(ahead | wide, 1)]
