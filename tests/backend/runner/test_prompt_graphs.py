"""A padded chunk gives what the chunk gives, its graph what single launches give, and neither touches anything else."""

import pytest
import torch
from tests.backend.plans import generate, greedy
from tests.backend.runner.test_decode_graphs import MODEL, folder, make_runner

from turbotriton.backend.scheduling.plan import JoinedRequest, ScheduledRow, StepPlan

__all__ = ["folder"]

PROMPT = tuple(range(3, 43))
SLOT, BLOCKS = 2, (20, 11, 12, 13, 14, 15)  # of eight tokens


def started(runner, num_computed):
    """PROMPT has joined and its first tokens are in the cache."""
    joined = JoinedRequest(SLOT, PROMPT, len(PROMPT), BLOCKS, greedy(4), 0, 0, MODEL.rope.theta)
    rows = (ScheduledRow(SLOT, 0, num_computed, False),) if num_computed else ()
    runner.execute(StepPlan(0, joined=(joined,), rows=rows))


@pytest.mark.parametrize(("num_computed", "num_tokens"), [(0, 40), (0, 16), (11, 9), (24, 16)])
@torch.inference_mode()
def test_padding_changes_no_logit_and_stores_nothing(folder, num_computed, num_tokens):
    runner = make_runner(folder, "cpu")
    started(runner, num_computed)
    decoder, kv = runner._decoder, runner._kv
    rows = [ScheduledRow(SLOT, num_computed, num_tokens, True)]
    inputs = runner._slots.step_inputs(rows)
    x, residual = decoder.hidden_states(inputs.token_ids, inputs.batch, kv.k, kv.v)
    wanted = decoder.logits(x[inputs.sampled_tokens], residual[inputs.sampled_tokens])
    before = [pages.clone() for pages in (*kv.k, *kv.v)]
    token_ids, batch, last = runner._slots.chunk_inputs(torch.tensor([SLOT, num_computed, num_tokens]), 64)
    assert token_ids.shape == (64,)
    x, residual = decoder.hidden_states(token_ids, batch, kv.k, kv.v)
    assert torch.allclose(decoder.logits(x[last], residual[last]), wanted, atol=1e-5)
    assert all(torch.allclose(old, new, atol=1e-5) for old, new in zip(before, (*kv.k, *kv.v), strict=True))
    runner.close()


@pytest.mark.gpu
@pytest.mark.parametrize("length", [2, 16, 17, 40, 63, 100])
def test_a_graph_gives_the_tokens_of_single_launches_and_of_the_cpu(folder, length):
    prompt = [list(range(3, 3 + length))]
    outputs = []
    for device, graphs in (("cuda", "1"), ("cuda", "0"), ("cpu", "1")):
        runner = make_runner(folder, device, cuda_graphs=graphs)
        assert (runner._prompt_graphs is not None) == (device == "cuda" and graphs == "1")
        found = generate(runner, MODEL, prompt, [greedy(20)], num_new=20, chunk=64, num_slots=6)
        outputs.append(found.token_ids)
        runner.close()
    assert outputs[0] == outputs[1] == outputs[2]
