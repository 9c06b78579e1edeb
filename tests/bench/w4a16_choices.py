"""The choices that `sweep_tiles.py w4a16` times against each other, and what they are for a layer: pure, so that a test can read them."""

from dataclasses import dataclass, field, replace

from turbotriton.backend.ops.kernels.tuning import (
    MAX_PARTS,
    W4A16LinearConfig,
    W4A16SkinnyConfig,
    ceil_div,
    w4a16_linear_config,
    w4a16_splits,
)

GROUP_SIZE = 128
ROWS = (1, 8, 16, 32, 64, 128, 256)
#: of the 8B shape: inputs, outputs, whether they are gates and ups
LAYERS = {"qkv": (4096, 6144, False), "o": (4096, 4096, False), "gate_up": (4096, 28672, True), "down": (14336, 4096, False)}


@dataclass(frozen=True)
class Tiles:
    """What stands in for fields of today's W4A16LinearConfig."""

    options: dict[str, int] = field(default_factory=dict)
    places: int = 0  # programs a multiprocessor is to have; 0: as today
    shares: bool = False  # equal shares of all tiles' steps for each place, in place of splits

    def config(self, rows: int, k: int, n: int, num_sms: int) -> W4A16LinearConfig | None:
        """None where the layer does not fit."""
        today = w4a16_linear_config(rows, n, k, GROUP_SIZE, num_sms)
        config = replace(today, **self.options)
        turn = config.block_k * (2 if config.prefetch else 1)
        if n % config.block_n or k % turn or GROUP_SIZE % config.block_k:
            return None
        tiles = ceil_div(rows, config.block_m) * (n // config.block_n)
        if self.shares:
            most = MAX_PARTS // (2 * config.block_n * config.block_m)
            num_programs = min(self.places * num_sms, most, tiles * (k // turn))
            return replace(config, num_splits=1, num_programs=num_programs)
        splits = w4a16_splits(tiles, self.places * num_sms, k, turn) if self.places else today.num_splits
        if splits > 1 and tiles * splits * config.block_n * config.block_m > MAX_PARTS:
            return None
        return replace(config, num_splits=splits)

    def num_programs(self, rows: int, k: int, n: int, num_sms: int) -> int:
        config = self.config(rows, k, n, num_sms)
        assert config is not None
        return config.num_programs or ceil_div(rows, config.block_m) * (n // config.block_n) * config.num_splits

    def __str__(self) -> str:
        words = [f"{name} {int(value)}" for name, value in self.options.items()]
        words += [f"places {self.places}"] * (self.places > 0) + ["shares"] * self.shares
        return ", ".join(words) or "today"


@dataclass(frozen=True)
class Skinny:
    """Warps that share the inputs (w4a16_skinny.py)."""

    strips: int
    num_warps: int
    programs_per_sm: int

    def config(self, rows: int, k: int, n: int, num_sms: int) -> W4A16SkinnyConfig | None:
        if rows > 8 or n % (16 * self.strips):
            return None
        return W4A16SkinnyConfig(self.strips, GROUP_SIZE, self.num_warps, self.programs_per_sm, zero_after=True)

    def num_programs(self, rows: int, k: int, n: int, num_sms: int) -> int:
        return min(n // (16 * self.strips), self.programs_per_sm * num_sms)

    def __str__(self) -> str:
        return f"skinny, strips {self.strips}, num_warps {self.num_warps}, programs_per_sm {self.programs_per_sm}"


Choice = Tiles | Skinny


def choices(rows: int) -> list[Choice]:
    """Today's first."""
    ahead = {"prefetch": True, "num_stages": 3}
    after = ahead | {"scale_after": True}
    fetched = {"descriptors": True, "prefetch": False, "scale_after": False}
    if rows <= 32:
        few: list[Choice] = [Tiles(), *(Tiles(after, places) for places in (2, 3, 4)), Tiles(ahead, 2)]
        few += [Tiles(after | {"num_stages": stages}, 2) for stages in (2, 4)]
        few += [Tiles(after | {"num_warps": 4}, places) for places in (4, 5, 6)]
        few += [Tiles(after, places, shares=True) for places in (2, 3)]
        return few + [Skinny(1, 4, 6), Skinny(1, 8, 3)] * (rows <= 8)
    if rows <= 64:
        long = fetched | {"block_k": 128, "num_stages": 3}
        return [
            *(Tiles(), Tiles(fetched), Tiles(fetched, 3), Tiles(fetched | {"num_stages": 4}, 2)),
            *(Tiles(fetched | ahead, 2), Tiles(fetched | ahead, 3), Tiles(fetched | after, 2), Tiles(fetched | after, 3)),
            *(Tiles(long, 1), Tiles(long, 2), Tiles(long | {"scale_after": True}, 2)),
            *(Tiles(fetched | ahead | {"num_warps": 4}, places) for places in (3, 4)),
        ]
    wide = fetched | ahead | {"block_m": 256}
    return [
        *(Tiles(), Tiles(fetched), Tiles(fetched, 1, shares=True), Tiles(fetched | ahead, 1), Tiles(fetched | ahead, 2)),
        *(Tiles(wide, 1), Tiles(wide, 1, shares=True), Tiles(wide | {"num_stages": 2}, 1), Tiles(wide | {"num_stages": 4}, 1)),
        *(Tiles(wide | {"num_warps": 4}, 2), Tiles(wide | {"num_warps": 4, "strips": 2}, 1)),
        *(Tiles(fetched | ahead | {"strips": 2}, 1), Tiles(fetched | ahead | {"strips": 2}, 1, shares=True)),
    ]
