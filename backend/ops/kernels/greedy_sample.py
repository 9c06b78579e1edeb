"""The first largest logit of each row, banned ids left out.

Tiling: a program finds the largest of BLOCK_V logits of one row; a second kernel with a program a row picks among those.

    logits [num_rows, vocab]    | BLOCK_V | BLOCK_V | ... |   ->  (value, id) [num_rows, num_tiles]  ->  id [num_rows]

Ties go to the smaller id in both. A row without one finite logit gives its first id that is not NaN.
"""

import torch
import triton
import triton.language as tl

from .launch import has_pdl, launch_options, wait_for_previous
from .tuning import ceil_div, greedy_sample_config, next_power_of_2

__all__ = ["greedy_sample", "pick_kernel"]


# starts and ids are parts of one packed array: whether they are aligned must not choose another compiled kernel
@triton.jit(do_not_specialize=["starts_ptr", "banned_ptr", "num_tiles"])
def _tile_maximum_kernel(
    logits_ptr,
    starts_ptr,
    banned_ptr,
    value_ptr,
    id_ptr,
    num_tiles,
    stride_row,
    VOCAB: tl.constexpr,
    HAS_BANS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + row * stride_row + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    if HAS_BANS:
        for at in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
            logits = tl.where(ids == tl.load(banned_ptr + at), float("-inf"), logits)
    value = tl.max(logits, axis=0)
    first = tl.min(tl.where(logits == value, ids, VOCAB), axis=0)
    tl.store(value_ptr + row * num_tiles + tile, value)
    tl.store(id_ptr + row * num_tiles + tile, first)


@triton.jit(do_not_specialize=["num_tiles"])
def pick_kernel(value_ptr, id_ptr, out_ptr, num_tiles, VOCAB: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK_T)
    mask = tiles < num_tiles
    values = tl.load(value_ptr + row * num_tiles + tiles, mask=mask, other=float("-inf"))
    ids = tl.load(id_ptr + row * num_tiles + tiles, mask=mask, other=VOCAB)
    first = tl.min(tl.where(values == tl.max(values, axis=0), ids, VOCAB), axis=0)
    tl.store(out_ptr + row, tl.minimum(first, VOCAB - 1).to(tl.int64))


def greedy_sample(
    logits: torch.Tensor, banned_starts: torch.Tensor | None = None, banned_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Launch on the current device and stream. `logits` are not modified.

    logits: [num_rows, vocab_size], fp16|bf16|fp32, rows of any stride, contiguous inside a row
    banned_starts: [num_rows + 1], int64: row i may not get banned_ids[banned_starts[i] : banned_starts[i + 1]] (int64); or both None

    Returns [num_rows], int64, new. num_rows may be 0.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 or vocab_size == 1, "logits must be contiguous inside a row"
    assert (banned_starts is None) == (banned_ids is None), "starts and ids come together"
    out = torch.empty((num_rows,), dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    config = greedy_sample_config(vocab_size)
    num_tiles = ceil_div(vocab_size, config.block_v)
    values = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=logits.device)
    _tile_maximum_kernel[(num_rows, num_tiles)](
        logits,
        banned_starts,
        banned_ids,
        values,
        ids,
        num_tiles,
        logits.stride(0),
        VOCAB=vocab_size,
        HAS_BANS=banned_ids is not None,
        BLOCK_V=config.block_v,
        num_warps=config.num_warps,
        **launch_options(has_pdl(logits.device)),
    )
    pick_kernel[(num_rows,)](
        values,
        ids,
        out,
        num_tiles,
        VOCAB=vocab_size,
        BLOCK_T=next_power_of_2(num_tiles),
        num_warps=1,
        **launch_options(has_pdl(logits.device)),
    )
    return out
