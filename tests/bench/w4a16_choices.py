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
ROWS = (1, 16, 64, 256)
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
    after = {"scale_after": True}
    ahead = {"prefetch": True, "num_stages": 3}
    if rows <= 16:
        few: list[Choice] = [
            Tiles(),
            Tiles(after),
            Tiles(after, 2),
            Tiles(after | {"strips": 2}, 2),
            Tiles(after, 2, shares=True),
        ]
        few += [Tiles(ahead | after, places) for places in (2, 3)] + [Tiles(ahead | after, 2, shares=True)]
        if rows <= 8:
            shapes = [(1, 8, 2), (1, 8, 3), (1, 16, 1), (1, 4, 4), (1, 4, 6), (2, 8, 1), (2, 8, 2), (2, 4, 3), (2, 4, 4)]
            few += [Skinny(*shape) for shape in shapes]
        else:
            few += [Tiles(ahead, 2), Tiles(ahead | after | {"strips": 2}, 1)]
        return few
    fetched = {"descriptors": True}
    if rows <= 64:
        two = {"strips": 2, "num_stages": 4}
        long = {"block_k": 128, "num_stages": 3}
        return [
            *(Tiles(), Tiles(fetched), Tiles(fetched, 2, shares=True), Tiles(ahead, 3), Tiles(ahead | fetched, 3)),
            *(Tiles(long), Tiles(long | fetched), Tiles(long, 1, shares=True), Tiles(long | fetched | {"scale_after": True}, 2)),
            *(Tiles(two, 1), Tiles(two | fetched, 1), Tiles(two | fetched, 1, shares=True), Tiles(two | long, 1)),
            *(Tiles(two | long | fetched, 1), Tiles(two | long | fetched, 1, shares=True)),
            *(Tiles(two | fetched | ahead, 1), Tiles(two | fetched | ahead, 1, shares=True)),
        ]
    wide = fetched | {"block_m": 256, "num_stages": 4}
    tall = fetched | {"strips": 2, "num_stages": 4}
    small = fetched | {"num_warps": 4, "num_stages": 4}  # half a tile, two on a multiprocessor
    return [
        *(Tiles(), Tiles(fetched), Tiles(fetched, 2), Tiles(fetched, 1, shares=True)),
        *(
            Tiles(wide, 1),
            Tiles(wide, 1, shares=True),
            Tiles(wide | {"num_stages": 3}, 1),
            Tiles(wide | {"prefetch": True, "num_stages": 3}, 1),
        ),
        *(Tiles(tall, 1), Tiles(tall, 1, shares=True), Tiles(tall | {"block_k": 128, "num_stages": 3}, 1)),
        *(Tiles(tall | {"prefetch": True}, 1), Tiles(tall | {"descriptors": False, "num_stages": 3}, 1)),
        *(Tiles(small | {"strips": 2}, 2), Tiles(small | {"strips": 2}, 2, shares=True), Tiles(small | {"block_m": 256}, 2)),
    ]
