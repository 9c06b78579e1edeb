"""What 4 bit keys are stored less of, against sums in plain Python."""

import cmath

import pytest
import torch
from tests.backend.runner.test_weights import HF
from tests.backend.workspace import hf_workspace_config, write_workspace
from tests.checkpoints import make_tensors

from turbotriton.backend.model.decoder import Decoder
from turbotriton.backend.model.prompt_batch import prompt_batch
from turbotriton.backend.model.rope import inverse_frequencies
from turbotriton.backend.ops.table import REFERENCE
from turbotriton.backend.runner.key_offsets import key_offsets
from turbotriton.backend.runner.weights import load_weights

CPU, SESSION_LEN = torch.device("cpu"), 60


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offsets")
    config = hf_workspace_config(HF, attn_bias=1, session_len=SESSION_LEN)
    tensors = make_tensors(HF.to_dict(), seed=5)
    for i in range(HF.num_hidden_layers):
        tensors[f"model.layers.{i}.self_attn.k_proj.bias"] *= 20  # keys that stand far from zero
    write_workspace(folder, config, tensors)
    model = config.model_config()
    return Decoder(model, load_weights(model, folder, CPU, torch.float32), REFERENCE)


def keys_of(decoder, ids):
    """[num_layers, num_tokens, num_kv_heads, head_dim]"""
    model = decoder.config
    shape = (model.num_layers, 1, model.num_kv_heads, len(ids), model.head_dim)
    k, v = torch.zeros(shape), torch.zeros(shape)
    batch = prompt_batch(model.rope, len(ids), len(ids), CPU, use_logn_attn=False)
    decoder.hidden_states(ids, batch, list(k), list(v))
    return k[:, 0].transpose(1, 2)


@torch.inference_mode()
def test_offsets_are_mean_keys_turned_through_all_positions(decoder):
    found = key_offsets(decoder, SESSION_LEN, CPU, torch.float32)
    model = decoder.config
    ids = torch.randint(model.vocab_size, (SESSION_LEN,), generator=torch.Generator().manual_seed(0))
    keys, half = keys_of(decoder, ids), model.head_dim // 2
    frequencies = inverse_frequencies(model.rope, model.rope.theta_for(SESSION_LEN)).tolist()
    for layer in range(model.num_layers):
        for i, frequency in enumerate(frequencies):
            turns = [cmath.exp(1j * p * frequency) for p in range(SESSION_LEN)]
            for head in range(model.num_kv_heads):
                pairs = [complex(key[head, i], key[head, i + half]) / turn for key, turn in zip(keys[layer], turns, strict=True)]
                wanted = sum(pairs) / len(pairs) * sum(turns) / len(turns)
                assert complex(found[layer, head, i], found[layer, head, i + half]) == pytest.approx(wanted, abs=2e-4)


@torch.inference_mode()
def test_what_is_left_of_new_keys_has_a_smaller_range(decoder):
    offsets = key_offsets(decoder, SESSION_LEN, CPU, torch.float32)
    keys = keys_of(decoder, torch.randint(decoder.config.vocab_size, (40,), generator=torch.Generator().manual_seed(9)))
    left = keys - offsets[:, None]
    assert float((left.amax(-1) - left.amin(-1)).mean()) < 0.8 * float((keys.amax(-1) - keys.amin(-1)).mean())


@torch.inference_mode()
def test_offsets_are_the_same_every_time(decoder):
    assert torch.equal(key_offsets(decoder, 37, CPU, torch.float32), key_offsets(decoder, 37, CPU, torch.float32))
