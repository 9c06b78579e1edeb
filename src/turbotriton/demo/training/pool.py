"""Training data on the device: pools of tokenised conversations, and batches drawn from them without the host.

Examples of every kind are made once, by all cores, and lie in one flat array. A row of a batch is a conversation of many
examples one after the other, from position 0 until the row is full: the model learns to answer at any place of a long chat.

    row:  [system prompt]? example | example | example | ... | padding (what did not fit)
"""

import multiprocessing
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import phrases
from .corpus import KINDS, draw
from .tokenizer import SPECIAL_TOKENS, render

__all__ = ["Pool", "build_pool", "draw_batch", "target_ids"]

#: Relative number of distinct examples; few texts make up the kinds with fixed answers.
_SHARES = {
    "small talk": 0.15,
    "commands": 0.25,
    "unknown": 0.2,
    "stories": 0.2,
    "system prompt": 0.4,
    "memory": 0.4,
    "letters": 0.5,
}
PROMPT_POOL = "general prompt"  # a system prompt alone, put before a row


@dataclass(slots=True)
class Pool:
    """tokens: [num_tokens] int16; starts, lengths: [num_examples] int64; kind_ranges: examples of a kind, [first, end)."""

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    kind_ranges: dict[str, tuple[int, int]]


def _encode_part(job: tuple[str, int, int, str]) -> tuple[str, npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    kind, count, seed, tokenizer_json = job
    tokenizer = Tokenizer.from_str(tokenizer_json)
    if kind == PROMPT_POOL:
        texts = [render((("system", prompt),)) for prompt in phrases.ASSISTANT_PROMPTS]
    else:
        rng = random.Random(f"{seed} {kind}")
        texts = [render(draw(kind, "train", rng).messages) for _ in range(count)]
    ids = [tokenizer.encode(text).ids for text in texts]
    lengths = np.array([len(entry) for entry in ids], dtype=np.int64)
    return kind, np.concatenate([np.array(entry, dtype=np.int16) for entry in ids]), lengths


def build_pool(tokenizer: Tokenizer, num_examples: int, device: str, num_workers: int, seed: int) -> Pool:
    """`num_examples` in all; a kind's share follows _SHARES. Made by `num_workers` processes."""
    tokenizer_json = tokenizer.to_str()
    unit = num_examples / sum(_SHARES.get(kind, 1.0) for kind in KINDS)
    jobs = [(PROMPT_POOL, 0, 0, tokenizer_json)]
    for kind in KINDS:
        count = max(1, round(unit * _SHARES.get(kind, 1.0) / num_workers))
        jobs += [(kind, count, seed * 1000 + part, tokenizer_json) for part in range(num_workers)]
    if num_workers == 1:
        parts = [_encode_part(job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(num_workers) as workers:
            parts = workers.map(_encode_part, jobs, chunksize=1)
    kind_ranges: dict[str, tuple[int, int]] = {}
    count = 0
    for kind, _, lengths_of_part in parts:  # the parts of a kind are neighbours
        first = kind_ranges.get(kind, (count, count))[0]
        count += len(lengths_of_part)
        kind_ranges[kind] = (first, count)
    lengths = torch.from_numpy(np.concatenate([part[2] for part in parts])).to(device)
    tokens = torch.from_numpy(np.concatenate([part[1] for part in parts])).to(device)
    return Pool(tokens, lengths.cumsum(0) - lengths, lengths, kind_ranges)


def draw_batch(pool: Pool, weights: dict[str, float], num_rows: int, row_len: int) -> Tensor:
    """-> ids [num_rows, row_len] int64; kinds are drawn with `weights`, a quarter of the rows starts with a general prompt."""
    device = pool.tokens.device
    kinds = list(weights)
    firsts = torch.tensor([pool.kind_ranges[kind][0] for kind in kinds], device=device)
    sizes = torch.tensor([pool.kind_ranges[kind][1] for kind in kinds], device=device) - firsts
    probabilities = torch.tensor([weights[kind] for kind in kinds], device=device)
    inner = probabilities * torch.tensor(
        [kind != "system prompt" for kind in kinds], device=device
    )  # it opens a row or is not used
    num_slots = row_len // 28 + 2
    chosen = torch.multinomial(inner, num_rows * num_slots, replacement=True).view(num_rows, num_slots)
    chosen[:, 0] = torch.multinomial(probabilities, num_rows, replacement=True)
    examples = firsts[chosen] + (torch.rand(chosen.shape, device=device, dtype=torch.float64) * sizes[chosen]).long()
    prompt_first, prompt_end = pool.kind_ranges[PROMPT_POOL]
    general = torch.randint(prompt_first, prompt_end, (num_rows,), device=device)
    with_prompt = torch.rand(num_rows, device=device) < 0.25
    examples[:, 0] = torch.where(with_prompt, general, examples[:, 0])
    lengths = pool.lengths[examples]
    ends = lengths.cumsum(1)  # [num_rows, num_slots]
    offsets = torch.arange(row_len, device=device).expand(num_rows, row_len).contiguous()
    slot = torch.searchsorted(ends, offsets, right=True).clamp_(max=num_slots - 1)  # which example covers an offset
    end_of_slot = ends.gather(1, slot)
    source = pool.starts[examples].gather(1, slot) + offsets - (end_of_slot - lengths.gather(1, slot))
    ids = pool.tokens[source.clamp_(max=pool.tokens.numel() - 1)].long()
    return ids.masked_fill_((end_of_slot > row_len) | (offsets >= end_of_slot), SPECIAL_TOKENS.index("<|endoftext|>"))


def target_ids(ids: Tensor, assistant_id: int) -> Tensor:
    """ids: [num_rows, row_len] -> the next token where the assistant says it (its `<|im_end|>` included), else -100."""
    start_id, end_id = SPECIAL_TOKENS.index("<|im_start|>"), SPECIAL_TOKENS.index("<|im_end|>")
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last_start = torch.where(ids == start_id, place, -1).cummax(1).values
    last_end = torch.where(ids == end_id, place, -1).cummax(1).values
    role = ids.gather(1, (last_start + 1).clamp(0, ids.shape[1] - 1))
    spoken = (role == assistant_id) & (place >= last_start + 3) & ((last_end <= last_start) | (last_end == place)) & (ids != 0)
    targets = ids.masked_fill(~spoken, -100)
    return torch.cat((targets[:, 1:], torch.full_like(targets[:, :1], -100)), dim=1)
