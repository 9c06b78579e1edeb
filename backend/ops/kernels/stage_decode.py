"""What a decode step needs besides weights, gathered by slot in one launch: a program a row. And what it leaves there.

token id = token_ids[slot, position]       slot mapping = block_tables[slot, position // block_size] * block_size + offset
cos, sin = of position * inverse_frequencies[slot]      block table = block_tables[slot]      context length = position + 1
"""

import torch
import triton
import triton.language as tl

from .fast_launch import launch
from .launch import has_pdl, launch_options, wait_for_previous
from .tuning import ceil_div, next_power_of_2

__all__ = ["advance_decode", "stage_decode"]

ADVANCED_ROWS = 32  # a program


@triton.jit
def _stage_decode_kernel(
    slots_ptr,
    positions_ptr,
    token_ids_ptr,
    block_tables_ptr,
    inverse_ptr,
    out_ids_ptr,
    out_cos_ptr,
    out_sin_ptr,
    out_mapping_ptr,
    out_tables_ptr,
    out_lens_ptr,
    rope_factor,
    stride_ids_slot,
    stride_tables_slot,
    stride_inverse_slot,
    HALF: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    position = tl.load(positions_ptr + row)
    known = tl.maximum(position, 0)  # padding is at -1: it reads what is there and marks itself as nothing
    tl.store(out_ids_ptr + row, tl.load(token_ids_ptr + slot * stride_ids_slot + known))
    block = tl.load(block_tables_ptr + slot * stride_tables_slot + known // BLOCK_SIZE).to(tl.int64)
    tl.store(out_mapping_ptr + row, tl.where(position >= 0, block * BLOCK_SIZE + known % BLOCK_SIZE, -1))
    tl.store(out_lens_ptr + row, (position + 1).to(tl.int32))

    offs = tl.arange(0, BLOCK_HALF)
    mask = offs < HALF
    angles = position.to(tl.float32) * tl.load(inverse_ptr + slot * stride_inverse_slot + offs, mask=mask, other=0.0)
    tl.store(out_cos_ptr + row * HALF + offs, tl.cos(angles) * rope_factor, mask=mask)
    tl.store(out_sin_ptr + row * HALF + offs, tl.sin(angles) * rope_factor, mask=mask)

    entries = tl.arange(0, BLOCK_T)
    is_entry = entries < MAX_BLOCKS
    table = tl.load(block_tables_ptr + slot * stride_tables_slot + entries, mask=is_entry, other=0)
    tl.store(out_tables_ptr + row * MAX_BLOCKS + entries, table, mask=is_entry)


def stage_decode(
    slots: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor,
    block_tables: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    rope_factor: float,
    block_size: int,
) -> tuple[torch.Tensor, ...]:
    """Launch on the current device and stream. Shapes and results: `StageDecode` in ops/table.py; all inputs contiguous in a row."""
    num_rows, max_blocks, half = slots.shape[0], block_tables.shape[1], inverse_frequencies.shape[1]
    device = slots.device
    assert slots.is_contiguous(), "slots must be contiguous"
    assert positions.is_contiguous(), "positions must be contiguous"
    out_ids = torch.empty((num_rows,), dtype=token_ids.dtype, device=device)
    cos = torch.empty((num_rows, half), dtype=torch.float32, device=device)
    sin = torch.empty((num_rows, half), dtype=torch.float32, device=device)
    mapping = torch.empty((num_rows,), dtype=torch.int64, device=device)
    tables = torch.empty((num_rows, max_blocks), dtype=torch.int32, device=device)
    lens = torch.empty((num_rows,), dtype=torch.int32, device=device)
    if num_rows:
        _stage_decode_kernel[(num_rows,)](
            slots,
            positions,
            token_ids,
            block_tables,
            inverse_frequencies,
            out_ids,
            cos,
            sin,
            mapping,
            tables,
            lens,
            rope_factor,
            token_ids.stride(0),
            block_tables.stride(0),
            inverse_frequencies.stride(0),
            HALF=half,
            MAX_BLOCKS=max_blocks,
            BLOCK_SIZE=block_size,
            BLOCK_HALF=next_power_of_2(half),
            BLOCK_T=next_power_of_2(max_blocks),
            num_warps=4,
            **launch_options(has_pdl(device)),
        )
    return out_ids, cos, sin, mapping, tables, lens


@triton.jit(do_not_specialize=["positions_ptr", "num_rows"])  # positions follow the slots, of which there may be an odd number
def _advance_decode_kernel(
    slots_ptr, positions_ptr, token_ids_ptr, drawn_ptr, num_rows, stride_ids_slot, ROWS: tl.constexpr, PDL: tl.constexpr
):
    wait_for_previous(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=mask, other=0)
    positions = tl.load(positions_ptr + rows, mask=mask, other=0) + 1
    drawn = tl.load(drawn_ptr + rows, mask=mask, other=0)
    tl.store(token_ids_ptr + slots * stride_ids_slot + positions, drawn.to(tl.int32), mask=mask)
    tl.store(positions_ptr + rows, positions, mask=mask)


def advance_decode(slots: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor, drawn: torch.Tensor) -> None:
    """Launch on the current device and stream. Shapes and effect: `AdvanceDecode` in ops/table.py; all contiguous in a row."""
    num_rows = drawn.shape[0]
    assert slots.is_contiguous(), "slots must be contiguous"
    assert positions.is_contiguous(), "positions must be contiguous"
    if num_rows:
        launch(
            _advance_decode_kernel,
            (ceil_div(num_rows, ADVANCED_ROWS),),
            slots,
            positions,
            token_ids,
            drawn,
            num_rows,
            token_ids.stride(0),
            ROWS=ADVANCED_ROWS,
            num_warps=1,
            **launch_options(has_pdl(drawn.device)),
        )
