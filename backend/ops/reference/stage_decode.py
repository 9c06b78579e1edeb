"""What a decode step needs besides weights, gathered by slot, and what it leaves there. The contracts are the Protocols `StageDecode` and
`AdvanceDecode` of `ops/table.py`."""

import torch

__all__ = ["advance_decode", "stage_decode"]


def stage_decode(
    slots: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor,
    block_tables: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    rope_factor: float,
    block_size: int,
) -> tuple[torch.Tensor, ...]:
    angles = positions.float()[:, None] * inverse_frequencies[slots]
    cos, sin = angles.cos(), angles.sin()
    if rope_factor != 1.0:
        cos, sin = cos * rope_factor, sin * rope_factor
    blocks = block_tables[slots, positions // block_size].long()
    slot_mapping = torch.where(positions >= 0, blocks * block_size + positions % block_size, -1)
    return token_ids[slots, positions], cos, sin, slot_mapping, block_tables[slots], (positions + 1).int()


def advance_decode(slots: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor, drawn: torch.Tensor) -> None:
    num_rows = drawn.shape[0]
    positions[:num_rows] += 1
    token_ids[slots[:num_rows], positions[:num_rows]] = drawn.int()
