"""`deterministic = 1`: tokens and log-probabilities are the same to the bit alone, in any batch, any chunks and after a preemption."""

import dataclasses

import pytest
import torch
from tests.backend.plans import generate
from tests.backend.workspace import hf_workspace_config, write_workspace
from tests.checkpoints import make_tensors
from transformers import LlamaConfig

from turbotriton.backend.engine.engine import Engine
from turbotriton.backend.ops.table import DETERMINISTIC_REFERENCE
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.contract.errors import ConfigError
from turbotriton.contract.wire import GenerateRequest, SamplingParams

torch.set_num_threads(1)

NUM_NEW = 10
OPTIONS = {"cache_block_seq_len": "16", "session_len": "128", "max_batch_size": "24", "deterministic": "1"}
WAYS = (
    SamplingParams(temperature=0.0, num_logprobs=4),
    SamplingParams(temperature=0.9, top_p=0.9, num_logprobs=4),
    SamplingParams(temperature=1.1, top_k=20, repetition_penalty=1.2, num_logprobs=0),
    SamplingParams(temperature=0.0, presence_penalty=0.5, logit_bias=((7, 1.5),), num_logprobs=4),
)
#: GQA, biases, inputs of several chunks (of 512), a vocabulary that no power of two divides
SHAPES = {
    "cpu": {"hidden_size": 96, "intermediate_size": 176, "num_attention_heads": 6, "num_key_value_heads": 2},
    "cuda": {"hidden_size": 1152, "intermediate_size": 2608, "num_attention_heads": 9, "num_key_value_heads": 3},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    made = {}

    def of_device(device, **llama):
        key = (device, *llama.items())
        if key not in made:
            hf = LlamaConfig(num_hidden_layers=3, vocab_size=777, attention_bias=True, rms_norm_eps=1e-5, **SHAPES[device])
            config = hf_workspace_config(hf, session_len=128, **llama)
            tensors = make_tensors({**hf.to_dict(), "architectures": ["LlamaForCausalLM"]}, seed=5)
            made[key] = config, write_workspace(tmp_path_factory.mktemp("weights"), config, tensors)
        return made[key]

    return of_device


def requests(count):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 70, (count,), generator=generator).tolist()
    prompts = [torch.randint(3, 777, (length,), generator=generator).tolist() for length in lengths]
    return prompts, [WAYS[i % len(WAYS)] for i in range(count)], list(range(100, 100 + count))


def run(workspace, device, count=None, *, only=None, chunk=64, blocks=200, **options):
    """(token ids, log-probabilities) of each request; `only`: those alone, one after the other; `count`: at most so many at once."""
    config, folder = workspace
    model = config.model_config()
    values = {**OPTIONS, "device": device, "cache_max_entry_count": str(blocks), **options}
    runner = ModelRunner(model, config.engine_config(values.get), folder)
    prompts, params, seeds = requests(20)
    groups = [[i] for i in only] if only else [list(range(20))]
    found, preemptions = {}, 0
    for group in groups:
        output = generate(
            runner,
            model,
            [prompts[i] for i in group],
            [params[i] for i in group],
            num_new=NUM_NEW,
            chunk=chunk,
            seeds=[seeds[i] for i in group],
            num_slots=count or 1,
        )
        found |= dict(zip(group, zip(output.token_ids, output.logprobs, strict=True), strict=True))
        preemptions += output.num_preemptions
    runner.close()
    return found, preemptions


def check(workspace, device, **options):
    alone, _ = run(workspace, device, only=(0, 1, 2, 3, 8, 17), **options)
    assert len({token for ids, _ in alone.values() for token in ids}) > 20
    ways = ((20, 64, 200), (20, 5, 200), (3, 17, 200), (20, 64, 12), (9, 7, 10))
    for count, chunk, blocks in ways if device == "cuda" else ways[1::2]:
        together, preemptions = run(workspace, device, count, chunk=chunk, blocks=blocks, **options)
        assert (preemptions > 0) == (blocks < 20)
        assert {i: together[i] for i in alone} == alone, (count, chunk, blocks)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_cpu_gives_the_same_in_any_batch_and_chunks(workspace, dtype):
    check(workspace("cpu"), "cpu", compute_dtype=dtype)


def test_a_cpu_does_not_without_it(workspace):
    """What the test above would see of ops that depend on the batch."""
    alone, _ = run(workspace("cpu"), "cpu", only=(0, 1, 2, 3), deterministic="0")
    together, _ = run(workspace("cpu"), "cpu", 20, chunk=5, deterministic="0")
    assert {i: together[i][0] for i in (0, 3)} == {i: alone[i][0] for i in (0, 3)}
    assert any(together[i] != alone[i] for i in alone)


@pytest.mark.parametrize("policy", [8, 4])
def test_a_cpu_gives_the_same_over_quantised_keys(workspace, policy):
    check(workspace("cpu"), "cpu", quant_policy=str(policy))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["1", "0"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_gpu_gives_the_same_in_any_batch_and_chunks(workspace, dtype, graphs):
    check(workspace("cuda"), "cuda", compute_dtype=dtype, cuda_graphs=graphs)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_with_a_sliding_window(workspace):
    check(workspace("cuda", sliding_window=19), "cuda", compute_dtype="bf16")


@pytest.mark.gpu
def test_graphs_and_single_launches_give_the_same(workspace):
    outputs = [run(workspace("cuda"), "cuda", 20, compute_dtype="bf16", cuda_graphs=graphs)[0] for graphs in "10"]
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
def test_quantised_keys_are_refused_on_a_gpu(workspace):
    with pytest.raises(ConfigError, match="deterministic is 1 and quant_policy 8"):
        run(workspace("cuda"), "cuda", only=(0,), quant_policy="8")


def answers(workspace, device, submitted, **options):
    """(tokens, log-probabilities) of each submitted request of the whole engine, and how many prompt tokens were cached."""
    config, folder = workspace
    values = {**OPTIONS, "device": device, "cache_max_entry_count": "14", "num_tokens_per_iter": "40", **options}
    model, engine_config = config.model_config(), config.engine_config(values.get)
    engine = Engine(model, engine_config, ModelRunner(model, engine_config, folder))
    prompts, params, seeds = requests(20)
    found = {i: ([], []) for i in submitted}
    for i in submitted:
        sampling = dataclasses.replace(params[i], max_new_tokens=NUM_NEW, seed=seeds[i], ignore_eos=True)
        engine.add("test", GenerateRequest(i, tuple(prompts[8] + prompts[i]), sampling))
        while engine.stats().num_waiting > 3:
            take(engine, found)
    while engine.has_work:
        take(engine, found)
    num_cached = engine.stats().cached_tokens_total
    engine.close()
    return found, num_cached


def take(engine, found):
    for delta in engine.step().get("test", []):
        found[delta.request_id][0].extend(delta.token_ids)
        found[delta.request_id][1].extend(delta.logprobs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_engine_gives_the_same_with_and_without_the_prefix_cache(workspace, device):
    """Prompts that begin alike, in an engine with too few blocks: what another request has computed is what it would have."""
    made = workspace(device)
    alone = {i: answers(made, device, [i], enable_prefix_caching="0")[0][i] for i in (0, 1, 5, 9)}
    for caching in "10":
        together, num_cached = answers(made, device, range(12), enable_prefix_caching=caching)
        assert (num_cached > 0) == (caching == "1")
        assert {i: together[i] for i in alone} == alone


def test_the_reference_ops_keep_the_promise_too(workspace):
    """`backend = pytorch`: plain torch, on a GPU as well."""
    config, folder = workspace("cpu")
    engine_config = config.engine_config({**OPTIONS, "device": "cpu", "cache_max_entry_count": "40"}.get)
    runner = ModelRunner(config.model_config(), engine_config, folder, reference_ops=True)
    assert runner._decoder.ops is DETERMINISTIC_REFERENCE


def test_the_option_is_off_by_default(workspace):
    config, _ = workspace("cpu")
    assert config.engine_config().deterministic is False
    assert dataclasses.replace(config.engine_config(), deterministic=True).deterministic
