"""Each op of each column against an independent float64 computation. An op without a case here fails."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch

from turbotriton.backend.ops.operands import AttentionBatch, DenseWeight, NormWeight, QkvWeights, SamplingBatch, whole
from turbotriton.backend.ops.reference import primitives
from turbotriton.backend.ops.table import REFERENCE, OpTable, ops_for, reference_ops

torch.set_num_threads(1)

COLUMNS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# One rounding of the result each: unit roundoff times a small factor for the sums inside.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclasses.dataclass
class Setting:
    ops: OpTable
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype).to(self.device)

    def linear(self, rows: int, columns: int, *, bias: bool = False) -> DenseWeight:
        """Contiguous along its inputs, as weights lie on a GPU."""
        return DenseWeight(self.randn(columns, rows, scale=rows**-0.5).t(), self.randn(columns) if bias else None)

    def close(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """Maximum and RMS error relative to the wanted RMS."""
        assert found.dtype == self.dtype
        assert found.shape == wanted.shape
        if found.numel() == 0:
            return
        error = found.double().cpu() - wanted.double().cpu()
        rms = wanted.double().square().mean().sqrt().item()
        assert error.square().mean().sqrt().item() <= TOLERANCE[self.dtype] * rms
        assert error.abs().max().item() <= 8 * TOLERANCE[self.dtype] * rms


def f64(weight: DenseWeight, x: torch.Tensor) -> torch.Tensor:
    y = x @ weight.weight.double().cpu()
    return y if weight.bias is None else y + weight.bias.double().cpu()


def norm64(x: torch.Tensor, norm: NormWeight) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double().cpu()


def case_stage_decode(s: Setting) -> None:
    ids = torch.arange(3 * 21, dtype=torch.int32).view(3, 21).to(s.device)
    tables = torch.tensor([[4, 9, 1], [7, 2, 0], [3, 5, 8]], dtype=torch.int32).to(s.device)
    inverse = torch.tensor([[1.0, 0.1], [0.5, 0.01], [2.0, 0.2]]).to(s.device)
    slots, positions = torch.tensor([2, 0, 1]).to(s.device), torch.tensor([9, 0, -1]).to(s.device)
    found, cos, sin, mapping, gathered, lens = s.ops.stage_decode(slots, positions, ids, tables, inverse, 1.5, 8)
    assert found.tolist()[:2] == [2 * 21 + 9, 0]
    assert mapping.tolist() == [5 * 8 + 1, 4 * 8, -1]
    assert lens.tolist() == [10, 1, 0]
    assert gathered.tolist()[:2] == [[3, 5, 8], [4, 9, 1]]
    for row, (position, frequencies) in enumerate(((9, (2.0, 0.2)), (0, (1.0, 0.1)))):
        for column, frequency in enumerate(frequencies):
            assert abs(float(cos[row, column]) - 1.5 * math.cos(position * frequency)) < 1e-5
            assert abs(float(sin[row, column]) - 1.5 * math.sin(position * frequency)) < 1e-5


def case_advance_decode(s: Setting) -> None:
    ids = torch.arange(3 * 21, dtype=torch.int32).view(3, 21)
    inputs = torch.tensor([[2, 0, 1], [9, 0, -1]]).to(s.device)  # the last is padding
    found = ids.to(s.device)
    s.ops.advance_decode(*inputs.unbind(), found, torch.tensor([900, 901]).to(s.device))
    ids[2, 10], ids[0, 1] = 900, 901
    assert found.tolist() == ids.tolist()
    assert inputs.tolist() == [[2, 0, 1], [10, 1, -1]]


def case_embed(s: Setting) -> None:
    weight = s.randn(37, 24)
    ids = torch.tensor([0, 36, 5, 5])
    s.close(s.ops.embed(ids.to(s.device), weight), weight.cpu()[ids])


NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, HIDDEN = 6, 2, 16, 8, 40
DECODE_CONTEXTS, PREFILLS = (1, 8, 21), ((5, 5), (3, 12), (9, 17))


def attention_batch(s: Setting, *, rotary_dim: int = HEAD_DIM, logn: bool = False) -> AttentionBatch:
    """Rows over a shuffled pool: each row's blocks are scattered, its table padded with block 0."""
    contexts = [*DECODE_CONTEXTS, *(context for _, context in PREFILLS)]
    queries = [1] * len(DECODE_CONTEXTS) + [n for n, _ in PREFILLS]
    needed = [-(-context // BLOCK_SIZE) for context in contexts]
    blocks = torch.randperm(sum(needed), generator=s.generator).add(1).tolist()
    tables = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    slots: list[int] = []
    for row, (n, context, count) in enumerate(zip(queries, contexts, needed, strict=True)):
        mine = [blocks.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(mine)
        slots += [mine[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(context - n, context)]
    angle = torch.rand(len(slots), rotary_dim // 2, generator=s.generator) * 6
    return AttentionBatch(
        cos=angle.cos().to(s.device),
        sin=angle.sin().to(s.device),
        q_scale=(torch.rand(len(slots), generator=s.generator) + 1).to(s.device) if logn else None,
        slot_mapping=torch.tensor(slots).to(s.device),
        block_tables=tables.to(s.device),
        context_lens=torch.tensor(contexts, dtype=torch.int32).to(s.device),
        num_decodes=len(DECODE_CONTEXTS),
        max_decode_context=max(DECODE_CONTEXTS),
        cu_seqlens_q=torch.tensor([0, *itertools.accumulate(n for n, _ in PREFILLS)], dtype=torch.int32).to(s.device),
        prefills=PREFILLS,
    )


def caches(s: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    return s.randn(12, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), s.randn(12, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)


def case_norm_qkv_rotary_store(s: Setting) -> None:
    for rotary_dim, logn, qk_norm, first in (
        (HEAD_DIM, False, False, True),
        (HEAD_DIM, True, True, False),
        (6, False, False, False),
    ):
        batch = attention_batch(s, rotary_dim=rotary_dim, logn=logn)
        num_tokens = batch.slot_mapping.numel()
        weights = QkvWeights(
            norm=NormWeight(s.randn(HIDDEN), 1e-5),
            qkv=s.linear(HIDDEN, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, bias=not qk_norm),
            q_norm=NormWeight(s.randn(HEAD_DIM), 1e-6) if qk_norm else None,
            k_norm=NormWeight(s.randn(HEAD_DIM), 1e-6) if qk_norm else None,
        )
        x, residual = s.randn(num_tokens, HIDDEN), None if first else s.randn(num_tokens, HIDDEN)
        k_cache, v_cache = caches(s)
        old_k = k_cache.clone()
        q, r = s.ops.norm_qkv_rotary_store(x, residual, weights, batch, k_cache, v_cache)

        total = x.double().cpu() + (0 if residual is None else residual.double().cpu())
        s.close(r, total)
        # later lines start from the rounded residual, as the contract says
        heads = f64(weights.qkv, norm64(r.double().cpu(), weights.norm)).view(num_tokens, -1, HEAD_DIM)
        qs, ks, vs = heads.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            qs, ks = norm64(qs, weights.q_norm), norm64(ks, weights.k_norm)
        qs, ks = rotate64(qs, batch), rotate64(ks, batch)
        if batch.q_scale is not None:
            qs = qs * batch.q_scale.double().cpu()[:, None, None]
        s.close(q, qs)
        block, offset = batch.slot_mapping // BLOCK_SIZE, batch.slot_mapping % BLOCK_SIZE
        s.close(k_cache[block, :, offset], ks)
        s.close(v_cache[block, :, offset], vs)
        untouched = torch.ones(old_k.shape[0], BLOCK_SIZE, dtype=torch.bool)
        untouched[block.cpu(), offset.cpu()] = False
        assert torch.equal(k_cache.cpu().transpose(1, 2)[untouched], old_k.cpu().transpose(1, 2)[untouched])


def rotate64(heads: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
    """As complex numbers: pair (i, i + half) times e^(i angle)."""
    cos, sin = batch.cos.double().cpu(), batch.sin.double().cpu()
    half = cos.shape[1]
    turned = torch.complex(heads[..., :half], heads[..., half : 2 * half]) * torch.complex(cos, sin)[:, None]
    return torch.cat((turned.real, turned.imag, heads[..., 2 * half :]), dim=-1)


def case_attention(s: Setting) -> None:
    for window in (0, 1, 7):
        batch = attention_batch(s)
        k_cache, v_cache = caches(s)
        q = s.randn(batch.slot_mapping.numel(), NUM_HEADS, HEAD_DIM)
        out = s.ops.attention(q, k_cache, v_cache, batch, 0.3, window)
        wanted, token = [], 0
        rows = [(1, context) for context in DECODE_CONTEXTS] + list(PREFILLS)
        for row, (n, context) in enumerate(rows):
            for position in range(context - n, context):
                seen = [p for p in range(context) if p <= position and (window == 0 or p > position - window)]
                at = [(int(batch.block_tables[row, p // BLOCK_SIZE]), p % BLOCK_SIZE) for p in seen]
                for head in range(NUM_HEADS):
                    kv = head // (NUM_HEADS // NUM_KV_HEADS)
                    keys = torch.stack([k_cache[b, kv, o].double().cpu() for b, o in at])
                    values = torch.stack([v_cache[b, kv, o].double().cpu() for b, o in at])
                    wanted.append(torch.softmax(keys @ q[token, head].double().cpu() * 0.3, 0) @ values)
                token += 1
        s.close(out, torch.stack(wanted).view(q.shape))


def case_output_projection(s: Setting) -> None:
    for num_tokens, bias in ((0, False), (1, True), (13, False)):
        attended = s.randn(num_tokens, NUM_HEADS, HEAD_DIM)
        weight = s.linear(NUM_HEADS * HEAD_DIM, HIDDEN, bias=bias)
        s.close(whole(s.ops.output_projection(attended, weight)), f64(weight, attended.double().cpu().flatten(1)))


def case_norm_gate_up_silu(s: Setting) -> None:
    for num_tokens in (0, 1, 3, 7):
        x, residual, weight = s.randn(num_tokens, HIDDEN), s.randn(num_tokens, HIDDEN), s.linear(HIDDEN, 2 * 33)
        norm = NormWeight(s.randn(HIDDEN), 1e-5)
        y, r = s.ops.norm_gate_up_silu(x, residual, norm, weight)
        s.close(r, x.double().cpu() + residual.double().cpu())
        gate, up = f64(weight, norm64(r.double().cpu(), norm)).chunk(2, dim=-1)
        s.close(y, gate / (1 + torch.exp(-gate)) * up)


def case_down_projection(s: Setting) -> None:
    x, weight = s.randn(7, 33), s.linear(33, HIDDEN)
    s.close(whole(s.ops.down_projection(x, weight)), f64(weight, x.double().cpu()))


def case_lm_head(s: Setting) -> None:
    x, residual, norm = s.randn(5, HIDDEN), s.randn(5, HIDDEN), NormWeight(s.randn(HIDDEN), 1e-5)
    weight = DenseWeight(s.randn(51, HIDDEN, scale=HIDDEN**-0.5).t())  # a transposed view, as the loader makes
    logits = s.ops.lm_head(x, residual, norm, weight)
    total = (x + residual).double().cpu()
    s.close(logits, f64(weight, norm64(total, norm)))


def case_sample(s: Setting) -> None:
    """Greedy with bans; then every rule at once, row by row, against plain Python floats."""
    vocab = 29
    greedy_logits = s.randn(3, vocab)
    best = [int(row.argmax()) for row in greedy_logits.float().cpu()]
    ids, starts = torch.tensor([best[0], 5, best[2]]), torch.tensor([0, 2, 2, 3])
    bans = SamplingBatch(banned_ids=ids.to(s.device), banned_starts=starts.to(s.device))
    wanted = [max((t for t in range(vocab) if t not in no), key=greedy_logits[r].tolist().__getitem__)
              for r, no in enumerate(([best[0], 5], [], [best[2]]))]  # fmt: skip
    assert s.ops.sample(greedy_logits, bans).tolist() == wanted
    assert s.ops.sample(greedy_logits, SamplingBatch()).tolist() == best
    logits = (torch.randn(6, vocab, generator=s.generator) * 3).to(s.device)
    counts = torch.randint(0, 3, (6, vocab), generator=s.generator, dtype=torch.int32)
    seen = (counts > 0) | (torch.rand(6, vocab, generator=s.generator) < 0.2)
    temperature = [1.0, 0.5, 2.0, 1.0, 0.7, 1.3]
    top_k, top_p, min_p = [1, 4, vocab, 1, 9, vocab], [1, 1.0, 0.8, 1, 0.6, 1.0], [0, 0.0, 0.0, 0, 0.1, 0.3]
    banned, biased = {0: [int(logits[0].argmax())], 4: [3], 5: [8]}, {2: {3: 4.0, 28: -1.5}, 4: {3: 9.0, 5: 2.5}}
    for uniform in ([0.0] * 6, [0, 0.31, 0.62, 0, 0.5, 0.77], [1 - 2**-52] * 6):

        def column(values: object, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(s.device)

        def starts_of(entries: dict) -> torch.Tensor:
            return column([0, *itertools.accumulate(len(entries.get(row, ())) for row in range(6))], torch.int64)

        batch = SamplingBatch(
            temperature=column(temperature),
            banned_ids=column([token for tokens in banned.values() for token in tokens], torch.int64),
            banned_starts=starts_of(banned),
            bias_ids=column([token for row in biased.values() for token in row], torch.int64),
            bias=column([value for row in biased.values() for value in row.values()]),
            bias_starts=starts_of(biased),
            repetition_penalty=column([1.3] * 6),
            presence_penalty=column([0.4] * 6),
            frequency_penalty=column([-0.2] * 6),
            slots=column([5, 0, 1, 2, 3, 4], torch.int64),
            output_counts=counts.roll(-1, dims=0).to(s.device),
            seen=seen.roll(-1, dims=0).to(s.device),
            top_k=column(top_k, torch.int64),
            top_p=column(top_p),
            min_p=column(min_p),
            uniform=column(uniform),
            max_top_k=vocab,
            has_top_k=True,
            has_top_p=True,
        )
        before = logits.clone()
        found = s.ops.sample(logits, batch).tolist()
        assert torch.equal(logits, before)
        for row in range(6):
            scores = logits[row].tolist()
            for token in range(vocab):
                value = (scores[token] + biased.get(row, {}).get(token, 0.0)) / temperature[row]
                value = -math.inf if token in banned.get(row, ()) else value
                if seen[row, token]:
                    value = value * 1.3 if value < 0 else value / 1.3
                scores[token] = value - 0.4 * bool(counts[row, token]) + 0.2 * int(counts[row, token])
            if top_k[row] == 1:
                assert found[row] == scores.index(max(scores))
            else:
                assert found[row] == draw(scores, top_k[row], top_p[row], min_p[row], uniform[row])


def draw(scores: list[float], top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    def normalised(tokens: list[int]) -> dict[int, float]:
        weights = {t: math.exp(scores[t] - max(scores)) for t in tokens}
        return {t: w / sum(weights.values()) for t, w in weights.items()}

    ranked = sorted(range(len(scores)), key=lambda t: -scores[t])[:top_k]
    probs = normalised(ranked)
    kept, total = [], 0.0
    for token in ranked:
        if total < top_p and probs[token] >= min_p * probs[ranked[0]] and probs[token] > 0:
            kept.append(token)
        total += probs[token]
    probs, total = normalised(kept), 0.0
    for token in sorted(kept):
        total += probs[token]
        if total > uniform:
            return token
    return max(kept)


CASES: dict[str, Callable[[Setting], None]] = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}


def test_every_op_has_a_comparison_case():
    assert set(CASES) == {field.name for field in dataclasses.fields(OpTable)}


@pytest.mark.parametrize("device", COLUMNS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(OpTable)])
def test_op_agrees_with_float64(name, dtype, device):
    where = torch.device(device)
    CASES[name](Setting(ops_for(where), where, dtype, torch.Generator().manual_seed(11)))


def test_prefill_in_several_query_tiles_is_the_same(monkeypatch):
    setting = Setting(REFERENCE, torch.device("cpu"), torch.float32, torch.Generator().manual_seed(5))
    monkeypatch.setattr(primitives, "MAX_SCORES", NUM_HEADS * 17 * 2)  # two queries a tile at the longest context
    case_attention(setting)


def test_cpu_column_is_the_reference():
    assert ops_for(torch.device("cpu")) is REFERENCE
    assert reference_ops(dataclasses.replace(REFERENCE, embed=lambda token_ids, weight: weight)) == [
        field.name for field in dataclasses.fields(OpTable) if field.name != "embed"
    ]
