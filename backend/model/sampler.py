"""Per-request sampling state by slot, and the batch that the `sample` op takes.

The draw of a token depends only on (seed, position, sample_index) and its logits: `uniform_numbers` gives one number in [0, 1)
from a counter-based generator on the host, the op inverts the cumulative distribution there. No generator state exists, so
batching, preemption and the device change nothing.

`position` is the index in its sequence of the token being drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from turbotriton.backend.ops.operands import SamplingBatch
from turbotriton.contract.wire import SamplingParams

from .transfer import to_device

__all__ = ["SamplerState", "uniform_numbers"]

U64 = npt.NDArray[np.uint64]
Words = npt.NDArray[np.int64] | npt.NDArray[np.float64]


def uniform_numbers(seeds: U64, positions: U64, sample_indices: U64) -> npt.NDArray[np.float64]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") on key = seed, counter = (position,
    sample_index, 0, 0), 32 bits a word. All [n], uint64. Returns [n]: the first 52 bits of the output, times 2^-52."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    key0, key1 = seeds & mask, seeds >> shift
    c0, c1, c2, c3 = positions & mask, sample_indices & mask, np.zeros_like(seeds), np.zeros_like(seeds)
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (product1 >> shift) ^ c1 ^ key0, product1 & mask, (product0 >> shift) ^ c3 ^ key1, product0 & mask
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & mask, (key1 + np.uint64(0xBB67AE85)) & mask
    bits = (c0 << np.uint64(20)) | (c1 >> np.uint64(12))
    return bits.astype(np.float64) * 2.0**-52


@dataclass(slots=True)
class _SlotSampling:
    """One slot's request. Written at join; `tokens` grows by each drawn token once the host knows it, and only sequences look there."""

    params: SamplingParams
    tokens: list[int]
    num_prompt_tokens: int
    banned: tuple[int, ...]  # never allowed
    banned_early: tuple[int, ...]  # not before min_new_tokens
    bad_sequences: tuple[tuple[int, ...], ...]  # two ids or more
    bad_sequences_early: tuple[tuple[int, ...], ...]
    bias: dict[int, float]  # by token id, several of one id added up

    def banned_at(self, position: int) -> Sequence[int]:
        """Ids that the token at `position` may not be."""
        is_early = position - self.num_prompt_tokens < self.params.min_new_tokens
        sequences = self.bad_sequences + self.bad_sequences_early if is_early else self.bad_sequences
        if not sequences:
            return self.banned + self.banned_early if is_early else self.banned
        assert len(self.tokens) == position, "the host must know every token before"
        ids = [*self.banned, *(self.banned_early if is_early else ())]
        return ids + [s[-1] for s in sequences if self.tokens[1 - len(s) :] == list(s[:-1])]


@dataclass(slots=True)
class SamplerState:
    """Sampling state of all slots. Numbers live in host arrays by slot and travel with a step's batch; token counts, which only
    penalties need, live on the device and are allocated when the first request with a penalty joins."""

    max_batch_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: torch.device
    slots: dict[int, _SlotSampling] = field(default_factory=dict)
    _floats: npt.NDArray[np.float32] = field(init=False)  # temperature, top_p, min_p, repetition, presence, frequency
    _seeds: U64 = field(init=False)
    _sample_indices: U64 = field(init=False)
    _top_k: npt.NDArray[np.int64] = field(init=False)
    _has_penalty: npt.NDArray[np.bool_] = field(init=False)
    _is_random: npt.NDArray[np.bool_] = field(init=False)
    _has_bans: npt.NDArray[np.bool_] = field(init=False)
    _has_bias: npt.NDArray[np.bool_] = field(init=False)
    _output_counts: torch.Tensor | None = None  # [max_batch_size, vocab_size], int32
    _seen: torch.Tensor | None = None  # [max_batch_size, vocab_size], bool
    _sent: tuple[npt.NDArray[np.int64], torch.Tensor] = field(init=False)  # a batch's numbers, here and on the device

    def __post_init__(self) -> None:
        size = self.max_batch_size
        self._sent = np.zeros(0, np.int64), torch.zeros(0, dtype=torch.int64, device=self.device)
        self._floats = np.ones((size, 6), np.float32)
        self._seeds, self._sample_indices = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
        self._top_k = np.zeros(size, np.int64)
        self._has_penalty, self._is_random = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        self._has_bans, self._has_bias = np.zeros(size, np.bool_), np.zeros(size, np.bool_)

    def join(
        self, slot: int, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int, seed: int, sample_index: int
    ) -> None:
        self.slots[slot] = state = _slot_sampling(params, token_ids, num_prompt_tokens, self.eos_token_ids, self.vocab_size)
        has_penalty = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self._floats[slot] = (
            (params.temperature or 1.0)
            if has_penalty or not params.is_greedy
            else 1.0,  # which logit is largest it does not change
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self._seeds[slot], self._sample_indices[slot] = seed, sample_index
        self._top_k[slot] = min(params.top_k or self.vocab_size, self.vocab_size)
        self._is_random[slot] = not params.is_greedy
        self._has_bans[slot] = bool(state.banned or state.banned_early or state.bad_sequences or state.bad_sequences_early)
        self._has_bias[slot] = bool(state.bias)
        self._has_penalty[slot] = has_penalty
        if has_penalty:
            self._count_known_tokens(slot, state)

    def _count_known_tokens(self, slot: int, state: _SlotSampling) -> None:
        if self._output_counts is None or self._seen is None:
            shape = (self.max_batch_size, self.vocab_size)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        tokens = np.array(state.tokens, np.int64)
        counts = np.bincount(tokens[state.num_prompt_tokens :], minlength=self.vocab_size)
        self._output_counts[slot] = to_device(counts.astype(np.int32), self.device)
        self._seen[slot] = to_device(np.bincount(tokens, minlength=self.vocab_size) > 0, self.device)

    def leave(self, slot: int) -> None:
        del self.slots[slot]

    def batch(self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> SamplingBatch:
        """slots, positions: [num_rows]; positions[r] is the index of the token that row r draws now.

        All of its numbers travel in one copy, as words of 64 bits.
        """
        floats = self._floats[slots].astype(np.float64)
        is_random = bool(self._is_random[slots].any())
        has_penalty = bool(self._has_penalty[slots].any()) and self._output_counts is not None
        has_bias = bool(self._has_bias[slots].any())
        parts: dict[str, Words] = self._bans(slots, positions)
        if has_bias or (parts and (is_random or has_penalty)):  # one kernel takes both
            nothing: dict[str, Words] = {"banned_ids": np.zeros(0, np.int64), "banned_starts": np.zeros(slots.size + 1, np.int64)}
            parts = (parts or nothing) | self._biases(slots)
        if is_random or has_penalty:
            parts["temperature"] = floats[:, 0]
        if has_penalty:
            # A slot without penalties may hold a former request's counts: its factors 1, 0, 0 make them count for nothing.
            parts |= {
                "slots": slots,
                "repetition_penalty": floats[:, 3],
                "presence_penalty": floats[:, 4],
                "frequency_penalty": floats[:, 5],
            }
        top_k = np.where(self._is_random[slots], self._top_k[slots], 1)
        if is_random:
            parts |= {
                "top_k": top_k,
                "top_p": floats[:, 1],
                "min_p": floats[:, 2],
                "uniform": uniform_numbers(self._seeds[slots], positions.astype(np.uint64), self._sample_indices[slots]),
            }
        return SamplingBatch(
            **self._on_device(parts),
            output_counts=self._output_counts if has_penalty else None,
            seen=self._seen if has_penalty else None,
            max_top_k=int(top_k.max()),
            has_top_k=bool(((top_k > 1) & (top_k < self.vocab_size)).any()),
            has_top_p=bool(((top_k == self.vocab_size) & (floats[:, 1] < 1)).any()),
        )

    def _on_device(self, parts: Mapping[str, Words]) -> dict[str, torch.Tensor]:
        if not parts:
            return {}
        words = [np.ascontiguousarray(part).view(np.int64) for part in parts.values()]
        joined = np.concatenate(words)
        sent, on_device = self._sent
        if not np.array_equal(joined, sent):  # bans of a batch stay the same for many steps
            on_device = to_device(joined, self.device)
            self._sent = joined, on_device
        split = torch.split(on_device, [part.size for part in words])
        is_float = [part.dtype == np.float64 for part in parts.values()]
        return {name: word.view(torch.float64) if f else word for name, word, f in zip(parts, split, is_float, strict=True)}

    def _bans(self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> dict[str, Words]:
        if not self._has_bans[slots].any():
            return {}
        ids = [
            self.slots[slot].banned_at(position) if self._has_bans[slot] else ()
            for slot, position in zip(slots.tolist(), positions.tolist(), strict=True)
        ]
        starts = np.cumsum([0, *map(len, ids)])
        return {"banned_ids": np.array([i for row in ids for i in row], np.int64), "banned_starts": starts} if starts[-1] else {}

    def _biases(self, slots: npt.NDArray[np.int64]) -> dict[str, Words]:
        entries = [self.slots[slot].bias for slot in slots.tolist()]
        return {
            "bias_ids": np.array([i for row in entries for i in row], np.int64),
            "bias": np.array([value for row in entries for value in row.values()], np.float64),
            "bias_starts": np.cumsum([0, *map(len, entries)]),
        }

    def append(self, slots: npt.NDArray[np.int64], drawn: torch.Tensor) -> Callable[[Sequence[int]], None]:
        """Counts the drawn token of each row on the device. drawn: [num_rows], int64, for slots[r].

        Returns what notes the same ids on the host, to be called when they are known there.
        """
        counted = np.flatnonzero(self._has_penalty[slots])
        if counted.size and self._output_counts is not None and self._seen is not None:
            rows, at = to_device(np.stack((slots[counted], counted)), self.device).unbind()
            ids = drawn[at]
            self._output_counts[rows, ids] += 1
            self._seen[rows, ids] = self._seen.new_ones(())  # a number of the host would be copied over, and waited for
        states = [self.slots[slot] for slot in slots.tolist()]  # a slot may have another request by then

        def note(token_ids: Sequence[int]) -> None:
            for state, token in zip(states, token_ids, strict=True):
                state.tokens.append(token)

        return note

    def num_logprobs(self, slots: npt.NDArray[np.int64]) -> list[int | None]:
        """How many of the most likely tokens each row's request wants to see; None: no log-probabilities."""
        return [self.slots[slot].params.num_logprobs for slot in slots.tolist()]


def _slot_sampling(
    params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int, eos_token_ids: tuple[int, ...], vocab_size: int
) -> _SlotSampling:
    """Ids outside the vocabulary can never be drawn and are dropped here. ignore_eos bans EOS, as LMDeploy does."""

    def known(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))

    def split(sequences: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        inside = [s for s in sequences if all(0 <= i < vocab_size for i in s)]
        return tuple(s[0] for s in inside if len(s) == 1), tuple(s for s in inside if len(s) > 1)

    bad_ids, bad_sequences = split(params.bad_sequences)
    stop_ids, stop_sequences = split(params.stop_sequences) if params.min_new_tokens else ((), ())
    early = (*eos_token_ids, *params.stop_token_ids, *stop_ids) if params.min_new_tokens else ()
    banned = (*bad_ids, *eos_token_ids) if params.ignore_eos else bad_ids
    bias: dict[int, float] = {}
    for token_id, value in params.logit_bias:
        if 0 <= token_id < vocab_size:
            bias[token_id] = bias.get(token_id, 0.0) + value
    return _SlotSampling(
        params, list(token_ids), num_prompt_tokens, known(banned), known(early), bad_sequences, stop_sequences, bias
    )
