"""Frequencies against the published formulas (and transformers' own, where it has the rule)."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from turbotriton.backend.model.decoder import logn_scale
from turbotriton.backend.model.rope import attention_factor, cos_sin, inverse_frequencies
from turbotriton.contract.ini import RopeConfig

DIM = 64


def transformers_frequencies(kind, theta=10000.0, max_position=4096, **keys):
    parameters = {"rope_type": kind, "rope_theta": theta, **keys}
    config = LlamaConfig(
        hidden_size=2 * DIM, num_attention_heads=2, max_position_embeddings=max_position, rope_parameters=parameters
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("linear", {"factor": 4.0}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}),
        ("llama3", {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0, "original_max_position_embeddings": 100}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 1024}),
        ("yarn", {"factor": 16.0, "original_max_position_embeddings": 256, "beta_fast": 20.0, "beta_slow": 2.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 1.5}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 1024, "truncate": False}),
    ],
)
def test_scaled_frequencies_equal_transformers(kind, keys):
    wanted, wanted_factor = transformers_frequencies(kind, **keys)
    ours = {("yarn_truncate" if name == "truncate" else name): value for name, value in keys.items()}
    rope = RopeConfig(dim=DIM, theta=10000.0, scaling_type=kind, max_position_embeddings=4096, **ours)
    torch.testing.assert_close(inverse_frequencies(rope, rope.theta), wanted.float(), rtol=1e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(wanted_factor)


def test_dynamic_ntk_theta_follows_the_formula_and_is_plain_within_range():
    rope = RopeConfig(dim=DIM, theta=10000.0, scaling_type="dynamic", factor=2.0, max_position_embeddings=512)
    assert rope.theta_for(512) == 10000.0
    scale = 2.0 * 1024 / 512 - (2.0 - 1)
    assert rope.theta_for(1024) == pytest.approx(10000.0 * scale ** (DIM / (DIM - 2)))
    expected = [rope.theta_for(1024) ** (-2 * i / DIM) for i in range(DIM // 2)]
    found = inverse_frequencies(rope, rope.theta_for(1024))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("length", "alpha"), [(512, 1), (513, 3), (1024, 3), (1025, 7), (2048, 7)])
def test_qwen_dynamic_ntk_alpha_grows_by_powers_of_two(length, alpha):
    rope = RopeConfig(dim=DIM, theta=10000.0, scaling_type="qwen", max_position_embeddings=512)
    assert rope.theta_for(length) == pytest.approx(10000.0 * alpha ** (DIM / (DIM - 2)))


def test_logn_scale_is_one_up_to_the_trained_length_and_the_log_ratio_after():
    positions = torch.tensor([0, 5, 511, 512, 1023, 100_000])
    expected = [1.0, 1.0, 1.0, *(math.log(p + 1) / math.log(512) for p in (512, 1023, 100_000))]
    torch.testing.assert_close(logn_scale(positions, 512), torch.tensor(expected))


def test_cos_and_sin_use_each_tokens_own_frequencies():
    inverse = torch.tensor([[1.0, 0.5], [0.25, 0.1]])
    cos, sin = cos_sin(inverse, torch.tensor([3, 40]), 1.5)
    angle = torch.tensor([[3.0, 1.5], [10.0, 4.0]])
    torch.testing.assert_close(cos, 1.5 * angle.cos())
    torch.testing.assert_close(sin, 1.5 * angle.sin())
