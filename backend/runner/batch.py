"""Slot-indexed state of the running requests, and the tensors of one step made from it.

    by slot, on the device: token_ids [max_batch_size, session_len + 1]   block_tables [max_batch_size, max_blocks]
                            inverse frequencies [max_batch_size, rotary_dim / 2]
    a step brings:          one array of integers (slot and position of each token, slot and context of each row, sampled rows)

Everything else of a step is gathered on the device. Only this module writes the state: join, add_blocks, append, advance.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from turbotriton.backend.model.decoder import logn_scale
from turbotriton.backend.model.rope import attention_factor, cos_sin, inverse_frequencies
from turbotriton.backend.model.transfer import to_device
from turbotriton.backend.ops.operands import AttentionBatch
from turbotriton.backend.ops.table import AdvanceDecode, StageDecode
from turbotriton.backend.scheduling.plan import JoinedRequest, NewBlocks, ScheduledRow
from turbotriton.contract.ini import EngineConfig, ModelConfig

__all__ = ["SlotState", "StepInputs", "StepLayout", "layout_of"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """token_ids: [num_tokens], int64;  batch: what attention needs;  sampled_tokens: [num_sampled], each sampled row's last token

    On the host, in the plan's order: row_begins: [num_rows], each row's first token;  sampled_slots, [num_sampled];  sampled_positions,
    [num_sampled], where the drawn token will stand.
    """

    token_ids: torch.Tensor
    batch: AttentionBatch
    sampled_tokens: torch.Tensor
    row_begins: I64
    sampled_slots: I64
    sampled_positions: I64


class StepLayout(NamedTuple):
    """Where a step's rows lie, on the host. Up to cu_seqlens in the order of attention: rows of one token, its decodes, then the longer
    chunks, each kind in the plan's order; the rest is as StepInputs has it."""

    tokens: I64  # [2, num_tokens]: slots and positions
    slots: I64  # of rows
    contexts: I64
    lens: I64
    num_decodes: int
    cu_seqlens: I64
    sampled_tokens: I64
    row_begins: I64
    sampled_slots: I64
    sampled_positions: I64


class SlotState:
    def __init__(self, model: ModelConfig, engine: EngineConfig, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._block_size = engine.cache_block_seq_len
        max_blocks = -(-(engine.session_len + 1) // self._block_size)
        size = engine.max_batch_size
        self._token_ids = torch.zeros((size, engine.session_len + 1), dtype=torch.int32, device=device)
        self._block_tables = torch.zeros((size, max_blocks), dtype=torch.int32, device=device)
        self._inverse = torch.zeros((size, model.rope.dim // 2), dtype=torch.float32, device=device)
        self._num_blocks = [0] * size  # host: entries in use of each block table
        self._inverse_for = functools.lru_cache(maxsize=256)(
            lambda theta: to_device(inverse_frequencies(model.rope, theta).numpy(), device)  # most models have one theta
        )
        self._rope_factor = attention_factor(model.rope)

    def join(self, request: JoinedRequest) -> None:
        slot = request.slot
        self._token_ids[slot, : len(request.token_ids)] = to_device(np.array(request.token_ids, np.int32), self._device)
        self._inverse[slot] = self._inverse_for(request.rope_theta)
        self._num_blocks[slot] = 0
        self.add_blocks([NewBlocks(slot, request.block_ids)])

    def add_blocks(self, additions: Sequence[NewBlocks]) -> None:
        entries: list[tuple[int, int, int]] = []
        for addition in additions:
            first = self._num_blocks[addition.slot]
            entries += [(addition.slot, first + i, block) for i, block in enumerate(addition.block_ids)]
            self._num_blocks[addition.slot] = first + len(addition.block_ids)
        if entries:
            slots, columns, blocks = to_device(np.array(entries, np.int64), self._device).unbind(1)
            self._block_tables[slots, columns] = blocks.int()

    def append(self, slots: I64, positions: I64, token_ids: torch.Tensor) -> None:
        """Writes the drawn token of each row at its position. token_ids: [num_sampled], int64, on the device."""
        at = to_device(np.stack((slots, positions)), self._device)
        self._token_ids[at[0], at[1]] = token_ids.int()

    def advance(self, advance: AdvanceDecode, inputs: torch.Tensor, drawn: torch.Tensor) -> None:
        """`append` at the positions after `inputs`, [2, num_rows or more], int64: slots and positions on the device, which go on by one."""
        slots, positions = inputs.unbind()
        advance(slots, positions, self._token_ids, drawn)

    def decode_inputs(
        self, stage: StageDecode, slots: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, AttentionBatch]:
        """One token a row, from device tensors alone, for any context up to session_len: a graph can capture it.

        slots, positions: [num_rows], int64; position -1 is padding: it sees no key and stores none. Returns (token_ids, batch).
        """
        model = self._model
        token_ids, cos, sin, slot_mapping, block_tables, context_lens = stage(
            slots, positions, self._token_ids, self._block_tables, self._inverse, self._rope_factor, self._block_size
        )
        batch = AttentionBatch(
            cos=cos,
            sin=sin,
            q_scale=logn_scale(positions, model.rope.max_position_embeddings) if model.use_logn_attn else None,
            slot_mapping=slot_mapping,
            block_tables=block_tables,
            context_lens=context_lens,
            num_decodes=slots.shape[0],
            max_decode_context=block_tables.shape[1] * self._block_size,
            cu_seqlens_q=context_lens[:1],  # of no prefill: not read
            prefills=(),
            is_captured=True,
        )
        return token_ids, batch

    def chunk_inputs(self, chunk: torch.Tensor, size: int) -> tuple[torch.Tensor, AttentionBatch, torch.Tensor]:
        """One chunk of at most `size` tokens, padded to them, from device tensors alone: a graph can capture it.

        chunk: [3], int64: slot, start, number of tokens. Returns (token_ids, batch, [1] place of the last token).
        """
        slot, start, count = chunk[:1], chunk[1:2], chunk[2:]
        offsets = torch.arange(size, device=self._device)
        positions = torch.where(offsets < count, start + offsets, -1)
        token_ids, batch = self.padded_inputs(slot.expand(size), positions)
        batch = replace(
            batch,
            block_tables=self._block_tables[slot],
            context_lens=(start + count).int(),
            cu_seqlens_q=torch.cat((torch.zeros_like(count), count)).int(),
            prefills=((size, self._block_tables.shape[1] * self._block_size),),  # at most: the device knows
        )
        return token_ids, batch, count - 1

    def padded_inputs(self, slots: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, AttentionBatch]:
        """Tokens of any rows, from device tensors alone: a graph can capture it.

        slots, positions: [num_tokens], int64; position -1 is padding, which stores nothing. Returns (token_ids, a batch without rows).
        """
        known = positions.clamp(min=0)
        batch = self._batch_of_tokens(slots, known)
        batch = replace(batch, slot_mapping=torch.where(positions >= 0, batch.slot_mapping, -1))
        return self._token_ids[slots, known].long(), batch

    def rows_of(self, layout: StepLayout, token_ids: torch.Tensor, batch: AttentionBatch) -> StepInputs:
        """`step_inputs` of rows whose tokens are known: token_ids and batch are those of `padded_inputs`."""
        parts = layout.slots, layout.contexts, layout.cu_seqlens, layout.sampled_tokens
        slots, contexts, cu_seqlens, sampled_tokens = self._staged(parts)
        return self._inputs(layout, token_ids, self._with_rows(batch, layout, slots, contexts, cu_seqlens), sampled_tokens)

    def step_inputs(self, rows: Sequence[ScheduledRow]) -> StepInputs:
        """Rows of one token first (attention's decodes), then the longer chunks, each kind in the plan's order."""
        layout = layout_of(rows)
        parts = *layout.tokens, layout.slots, layout.contexts, layout.cu_seqlens, layout.sampled_tokens
        token_slots, positions, slots, contexts, cu_seqlens, sampled_tokens = self._staged(parts)
        batch = self._with_rows(self._batch_of_tokens(token_slots, positions), layout, slots, contexts, cu_seqlens)
        return self._inputs(layout, self._token_ids[token_slots, positions].long(), batch, sampled_tokens)

    def _staged(self, parts: Sequence[I64]) -> tuple[torch.Tensor, ...]:
        """The parts on the device, in one copy."""
        return torch.split(to_device(np.concatenate(parts), self._device), [part.size for part in parts])

    def _batch_of_tokens(self, slots: torch.Tensor, positions: torch.Tensor) -> AttentionBatch:
        """Without rows. slots, positions: [num_tokens], int64."""
        cos, sin = cos_sin(self._inverse[slots], positions, self._rope_factor)
        blocks = self._block_tables[slots, positions // self._block_size].long()
        model = self._model
        return AttentionBatch(
            cos=cos,
            sin=sin,
            q_scale=logn_scale(positions, model.rope.max_position_embeddings) if model.use_logn_attn else None,
            slot_mapping=blocks * self._block_size + positions % self._block_size,
            block_tables=self._block_tables[:0],
            context_lens=self._block_tables[:0, 0],
            num_decodes=0,
            max_decode_context=0,
            cu_seqlens_q=self._block_tables[:1, 0],  # of no prefill: not read
            prefills=(),
        )

    def _with_rows(
        self, batch: AttentionBatch, layout: StepLayout, slots: torch.Tensor, contexts: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> AttentionBatch:
        n = layout.num_decodes
        max_blocks = -(-int(layout.contexts.max()) // self._block_size)
        return replace(
            batch,
            block_tables=self._block_tables[slots, :max_blocks],
            context_lens=contexts.int(),
            num_decodes=n,
            max_decode_context=int(layout.contexts[:n].max()) if n else 0,
            cu_seqlens_q=cu_seqlens.int(),
            prefills=tuple(zip(layout.lens[n:].tolist(), layout.contexts[n:].tolist(), strict=True)),
        )

    @staticmethod
    def _inputs(layout: StepLayout, token_ids: torch.Tensor, batch: AttentionBatch, sampled_tokens: torch.Tensor) -> StepInputs:
        on_host = layout.row_begins, layout.sampled_slots, layout.sampled_positions
        return StepInputs(token_ids, batch, sampled_tokens, *on_host)


def layout_of(rows: Sequence[ScheduledRow]) -> StepLayout:
    order = sorted(range(len(rows)), key=lambda index: rows[index].num_tokens > 1)
    table = np.array([(rows[i].slot, rows[i].start, rows[i].num_tokens) for i in order], np.int64)
    slots, starts, lens = table.T
    ends = np.cumsum(lens)
    begins, contexts = ends - lens, starts + lens
    num_decodes = int((lens == 1).sum())
    row_begins = np.empty_like(ends)
    row_begins[order] = begins
    place = {index: at for at, index in enumerate(order)}
    sampled = np.array([place[i] for i, row in enumerate(rows) if row.samples], np.int64)
    return StepLayout(
        tokens=np.stack((np.repeat(slots, lens), np.arange(ends[-1]) + np.repeat(starts - begins, lens))),
        slots=slots,
        contexts=contexts,
        lens=lens,
        num_decodes=num_decodes,
        cu_seqlens=np.concatenate(([0], ends[num_decodes:] - num_decodes)),
        sampled_tokens=ends[sampled] - 1,
        row_begins=row_begins,
        sampled_slots=slots[sampled],
        sampled_positions=contexts[sampled],
    )
