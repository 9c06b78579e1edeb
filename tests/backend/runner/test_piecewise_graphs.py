"""A step in pieces, padded, gives what it gives whole, its graphs what single launches give, and neither touches anything else."""

import pytest
import torch
from tests.backend.plans import generate, greedy
from tests.backend.runner.launch_keys import EagerPiecewiseGraphs
from tests.backend.runner.test_decode_graphs import MODEL, folder, make_runner
from tests.bench.make_checkpoint import make_checkpoint

from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.backend.runner.piecewise_graphs import piecewise_sizes
from turbotriton.backend.scheduling.plan import JoinedRequest, ScheduledRow, StepPlan
from turbotriton.contract.ini import read_workspace_config
from turbotriton.contract.wire import SamplingParams

__all__ = ["folder"]

PROMPTS = [tuple(range(3 + i, 3 + i + n)) for i, n in enumerate((10, 60, 33, 1, 100, 5))]
BLOCK_SIZE = 8
SIZES = (16, 32, 64, *range(128, 2049, 128))


def size_of(num_tokens):
    return next(size for size in SIZES if size >= num_tokens)


@pytest.mark.parametrize(
    ("max_tokens", "sizes"),
    [(1, (16,)), (63, (16, 32, 64)), (128, (16, 32, 64, 128)), (300, (16, 32, 64, 128, 256, 384)), (8192, SIZES)],
)
def test_sizes_reach_the_largest_step(folder, max_tokens, sizes):
    runner = make_runner(folder, "cpu")
    assert piecewise_sizes(runner._decoder, max_tokens) == sizes
    runner.close()


def started(runner):
    """All have joined; of the first four every token but the last is in the cache, of the others some or none."""
    begun, joined = 0, []
    for slot, prompt in enumerate(PROMPTS):
        num_blocks = -(-(len(prompt) + 1) // BLOCK_SIZE)
        blocks = tuple(range(begun, begun + num_blocks))
        joined.append(JoinedRequest(slot, prompt, len(prompt), blocks, greedy(4), 0, 0, MODEL.rope.theta))
        begun += num_blocks
    computed = [(slot, len(prompt) - 1) for slot, prompt in enumerate(PROMPTS[:4])] + [(4, 13)]
    rows = [ScheduledRow(slot, 0, count, False) for slot, count in computed if count]
    runner.execute(StepPlan(0, joined=tuple(joined), rows=tuple(rows)))


STEPS = {
    "decodes_and_chunks": [(0, 9, 1, True), (4, 13, 87, True), (1, 59, 1, True), (5, 0, 4, False), (2, 32, 1, True)],
    "a_token_that_gives_none": [(0, 9, 1, True), (5, 0, 1, False), (3, 0, 1, True)],
    "chunks": [(4, 13, 80, False), (5, 0, 5, True)],
    "a_whole_bucket": [(4, 13, 87, True), (1, 19, 41, True)],
    "more_than_a_bucket": [(4, 13, 87, True), (1, 18, 42, True)],
}


@pytest.mark.parametrize(
    "options", [{}, {"quant_policy": "8"}, {"quant_policy": "16"}, {"quant_policy": "4"}, {"deterministic": "1"}], ids=str
)
@pytest.mark.parametrize("step", STEPS)
@torch.inference_mode()
def test_pieces_give_the_whole_and_padding_stores_nothing(folder, step, options):
    rows = [ScheduledRow(*row) for row in STEPS[step]]
    num_tokens = sum(row.num_tokens for row in rows)
    found, pages = [], []
    for in_pieces in (False, True):
        runner = make_runner(folder, "cpu", **options)
        started(runner)
        if in_pieces:
            runner._piecewise_graphs = EagerPiecewiseGraphs(runner._decoder, runner._slots, runner._kv, 300, torch.device("cpu"))
        inputs, x, residual = runner._hidden_states(rows)
        assert len(x) == (size_of(num_tokens) if in_pieces else num_tokens)
        at = inputs.sampled_tokens
        found.append((inputs, runner._decoder.logits(x[at], residual[at]), x[:num_tokens] + residual[:num_tokens]))
        pages.append(
            [
                part
                for kv in (*runner._kv.k, *runner._kv.v)
                for part in ((kv,) if isinstance(kv, torch.Tensor) else (kv.data, kv.params))
            ]
        )
        runner.close()
    (whole, logits, states), (pieces, piece_logits, piece_states) = found
    assert torch.equal(whole.sampled_tokens, pieces.sampled_tokens)
    assert whole.sampled_slots.tolist() == pieces.sampled_slots.tolist()
    assert whole.sampled_positions.tolist() == pieces.sampled_positions.tolist()
    assert whole.row_begins.tolist() == pieces.row_begins.tolist()
    assert torch.allclose(logits, piece_logits, atol=1e-5)
    assert torch.allclose(states, piece_states, atol=1e-5)
    for old, new in zip(*pages, strict=True):
        if old.dtype == torch.uint8:
            assert (old != new).float().mean() < 0.01  # numbers between two steps of a quantised key
        else:
            assert torch.allclose(old, new, atol=1e-5)


@torch.inference_mode()
def test_more_tokens_than_a_graph_has_are_launched(folder):
    runner = make_runner(folder, "cpu")
    runner._piecewise_graphs = EagerPiecewiseGraphs(runner._decoder, runner._slots, runner._kv, 128, torch.device("cpu"))
    started(runner)
    rows = [ScheduledRow(*row) for row in STEPS["more_than_a_bucket"]]
    assert runner._piecewise_graphs.hidden_states(rows) is None
    _inputs, x, _residual = runner._hidden_states(rows)
    assert len(x) == 129
    runner.close()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"quant_policy": "8"}, {"deterministic": "1"}], ids=["plain", "kv_8_bit", "deterministic"]
)
@pytest.mark.parametrize("chunk", [3, 40, 100])
def test_graphs_give_the_tokens_of_single_launches_and_of_the_cpu(folder, chunk, options):
    params = [greedy(20)] * 4 + [SamplingParams(max_new_tokens=20, temperature=0.8, top_p=0.9), greedy(20)]
    outputs = []
    for device, graphs in (("cuda", "1"), ("cuda", "0"), ("cpu", "1")):
        runner = make_runner(folder, device, cuda_graphs=graphs, **options)
        assert (runner._piecewise_graphs is not None) == (device == "cuda" and graphs == "1")
        found = generate(runner, MODEL, PROMPTS, params, num_new=20, chunk=chunk, num_slots=6)
        outputs.append(found.token_ids)
        runner.close()
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("fp32", {}),
        ("bf16", {}),
        ("bf16", {"quant_policy": "8"}),
        ("bf16", {"quant_policy": "16"}),
        ("bf16", {"quant_policy": "4"}),
        ("bf16", {"deterministic": "1"}),
        ("int4", {}),
        ("int8", {}),
        ("fp8", {}),
    ],
)
@torch.inference_mode()
def test_graphs_of_every_size_give_the_states_of_single_launches(tmp_path, dtype, options):
    """Sizes in turns, since they share memory, and each twice: of chunks alone, and of decodes before them."""
    make_checkpoint("tiny", tmp_path, dtype, 1024)
    workspace = read_workspace_config(tmp_path / "config.ini")
    options = {"max_batch_size": "9", "session_len": "1024", "cache_max_entry_count": "150", "compute_dtype": "auto", **options}
    model, config = workspace.model_config(), workspace.engine_config(options.get)
    num_blocks = 1024 // config.cache_block_seq_len
    prompts = [tuple((17 * i + 31 * slot) % 300 + 3 for i in range(1000)) for slot in range(9)]
    joined = [
        JoinedRequest(
            slot, prompt, 1000, tuple(range(num_blocks * slot, num_blocks * (slot + 1))), greedy(4), 0, 0, model.rope.theta
        )
        for slot, prompt in enumerate(prompts)
    ]
    runner = ModelRunner(model, config, tmp_path)
    graphs = runner._piecewise_graphs
    assert graphs is not None
    runner.execute(StepPlan(0, joined=tuple(joined), rows=tuple(ScheduledRow(slot, 0, 300, False) for slot in range(6))))
    sizes = [size for size in SIZES if size <= graphs.max_tokens]
    assert len(sizes) == (10 if dtype == "int4" else 19)
    for number, size in enumerate([*sizes, *reversed(sizes)]):
        decodes = [ScheduledRow(slot, 300, 1, True) for slot in range(3)] if number % 2 else []
        chunks, left = [], size - len(decodes) - number % 5
        for slot in (3, 4, 5):
            chunks.append(ScheduledRow(slot, 300, min(left, 690), True))
            left -= chunks[-1].num_tokens
            if not left:
                break
        found = []
        for way in (graphs, None):
            runner._piecewise_graphs = way
            _inputs, x, residual = runner._hidden_states([*decodes, *chunks])
            num_tokens = sum(row.num_tokens for row in (*decodes, *chunks))
            assert x.shape[0] == (size if way else num_tokens)
            found.append((x[:] + residual)[:num_tokens].float())
        error = (found[0] - found[1]).norm() / found[1].norm()
        assert error < (1e-5 if dtype == "fp32" else 0.02), (size, float(error))
    runner._piecewise_graphs = graphs
    runner.close()
