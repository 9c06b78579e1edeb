"""Thousands of random requests that join, leave, are cancelled and preempted under a pool of a few blocks: every token is right.

Right is what the same request gives alone on the reference ops of a CPU. Prompts, ways to sample and seeds come from small pools, so that
this costs little: a request's tokens are the beginning of its longest one's. Weights are fp32 and the largest logits of greedy
requests no near-ties, so tokens are equal on every device; random draws are as well, their numbers being those of seed and position.
"""

import random
from dataclasses import dataclass, field, replace
from itertools import product

import pytest
import torch
from tests.backend.plans import generate
from tests.backend.runner.launch_keys import EagerGraphs
from tests.backend.workspace import hf_workspace_config, write_workspace
from tests.checkpoints import make_tensors
from transformers import LlamaConfig

from turbotriton.backend.engine.engine import Engine
from turbotriton.backend.runner import decode_graphs
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.contract.wire import FinishReason, GenerateRequest, SamplingParams, TokenDelta

torch.set_num_threads(1)

VOCAB, MOST_NEW, SESSION_LEN, NUM_BLOCKS, BLOCK_SIZE = 320, 40, 96, 24, 8
OPTIONS = {
    "session_len": str(SESSION_LEN),
    "cache_block_seq_len": str(BLOCK_SIZE),
    "cache_max_entry_count": str(NUM_BLOCKS),
    "num_tokens_per_iter": "48",
    "max_queued_requests": "64",
    "compute_dtype": "fp32",
}
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
WAYS = (
    GREEDY,
    GREEDY,
    replace(GREEDY, num_logprobs=2),
    replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.2),
    replace(GREEDY, bad_sequences=((7,), (9, 11)), logit_bias=((5, 1.0), (6, -3.0))),
    SamplingParams(temperature=0.8, top_p=0.9, ignore_eos=True),
    SamplingParams(temperature=1.2, top_k=20, min_p=0.02, ignore_eos=True, num_logprobs=0),
    SamplingParams(temperature=0.7, top_k=50, top_p=0.8, frequency_penalty=0.4, ignore_eos=True),
)
SEEDS = (1, 2**63 + 5)


@dataclass
class Asked:
    """A request and what has come of it."""

    prompt: int
    way: int
    seed: int
    max_new: int
    stop_after: int | None  # its stop token is the one at this place of what is expected
    tokens: list[int] = field(default_factory=list)
    last: TokenDelta | None = None


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    hf = LlamaConfig(
        hidden_size=64,
        intermediate_size=112,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=VOCAB,
        rms_norm_eps=1e-5,
    )
    config = hf_workspace_config(hf, session_len=SESSION_LEN)
    tensors = make_tensors({**hf.to_dict(), "architectures": ["LlamaForCausalLM"]}, seed=11)
    return config, write_workspace(tmp_path_factory.mktemp("weights"), config, tensors)


def make_runner(workspace, **options):
    config, folder = workspace
    return ModelRunner(config.model_config(), config.engine_config({**OPTIONS, **options}.get), folder)


@pytest.fixture(scope="module")
def prompts():
    """Half of them continue another's first blocks."""
    draw = random.Random(4)
    alone = [[draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 40))] for _ in range(6)]
    return alone + [
        head[: draw.randint(8, 30)] + [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 12))] for head in alone
    ]


@pytest.fixture(scope="module")
def expected(workspace, prompts):
    """By (prompt, way, seed): MOST_NEW tokens."""
    runner = make_runner(workspace, device="cpu", max_batch_size="1")
    found = {}
    known = {}
    for prompt, (way, params), seed in product(range(len(prompts)), enumerate(WAYS), SEEDS):
        asked = replace(params, num_logprobs=2)
        key = prompt, asked, None if params.is_greedy else seed
        if key not in known:
            output = generate(
                runner,
                workspace[0].model_config(),
                [prompts[prompt]],
                asked,
                num_new=MOST_NEW,
                chunk=96,
                seeds=[seed],
                num_slots=1,
            )
            known[key] = output.token_ids[0]
            if params == GREEDY:
                margins = [entry.top[0][1] - entry.top[1][1] for entry in output.logprobs[0]]
                assert min(margins) > 1e-4, "a near-tie: choose another seed of the weights"
        found[prompt, way, seed] = known[key]
    assert len({token for ids in found.values() for token in ids}) > 100
    return found


def draw_request(draw, prompts, expected):
    prompt, way, seed = draw.randrange(len(prompts)), draw.randrange(len(WAYS)), draw.choice(SEEDS)
    asked = Asked(prompt, way, seed, draw.randint(1, MOST_NEW), None)
    if draw.random() < 0.2:
        asked.stop_after = draw.randrange(MOST_NEW)
    return asked


def wanted(asked, expected):
    """(tokens, why it ends) of the request when nobody cancels it."""
    tokens = expected[asked.prompt, asked.way, asked.seed]
    if asked.stop_after is not None:
        first = tokens.index(tokens[asked.stop_after])
        if first < asked.max_new:
            return tokens[: first + 1], FinishReason.STOP
    return tokens[: asked.max_new], FinishReason.LENGTH


def request_of(request_id, asked, prompts, expected, draw):
    stops = () if asked.stop_after is None else (expected[asked.prompt, asked.way, asked.seed][asked.stop_after],)
    params = replace(WAYS[asked.way], max_new_tokens=asked.max_new, seed=asked.seed, stop_token_ids=stops)
    return GenerateRequest(request_id, tuple(prompts[asked.prompt]), params, priority=draw.randint(0, 2))


def run_random_requests(engine, count, prompts, expected, seed):
    """Submits in bursts, cancels one live request in every few steps, and gives all requests by id."""
    draw = random.Random(seed)
    asked, live, submitted = {}, {}, 0

    def take(deltas_by_owner):
        for delta in deltas_by_owner.get("test", []):
            request = live[delta.request_id]
            request.tokens += delta.token_ids
            assert all(entry.token_logprob == entry.token_logprob and entry.token_logprob <= 0 for entry in delta.logprobs)
            if delta.finish_reason is not None:
                request.last = live.pop(delta.request_id).last or delta

    while submitted < count or engine.has_work:
        for _ in range(min(draw.choice((0, 0, 1, 3, 8)), 64 - engine.stats().num_waiting, count - submitted)):
            asked[submitted] = live[submitted] = draw_request(draw, prompts, expected)
            engine.add("test", request_of(submitted, asked[submitted], prompts, expected, draw))
            submitted += 1
        take(engine.step())
        if live and draw.random() < 0.15:
            take(engine.cancel("test", draw.choice(list(live))))
    return asked


def check(workspace, prompts, expected, device, count, prefix_caching, *, prepare=lambda runner: None, **options):
    runner = make_runner(workspace, device=device, enable_prefix_caching=prefix_caching, **options)
    prepare(runner)
    config = workspace[0].engine_config({**OPTIONS, "enable_prefix_caching": prefix_caching, **options}.get)
    engine = Engine(workspace[0].model_config(), config, runner, overlap=True)
    asked = run_random_requests(engine, count, prompts, expected, seed=int(prefix_caching) + 1)

    num_cancelled = 0
    for request_id, request in asked.items():
        assert request.last is not None, f"request {request_id} never ended"
        tokens, reason = wanted(request, expected)
        if request.last.finish_reason is FinishReason.CANCELLED:
            num_cancelled += 1
            assert request.tokens == tokens[: len(request.tokens)], f"request {request_id}: {request}"
        else:
            assert (request.tokens, request.last.finish_reason) == (tokens, reason), f"request {request_id}: {request}"
    stats = engine.stats()
    assert count // 20 < num_cancelled < count // 2
    assert stats.preemptions_total > count // 50, "the pool was not too small"
    assert (stats.cached_tokens_total > 0) == (prefix_caching == "1")
    assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)
    blocks = engine._scheduler.blocks
    assert sorted(blocks._free) == list(range(NUM_BLOCKS)), "a block leaked"
    assert not any(blocks._ref_counts)
    assert all(bool(pages.isfinite().all()) for pages in (*runner._kv.k, *runner._kv.v))
    engine.close()


@pytest.mark.parametrize("prefix_caching", ["1", "0"])
def test_random_requests_get_their_tokens(workspace, prompts, expected, prefix_caching):
    check(workspace, prompts, expected, "cpu", 300, prefix_caching, max_batch_size="8")


class WatchedGraphs(EagerGraphs):
    """After each step, the rows that the device holds are those that the host says it holds."""

    num_steps = 0

    def append(self, drawn):
        super().append(drawn)
        self.num_steps += 1
        assert all(torch.equal(self._inputs[size], torch.from_numpy(held)) for size, held in self._held.items())


def test_rows_that_go_on_are_not_copied_again(workspace, prompts, expected, monkeypatch):
    """Decodes as graphs run them, on a CPU, among cancelled, preempted and mixed steps."""
    copies, graphs = [], []
    monkeypatch.setattr(decode_graphs, "copy_into", lambda target, rows: copies.append(target.copy_(torch.from_numpy(rows))))

    def with_graphs(runner):
        parts = runner._decoder, runner._slots, runner._kv, 7, torch.device("cpu")
        with torch.inference_mode():
            runner._graphs = WatchedGraphs(*parts)
        graphs.append(runner._graphs)

    check(workspace, prompts, expected, "cpu", 300, "1", max_batch_size="7", prepare=with_graphs)
    assert graphs[0].num_steps > 300
    assert len(copies) < 0.8 * graphs[0].num_steps


@pytest.mark.gpu
@pytest.mark.parametrize("prefix_caching", ["1", "0"])
def test_ten_thousand_random_requests_get_their_tokens(workspace, prompts, expected, prefix_caching):
    """Half of them with the prefix cache, half without; decodes alone replay one graph, mixed steps several."""
    check(workspace, prompts, expected, "cuda", 5000, prefix_caching, max_batch_size="24")
