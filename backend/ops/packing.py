"""Layouts of 4 bit values: AutoAWQ's and GPTQ's words, TurboMind's tiles, and the nibbles that our ops take. Pure index work.

Values are u4 matrices [k, m]: k inputs, m outputs, 0..15 in uint8 ("nibbles" below).

    AutoAWQ    qweight int32 [k, m/8], qzeros int32 [k/g, m/8]: nibble n of a word holds column AWQ_ORDER[n] of its 8
    GPTQ       qweight int32 [k/8, m]: nibble n is row n of its 8;  qzeros int32 [k/g, m/8] in natural order, stored less 1
    TurboMind  32 x 32 tiles, k-tile major; a tile is uint32 [lane 32][word 4] in the operand order of mma.m16n8k16, so that a
               thread's values for one instruction are adjacent:
                   k in tile = k16*16 + k8*8 + kp*2 + k1        m in tile = m16*16 + m8*8 + m1
                   lane = m1*4 + kp          word = k16*2 + m16          nibble = k1*4 + k8*2 + m8   (0 is the least significant)
    our ops    uint8 [k/2, m]: row 2i in the low half, row 2i + 1 in the high one
    fragments  int32 [m/16, k/64, lane 32, word 4], for our kernels: a lane's share of four 16 x 16 operands of mma.m16n8k16 and
               wgmma, so that a shift by 0, 4, 8 or 12 and a mask leave two neighbouring inputs in the halves of a register:
                   k in 64 = k32*32 + k16*16 + k8*8 + kp*2 + k1   m in strip = m8*8 + m1
                   lane = m1*4 + kp          word = k32*2 + m8          bit = k1*16 + k8*8 + k16*4
"""

import torch

__all__ = [
    "TILE",
    "deinterleave_w13",
    "fragment_params",
    "interleave_gate_up",
    "interleave_w13",
    "pack_awq",
    "pack_fragments",
    "pack_rows",
    "pack_scales_zeros",
    "pack_tiles",
    "unpack_awq",
    "unpack_gptq_weight",
    "unpack_gptq_zeros",
    "unpack_rows",
    "unpack_scales_zeros",
    "unpack_tiles",
]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
TILE = 32


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, m/8] -> uint8 [rows, m] of values 0..15, columns in natural order."""
    return _unpack_words(words, AWQ_ORDER)


def pack_awq(nibbles: torch.Tensor) -> torch.Tensor:
    """Inverse of `unpack_awq`: uint8 [rows, m] -> int32 [rows, m/8], m a multiple of 8."""
    columns = nibbles.reshape(nibbles.shape[0], -1, 8).to(torch.int32)
    words = torch.zeros(columns.shape[:2], dtype=torch.int32, device=nibbles.device)
    for nibble, column in enumerate(AWQ_ORDER):
        words |= columns[..., column] << (4 * nibble)
    return words


def unpack_gptq_weight(words: torch.Tensor) -> torch.Tensor:
    """int32 [k/8, m] -> uint8 [k, m]."""
    return torch.stack([((words >> (4 * n)) & 0xF).to(torch.uint8) for n in range(8)], dim=1).flatten(0, 1)


def unpack_gptq_zeros(words: torch.Tensor, *, plus_one: bool) -> torch.Tensor:
    """int32 [k/g, m/8] -> uint8 [k/g, m]. `plus_one`: the file holds zero - 1 (GPTQ's first format; 15 stands for -1, so 0)."""
    zeros = _unpack_words(words, tuple(range(8)))
    return (zeros + 1) & 0xF if plus_one else zeros


def _unpack_words(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    columns = torch.empty((*words.shape, 8), dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(order):
        columns[..., column] = ((words >> (4 * nibble)) & 0xF).to(torch.uint8)
    return columns.flatten(-2)


def interleave_w13(w1: torch.Tensor, w3: torch.Tensor) -> torch.Tensor:
    """Columns w1_0, w3_0, w1_1, w3_1, ..."""
    return torch.stack((w1, w3), dim=-1).flatten(-2)


def deinterleave_w13(w13: torch.Tensor) -> torch.Tensor:
    """Inverse, as [w1 | w3]."""
    return torch.cat((w13[..., 0::2], w13[..., 1::2]), dim=-1)


def pack_tiles(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 [k, m] of values 0..15, k and m multiples of 32 -> uint8 [k m / 2], the bytes of the .qweight file."""
    k, m = nibbles.shape
    # axes:            0 k-tile   1 k16 2 k8 3 kp 4 k1 5 m-tile   6 m16 7 m8 8 m1
    parts = nibbles.reshape(k // TILE, 2, 2, 4, 2, m // TILE, 2, 2, 8)
    ordered = parts.permute(0, 5, 8, 3, 1, 6, 4, 2, 7).reshape(-1, 2)  # [..., m1, kp, k16, m16, k1, k8, m8]
    return ordered[:, 0] | (ordered[:, 1] << 4)


def unpack_tiles(data: torch.Tensor, k: int, m: int) -> torch.Tensor:
    """Inverse of `pack_tiles`: uint8 [k m / 2] -> uint8 [k, m]."""
    values = torch.stack((data & 0xF, data >> 4), dim=-1)  # [k m / 2, 2], the last axis is m8
    ordered = values.reshape(k // TILE, m // TILE, 8, 4, 2, 2, 2, 2, 2)  # k-tile m-tile m1 kp k16 m16 k1 k8 m8
    return ordered.permute(0, 4, 7, 3, 6, 1, 5, 8, 2).reshape(k, m)


def pack_scales_zeros(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """[k/g, m] scales (any float) and zeros (0..15) -> int32 [k/g, m]: fp16 scale << 16 | fp16 bits of (64 + zero).

    64 + z in fp16 is 0x5400 | z << 4: the kernel's fast int4 to fp16 trick yields 64 + q, and the 64s cancel.
    """
    high = scales.to(torch.float16).view(torch.int16).to(torch.int32) << 16
    return high | 0x5400 | (zeros.to(torch.int32) << 4)


def unpack_scales_zeros(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse: int32 [k/g, m] -> (fp16 scales, uint8 zeros), both [k/g, m]."""
    scales = (words >> 16).to(torch.int16).view(torch.float16)
    return scales, ((words >> 4) & 0xF).to(torch.uint8)


def pack_rows(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 [k, m] -> uint8 [k/2, m], what the ops take. k must be even."""
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_rows`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=1).flatten(0, 1)


def pack_fragments(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 [k, m] of values 0..15, k a multiple of 64 and m of 16 -> int32 [m/16, k/64, 32, 4]."""
    k, m = nibbles.shape
    # axes:                    0 strip  1 m8 2 m1 3 k64 4 k32 5 k16 6 k8 7 kp 8 k1
    parts = nibbles.t().reshape(m // 16, 2, 8, k // 64, 2, 2, 2, 4, 2)
    words = torch.zeros((m // 16, 2, 8, k // 64, 2, 4), dtype=torch.int32, device=nibbles.device)
    for k16 in range(2):
        for k8 in range(2):
            for k1 in range(2):
                words |= parts[:, :, :, :, :, k16, k8, :, k1].to(torch.int32) << (k1 * 16 + k8 * 8 + k16 * 4)
    return words.permute(0, 3, 2, 5, 4, 1).reshape(m // 16, k // 64, 32, 4)  # strip k64 (m1 kp) (k32 m8)


def fragment_params(scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[k/g, m] scales (any float) and zeros (0..15) -> int32 [k/g, m]: scale << 16 | -(offset + zero), both as bits of `dtype`.

    dtype: float16 (offset 1024) or bfloat16 (offset 128): the numbers whose last mantissa bits count units.
    """
    offset = {torch.float16: 1024, torch.bfloat16: 128}[dtype]
    high = scales.to(dtype).view(torch.int16).to(torch.int32) << 16
    low = (-(zeros.float() + offset)).to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
    return (high | low).contiguous()


def interleave_gate_up(columns: torch.Tensor) -> torch.Tensor:
    """[..., gate | up] -> the same columns as strips of 8 gates and 8 ups: 16i + j is gate 8i + j, 16i + 8 + j is up 8i + j."""
    strips = columns.view(*columns.shape[:-1], 2, -1, 8)
    return strips.transpose(-3, -2).flatten(-3)
