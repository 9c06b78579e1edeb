"""Drawing the next token of each row: biases, bans, temperature, penalties, top-k, top-p, min-p and the draw; nothing is waited for.

    prepare   logits -> shaped logits where something shapes them; the largest of each tile
    (filter   the smallest weight that is kept: sample_filter.py, three launches, where some row has top-k or top-p)
    draw      kept weights of each tile added up; the last program of a row finds the tile, then the id, at which the running sum
              passes floor(uniform * sum)

Tiling: programs are (row, tile of BLOCK_V ids), so that one row fills many multiprocessors. Greedy rows of a mixed batch take their first
largest logit. Weights are made anew from the logits in each launch: a few operations on what lies in the L2 cache.
"""

import torch
import triton
import triton.language as tl

from ..operands import SamplingBatch
from .greedy_sample import greedy_sample, pick_kernel
from .launch import has_pdl, launch_options, wait_for_previous
from .sample_filter import NUM_BINS, bins_kernel, refine_kernel
from .sample_search import search_kernel
from .sample_weights import EXACT, PACKED_NUMBERS, draws_randomly, row_largest, searches, shaped, smallest_by_min_p, tile_weights
from .split_sum import NUM_COUNTERS, is_last_of, workspace
from .tuning import SampleConfig, ceil_div, next_power_of_2, sample_config

__all__ = ["sample"]


@triton.jit(do_not_specialize=PACKED_NUMBERS)
def _prepare_kernel(
    logits_ptr,
    temperature_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    slots_ptr,
    counts_ptr,
    seen_ptr,
    bias_starts_ptr,
    bias_ids_ptr,
    bias_ptr,
    banned_starts_ptr,
    banned_ids_ptr,
    shaped_ptr,
    values_ptr,
    ids_ptr,
    stride_row,
    VOCAB: tl.constexpr,
    NUM_TILES: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
    HAS_ENTRIES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Biased and banned ids of a tile are stored once more, over what stands there, BLOCK_E at a time: biases before bans."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    first_id = tile * BLOCK_V
    ids = first_id + tl.arange(0, BLOCK_V)
    mask = ids < VOCAB
    row_ptr = logits_ptr + row * stride_row
    line = row * VOCAB
    logits = tl.load(row_ptr + ids, mask=mask, other=float("-inf")).to(tl.float32)
    logits = shaped(
        logits,
        ids,
        mask,
        row,
        temperature_ptr,
        repetition_ptr,
        presence_ptr,
        frequency_ptr,
        slots_ptr,
        counts_ptr,
        seen_ptr,
        VOCAB,
        HAS_TEMPERATURE,
        HAS_PENALTIES,
    )
    if HAS_PENALTIES or HAS_ENTRIES:
        tl.store(shaped_ptr + line + ids, logits, mask=mask)
    if HAS_ENTRIES:
        tl.debug_barrier()
        end = tl.load(bias_starts_ptr + row + 1)
        for begin in range(tl.load(bias_starts_ptr + row), end, BLOCK_E):
            at = begin + tl.arange(0, BLOCK_E)
            biased = tl.load(bias_ids_ptr + at, mask=at < end, other=-1)
            is_mine = (biased >= first_id) & (biased < first_id + BLOCK_V)
            raised = tl.load(row_ptr + biased, mask=is_mine, other=0.0).to(tl.float32)
            raised += tl.load(bias_ptr + at, mask=is_mine, other=0.0).to(tl.float32)
            raised = shaped(
                raised,
                biased,
                is_mine,
                row,
                temperature_ptr,
                repetition_ptr,
                presence_ptr,
                frequency_ptr,
                slots_ptr,
                counts_ptr,
                seen_ptr,
                VOCAB,
                HAS_TEMPERATURE,
                HAS_PENALTIES,
            )
            tl.store(shaped_ptr + line + biased, raised, mask=is_mine)
        tl.debug_barrier()
        end = tl.load(banned_starts_ptr + row + 1)
        for begin in range(tl.load(banned_starts_ptr + row), end, BLOCK_E):
            at = begin + tl.arange(0, BLOCK_E)
            banned = tl.load(banned_ids_ptr + at, mask=at < end, other=-1)
            is_mine = (banned >= first_id) & (banned < first_id + BLOCK_V)
            tl.store(shaped_ptr + line + banned, tl.full((BLOCK_E,), float("-inf"), tl.float32), mask=is_mine)
        tl.debug_barrier()
        logits = tl.load(shaped_ptr + line + ids, mask=mask, other=float("-inf"))
    logits = tl.where(mask, logits, float("-inf"))
    value = tl.max(logits, axis=0)
    tl.store(values_ptr + row * NUM_TILES + tile, value)
    tl.store(ids_ptr + row * NUM_TILES + tile, tl.min(tl.where(logits == value, ids, VOCAB), axis=0))


@triton.jit(do_not_specialize=PACKED_NUMBERS)
def _draw_kernel(
    source_ptr,
    temperature_ptr,
    values_ptr,
    ids_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    smallest_ptr,
    totals_ptr,
    counters_ptr,
    out_ptr,
    stride_row,
    VOCAB: tl.constexpr,
    NUM_TILES: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    top_k = tl.load(top_k_ptr + row)
    tiles, values, largest = row_largest(values_ptr, row, NUM_TILES, BLOCK_T)
    if not draws_randomly(top_k, largest):
        if tile == 0:
            ids = tl.load(ids_ptr + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=VOCAB)
            first = tl.min(tl.where(values == largest, ids, VOCAB), axis=0)
            tl.store(out_ptr + row, tl.minimum(first, VOCAB - 1).to(tl.int64))
        return
    smallest = smallest_by_min_p(tl.load(min_p_ptr + row))
    if searches(top_k, tl.load(top_p_ptr + row), VOCAB):
        smallest = tl.load(smallest_ptr + row)
    weights = tile_weights(source_ptr, temperature_ptr, tile, row, largest, stride_row, VOCAB, HAS_TEMPERATURE, BLOCK_V)
    wide = weights.to(tl.int64)
    tl.store(totals_ptr + row * NUM_TILES + tile, tl.sum(tl.where(wide >= smallest, wide, 0), axis=0))
    if is_last_of(counters_ptr + row, NUM_TILES):
        sums = tl.load(totals_ptr + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=0, cache_modifier=".cg")
        total = tl.sum(sums, axis=0)
        target = tl.minimum((tl.load(uniform_ptr + row) * total.to(tl.float64)).to(tl.int64), total - 1)
        chosen = tl.sum((tl.cumsum(sums, axis=0) <= target).to(tl.int32), axis=0)
        before = tl.sum(tl.where(tiles < chosen, sums, 0), axis=0)
        weights = tile_weights(source_ptr, temperature_ptr, chosen, row, largest, stride_row, VOCAB, HAS_TEMPERATURE, BLOCK_V)
        wide = weights.to(tl.int64)
        running = before + tl.cumsum(tl.where(wide >= smallest, wide, 0), axis=0)
        drawn = chosen * BLOCK_V + tl.sum((running <= target).to(tl.int32), axis=0)
        tl.store(out_ptr + row, drawn.to(tl.int64))


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Launch on the current device and stream; nothing is read back. Plain greedy rows alone: two launches, random ones two, five at
    most. The contract is the Protocol `Sample` of `ops/table.py`.

    logits: [num_rows, vocab_size < 2^19], fp16|bf16|fp32, rows of any stride, contiguous inside a row; not modified
    batch: its tensors contiguous. Returns [num_rows], int64, new. num_rows may be 0.
    """
    num_rows, vocab_size = logits.shape
    if batch.is_plain_greedy or num_rows == 0:
        return greedy_sample(logits, batch.banned_starts, batch.banned_ids)
    assert logits.stride(1) == 1 or vocab_size == 1, "logits must be contiguous inside a row"
    assert vocab_size < 2**19, f"{vocab_size} tokens: their weights would pass 63 bits"
    assert num_rows <= NUM_COUNTERS, f"{num_rows} rows are more than {NUM_COUNTERS}"
    config, device = sample_config(num_rows, vocab_size), logits.device
    grid = (num_rows, ceil_div(vocab_size, config.block_v))
    values = torch.empty(grid, dtype=torch.float32, device=device)
    ids = torch.empty(grid, dtype=torch.int32, device=device)
    out = torch.empty((num_rows,), dtype=torch.int64, device=device)
    source, temperature = _prepare(logits, batch, values, ids, config)
    tiles = {"NUM_TILES": grid[1], "BLOCK_T": next_power_of_2(grid[1])}
    pdl = launch_options(has_pdl(device))
    if batch.top_k is None:
        pick_kernel[(num_rows,)](values, ids, out, grid[1], VOCAB=vocab_size, BLOCK_T=tiles["BLOCK_T"], num_warps=1, **pdl)
        return out
    options: dict[str, object] = {"num_warps": config.num_warps, "BLOCK_V": config.block_v, **tiles, **EXACT, **pdl}
    options |= {"VOCAB": vocab_size, "HAS_TEMPERATURE": temperature is not None}
    smallest = torch.empty((num_rows,), dtype=torch.int64, device=device)
    counters, stride = workspace(device)[1], source.stride(0)
    if batch.has_top_k or batch.has_top_p:
        _find_smallest_kept(smallest, (source, temperature, values, batch.top_k, batch.top_p), batch, counters, options)
    totals = torch.empty(grid, dtype=torch.int64, device=device)
    numbers = (batch.top_k, batch.top_p, batch.min_p, batch.uniform)
    _draw_kernel[grid](source, temperature, values, ids, *numbers, smallest, totals, counters, out, stride, **options)
    return out


def _prepare(
    logits: torch.Tensor, batch: SamplingBatch, values: torch.Tensor, ids: torch.Tensor, config: SampleConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """values, ids: [num_rows, num_tiles], written. Returns the logits that are drawn from and what is left to divide them by."""
    num_rows, vocab_size = logits.shape
    has_penalties, has_entries = batch.output_counts is not None, batch.bias_ids is not None or batch.banned_ids is not None
    shaped_logits = None
    if has_penalties or has_entries:
        shaped_logits = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=logits.device)
    bias_starts, banned_starts = batch.bias_starts, batch.banned_starts
    if has_entries and (bias_starts is None or banned_starts is None):
        none = torch.zeros(num_rows + 1, dtype=torch.int64, device=logits.device)
        bias_starts, banned_starts = (none if starts is None else starts for starts in (bias_starts, banned_starts))
    _prepare_kernel[(num_rows, values.shape[1])](
        logits,
        batch.temperature,
        batch.repetition_penalty,
        batch.presence_penalty,
        batch.frequency_penalty,
        batch.slots,
        batch.output_counts,
        None if batch.seen is None else batch.seen.view(torch.uint8),
        bias_starts,
        bias_starts if batch.bias_ids is None else batch.bias_ids,
        bias_starts if batch.bias is None else batch.bias,
        banned_starts,
        banned_starts if batch.banned_ids is None else batch.banned_ids,
        shaped_logits,
        values,
        ids,
        logits.stride(0),
        VOCAB=vocab_size,
        NUM_TILES=values.shape[1],
        HAS_TEMPERATURE=batch.temperature is not None,
        HAS_PENALTIES=has_penalties,
        HAS_ENTRIES=has_entries,
        BLOCK_V=config.block_v,
        BLOCK_E=64,
        num_warps=config.num_warps,
        **EXACT,
        **launch_options(has_pdl(logits.device)),
    )
    return (logits, batch.temperature) if shaped_logits is None else (shaped_logits, None)


def _find_smallest_kept(
    smallest: torch.Tensor,
    tops: tuple[torch.Tensor | None, ...],
    batch: SamplingBatch,
    counters: torch.Tensor,
    options: dict[str, object],
) -> None:
    """Writes the smallest weight kept of each row with top-k or top-p. smallest: [num_rows], int64.

    tops: source [num_rows, vocab_size], temperature, values [num_rows, num_tiles], top_k, top_p
    """
    source, _, values, _, _ = tops
    assert source is not None
    assert values is not None
    grid, device, stride = (values.shape[0], values.shape[1]), source.device, source.stride(0)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    counts, masses = empty(*grid, NUM_BINS.value, dtype=torch.int32), empty(*grid, NUM_BINS.value, dtype=torch.int64)
    total, base = empty(grid[0], dtype=torch.int64), empty(grid[0], dtype=torch.int64)
    low, high, num = (empty(grid[0], dtype=torch.int32) for _ in range(3))
    found = (total, base, low, high, num, empty(grid[0], grid[1] + 1, dtype=torch.int32))
    bins_kernel[grid](*tops, counts, masses, empty(*grid, dtype=torch.int64), *found, counters, stride, **options)
    if batch.has_top_p:
        refine_kernel[grid](*tops, counts, masses, *found, counters, stride, **options)
    max_copied = sample_config(grid[0], source.shape[1]).max_copied
    copied = empty(grid[0], max_copied, dtype=torch.float32)
    search_kernel[grid](*tops, batch.min_p, *found, copied, smallest, counters, max_copied, stride, **options)
