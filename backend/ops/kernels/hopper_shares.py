"""How the programs of a Hopper kernel share a product y^T = W x^T whose tiles do not fill the device evenly, in Gluon.

Programs take equal shares of all tiles' turns (a turn: 128 inputs), counted through all tiles. A tile of one program is stored at once. Of
a tile of several, each leaves its part in the workspace, and at its own end looks for the other parts: all end at about the same time. Part
p of P then adds up, in order, and stores the chunks p, p + P, ... of the tile's rows. Who has looked in vain for long leaves its chunks to
the part that comes last, so programs need not run together.

    turns       tile 0: 0 1 2 3 | tile 1: 0 1 2 3 | tile 2: 0 1 2 3
    programs            0 0 0 1           1 1 2 2           2 3 3 3

Programs that begin together and go from turn to turn together read the same inputs at the same time, and the chip asks its L2 cache once
for neighbours that want the same lines of it: of x, or of W where their tiles are row blocks of one column, which follow each other. So
`my_tiles` gives each program as many whole tiles, and neighbours neighbouring ones; `my_part` gives it one part of a tile, which it leaves
to who reads the sum; and where tiles have as many programs, `my_share` gives neighbours the same part of neighbouring tiles.

A tile's sums are [16 WARPS S outputs, rows] over WARPS warps, each with 16 of every 16 WARPS outputs. The matrix unit's widths are powers
of two here: a tile of 160 or 192 rows is one of 128 and one of 32 or 64 beside it, `high`. A chunk is some of the rows, an eighth at least.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["PATIENCE", "chunk_of", "find_parts", "leave_part", "load_tile", "my_part", "my_share", "my_tiles", "sum_of_parts"]

# renamed after triton 3.6
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

#: Looks at a counter, a few milliseconds: only what else runs on the device can keep programs of one launch from running together.
PATIENCE = 4096


@gluon.jit
def my_share(num_tiles, num_turns):
    """(turns of a program, this program's first, the one after its last); programs are counted as `_place` does."""
    total = num_tiles * num_turns
    share = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
    begin = gl.minimum(_place(num_tiles) * share, total)
    return share, begin, gl.minimum(begin + share, total)


@gluon.jit
def _place(num_tiles):
    """The place of this program among those that have equal shares."""
    num_parts = gl.num_programs(0) // num_tiles
    in_parts = gl.program_id(0) % num_tiles * num_parts + gl.program_id(0) // num_tiles
    return gl.where(num_parts * num_tiles == gl.num_programs(0), in_parts, gl.program_id(0))


@gluon.jit
def my_part(num_tiles, num_turns):
    """As `my_share`, of one tile: the programs of all tiles' first parts, of their second, ... Every part has turns; the last may seem to
    have more than its tile."""
    num_parts = gl.num_programs(0) // num_tiles
    share = (num_turns + num_parts - 1) // num_parts
    begin = gl.program_id(0) % num_tiles * num_turns + gl.program_id(0) // num_tiles * share
    return share, begin, begin + share


@gluon.jit
def my_tiles(num_tiles, num_turns):
    """As `my_share`, of whole tiles: this program's first, and as many programs further on the next, up to the last of all."""
    return num_turns, gl.program_id(0) * num_turns, num_tiles * num_turns


@gluon.jit
def _chunk(acc, index: gl.constexpr, count: gl.constexpr):
    """The columns of part `index` of `count`."""
    if count == 1:
        return acc
    else:
        low, high = gl.split(gl.permute(gl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))
        if index < count // 2:
            return _chunk(low, index, count // 2)
        else:
            return _chunk(high, index - count // 2, count // 2)


@gluon.jit
def chunk_of(acc, high, index: gl.constexpr, CHUNK: gl.constexpr):
    """Columns index * CHUNK and on of [acc | high]."""
    LOW_CHUNKS: gl.constexpr = acc.shape[1] // CHUNK
    if index < LOW_CHUNKS:
        return _chunk(acc, index, LOW_CHUNKS)
    else:
        return _chunk(high, index - LOW_CHUNKS, high.shape[1] // CHUNK)


@gluon.constexpr_function
def _layout_of_parts(num_warps):
    """Of numbers [registers / 4, threads, 4] in which every thread has its own, four after each other."""
    return gl.BlockedLayout([1, 1, 4], [1, 32, 1], [1, num_warps, 1], [2, 1, 0])


@gluon.jit
def _part_offsets(S: gl.constexpr, CHUNK: gl.constexpr, WARPS: gl.constexpr):
    """Of a thread's numbers in a chunk, four after each other: [S CHUNK / 8, threads, 4]."""
    PART: gl.constexpr = _layout_of_parts(WARPS)
    i = gl.arange(0, S * CHUNK // 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, PART)))
    thread = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(0, gl.SliceLayout(2, PART)))
    j = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, PART)))
    return (i * (128 * WARPS))[:, None, None] + (thread * 4)[None, :, None] + j[None, None, :]


@gluon.jit
def leave_part(
    acc, high, parts_ptr, counter_ptr, slot, S: gl.constexpr, BLOCK_M: gl.constexpr, CHUNK: gl.constexpr, WARPS: gl.constexpr
):
    """Stores a tile's sums as a part of it, and returns what its counter was before."""
    PART: gl.constexpr = _layout_of_parts(WARPS)
    part_ptr = parts_ptr + slot.to(gl.int64) * (16 * WARPS * S * BLOCK_M) + _part_offsets(S, CHUNK, WARPS)
    for index in gl.static_range(BLOCK_M // CHUNK):
        numbers = gl.reshape(chunk_of(acc, high, index, CHUNK), (S, WARPS, 2, 8, CHUNK // 8, 4, 2))
        numbers = gl.reshape(gl.permute(numbers, (0, 4, 1, 3, 5, 2, 6)), (S * CHUNK // 8, 32 * WARPS, 4))
        gl.store(part_ptr + index * (16 * WARPS * S * CHUNK), gl.convert_layout(numbers, PART, assert_trivial=True))
    thread_barrier()
    return gl.atomic_add(counter_ptr, 1, sem="acq_rel")


@gluon.jit
def _load_part(chunk_ptr, first_slot, head, part, num_parts, PART_SIZE: gl.constexpr):
    """A chunk of one part of a tile, past the L1 cache: zeros where there is no such part."""
    slot = gl.where(part == 0, first_slot, 2 * (head + part))
    return gl.load(chunk_ptr + slot.to(gl.int64) * PART_SIZE, mask=part < num_parts, other=0, cache_modifier=".cg")


@gluon.jit
def sum_of_parts(
    parts_ptr, index, first_slot, head, num_parts, dtype: gl.constexpr,
    S: gl.constexpr, BLOCK_M: gl.constexpr, CHUNK: gl.constexpr, LAYOUT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A chunk of all parts of a tile, added up in their order: [16 WARPS S, CHUNK]."""
    PART: gl.constexpr = _layout_of_parts(WARPS)
    PART_SIZE: gl.constexpr = 16 * WARPS * S * BLOCK_M
    chunk_ptr = parts_ptr + index * (16 * WARPS * S * CHUNK) + _part_offsets(S, CHUNK, WARPS)
    numbers = gl.zeros([S * CHUNK // 8, 32 * WARPS, 4], dtype, PART)
    for part in range(0, num_parts, 4):  # as many are asked for before the first is there
        a = _load_part(chunk_ptr, first_slot, head, part, num_parts, PART_SIZE)
        b = _load_part(chunk_ptr, first_slot, head, part + 1, num_parts, PART_SIZE)
        c = _load_part(chunk_ptr, first_slot, head, part + 2, num_parts, PART_SIZE)
        d = _load_part(chunk_ptr, first_slot, head, part + 3, num_parts, PART_SIZE)
        numbers = numbers + a + b + c + d
    sums = gl.permute(gl.reshape(numbers, (S, CHUNK // 8, WARPS, 8, 4, 2, 2)), (0, 2, 5, 3, 1, 4, 6))
    return gl.convert_layout(gl.reshape(sums, (16 * WARPS * S, CHUNK)), LAYOUT, assert_trivial=True)


@gluon.jit
def _chunks_to_add(counter_ptr, seen, part, num_parts, NUM_CHUNKS: gl.constexpr, PATIENCE: gl.constexpr):
    """The chunks, as bits, that a program adds up of a tile to which it has given its part.

    counter: bits 0..15 parts that are there, 16..23 chunks that were left to whom comes last, 24..31 programs that look here no more; the
    last of those sets it back. seen: its value before this part came
    """
    own = part * 0
    for index in gl.static_range(NUM_CHUNKS):
        own |= (index % num_parts == part).to(gl.int32) << index
    is_last = (seen & 0xFFFF) == num_parts - 1
    is_whole = is_last
    num_looks = part * 0
    while (is_whole == 0) & (num_looks < PATIENCE):
        is_whole = (gl.atomic_add(counter_ptr, 0, sem="acquire") & 0xFFFF) == num_parts
        num_looks += 1
    found = gl.atomic_add(counter_ptr, gl.where(is_whole, 0, own << 16) + (1 << 24), sem="acquire")
    if (found >> 24 & 0xFF) == num_parts - 1:
        gl.store(counter_ptr, 0)
    is_whole = is_whole | ((found & 0xFFFF) == num_parts)  # now, before anyone was told of what is left
    return gl.where(is_whole, own, 0) | gl.where(is_last, seen >> 16 & 0xFF, 0)


@gluon.jit
def find_parts(counters_ptr, seen, tile, work, NUM_CHUNKS: gl.constexpr, PATIENCE: gl.constexpr):
    """Of a tile to which this program has given its part: (chunks to add up as bits, slot of the first part, head, number of parts).

    head: the place of the tile's first program
    work: (row blocks, turns of a tile, turns of a program, this program's first turn, the one after its last)
    """
    _num_row_blocks, num_turns, share, begin, _end = work
    first = tile * num_turns // share  # the first program of this tile, which may have begun with another
    num_parts = ((tile + 1) * num_turns - 1) // share + 1 - first
    chunks = _chunks_to_add(counters_ptr + tile, seen, begin // share - first, num_parts, NUM_CHUNKS, PATIENCE)
    return chunks, 2 * first + (first * share <= tile * num_turns).to(gl.int32), first, num_parts
