"""AutoAWQ's GEMM int4 to TurboMind's tiles.

AutoAWQ: qweight int32 [k, m/8], qzeros int32 [k/g, m/8], scales [k/g, m]; nibble n of a word holds column AWQ_ORDER[n] of its 8.
TurboMind: the u4 matrix [k, m] in 32 x 32 tiles, k-tile major; a tile is uint32 [lane 32][word 4] in the operand order of
mma.m16n8k16, so that a thread's values for one instruction are adjacent:

    k in tile = k16*16 + k8*8 + kp*2 + k1        m in tile = m16*16 + m8*8 + m1
    lane = m1*4 + kp          word = k16*2 + m16          nibble = k1*4 + k8*2 + m8   (0 is the least significant)
"""

import torch

__all__ = ["interleave_w13", "pack_scales_zeros", "pack_tiles", "unpack_awq"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
TILE = 32


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, m/8] -> uint8 [rows, m] of values 0..15, columns in natural order."""
    columns = torch.empty((*words.shape, 8), dtype=torch.uint8)
    for nibble, column in enumerate(AWQ_ORDER):
        columns[..., column] = ((words >> (4 * nibble)) & 0xF).to(torch.uint8)
    return columns.flatten(-2)


def interleave_w13(w1: torch.Tensor, w3: torch.Tensor) -> torch.Tensor:
    """Columns w1_0, w3_0, w1_1, w3_1, ..."""
    return torch.stack((w1, w3), dim=-1).flatten(-2)


def pack_tiles(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 [k, m] of values 0..15, k and m multiples of 32 -> uint8 [k m / 2], the bytes of the .qweight file."""
    k, m = nibbles.shape
    # axes:            0 k-tile   1 k16 2 k8 3 kp 4 k1 5 m-tile   6 m16 7 m8 8 m1
    parts = nibbles.reshape(k // TILE, 2, 2, 4, 2, m // TILE, 2, 2, 8)
    ordered = parts.permute(0, 5, 8, 3, 1, 6, 4, 2, 7).reshape(-1, 2)  # [..., m1, kp, k16, m16, k1, k8, m8]
    return ordered[:, 0] | (ordered[:, 1] << 4)


def pack_scales_zeros(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """[k/g, m] scales (any float) and zeros (0..15) -> int32 [k/g, m]: fp16 scale << 16 | fp16 bits of (64 + zero).

    64 + z in fp16 is 0x5400 | z << 4: the kernel's fast int4 to fp16 trick yields 64 + q, and the 64s cancel.
    """
    high = scales.to(torch.float16).view(torch.int16).to(torch.int32) << 16
    return high | 0x5400 | (zeros.to(torch.int32) << 4)
