"""The rules of tuning.py and attention_tuning.py: what a tile must never depend on, and what must fit. No triton here."""

import itertools

import pytest

from turbotriton.backend.ops.kernels.attention_tuning import (
    MAX_SPLITS,
    MIN_SPLIT_TOKENS,
    decode_attention_config,
    prefill_attention_config,
)
from turbotriton.backend.ops.kernels.tuning import next_power_of_2, rms_norm_config, rotary_config, silu_and_mul_config

H200_SMS = 132
TILE = ("block_g", "block_n", "block_d", "min_split_tokens", "num_warps", "num_stages")


def attention(**changes):
    shape = {"batch": 1, "num_kv_heads": 8, "group_size": 4, "head_dim": 128, "element_bytes": 2, "max_context": 32768}
    return decode_attention_config(**(shape | {"num_sms": H200_SMS} | changes))


@pytest.mark.parametrize("hidden", [1, 7, 128, 1000, 4096, 5120, 32768])
def test_a_norm_tile_holds_the_row_and_at_most_64_values_a_thread(hidden):
    config = rms_norm_config(hidden)
    assert config.block_n == next_power_of_2(hidden) >= hidden
    assert config.block_m * config.block_n <= 64 * 32 * config.num_warps


def test_rotary_blocks_cover_half_and_rest():
    for num_kv_heads, head_dim in itertools.product((1, 3, 8, 40), (16, 80, 128, 256)):
        for rotary_dim in (2, head_dim // 2, head_dim):
            config = rotary_config(40, num_kv_heads, head_dim, rotary_dim)
            assert config.block_half >= rotary_dim // 2
            assert config.block_rest >= head_dim - rotary_dim
            assert (config.block_rest == 0) == (rotary_dim == head_dim)
            assert config.block_h * next_power_of_2(head_dim) <= 4096


@pytest.mark.parametrize("inter", [1, 33, 1000, 8192, 14336, 28672])
def test_a_silu_tile_is_1024_elements_and_no_wider_than_the_row_padded(inter):
    config = silu_and_mul_config(inter)
    assert config.block_m * config.block_n == 1024
    assert config.block_n <= next_power_of_2(inter)


def test_attention_tiles_never_depend_on_the_context_and_take_seven_kinds_over_all_batches():
    """A context would compile anew on the request path; the batches are compiled when a model is loaded."""
    for batch in (1, 7, 8, 32, 33, 64, 256):
        assert (
            len({tuple(getattr(attention(batch=batch, max_context=c), name) for name in TILE) for c in (64, 4096, 131072)}) == 1
        )
    assert len({tuple(getattr(attention(batch=batch), name) for name in TILE) for batch in range(1, 300)}) == 7


def test_a_split_is_whole_tiles():
    for element_bytes, head_dim in itertools.product((2, 4), (16, 40, 64, 128, 256)):
        config = attention(element_bytes=element_bytes, head_dim=head_dim)
        assert config.min_split_tokens % config.block_n == 0
        assert config.min_split_tokens >= MIN_SPLIT_TOKENS


def test_one_long_sequence_is_split_over_the_device_and_a_large_batch_is_not_split():
    assert attention(batch=1).num_splits * 8 >= H200_SMS
    assert attention(batch=256).num_splits == 1


def test_splits_stop_where_the_context_ends():
    assert attention(max_context=64).num_splits == 1
    assert attention(max_context=1024).num_splits == 16
    assert attention(num_kv_heads=1, max_context=10**6).num_splits <= MAX_SPLITS


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_a_prefill_tile_holds_a_query_and_fits_the_chip(capability):
    """q, and the tiles of K and V that its stages hold, in 99 KiB (sm_86, sm_89, sm_120) or 227 KiB."""
    for head_dim, element_bytes, group_size in itertools.product((16, 40, 64, 128, 256), (2, 4), (1, 4, 7, 16)):
        config = prefill_attention_config(group_size, head_dim, element_bytes, capability)
        assert config.block_m >= group_size
        assert config.block_d >= head_dim
        num_tiles = 2 * (config.num_stages - 1)
        limit = 227 if 90 <= capability < 120 else 99
        assert (config.block_m + num_tiles * config.block_n) * config.block_d * element_bytes <= limit * 1024


def test_a_group_larger_than_the_prefill_tile_widens_it():
    assert prefill_attention_config(71, 64, 2, 80).block_m == 128


def test_groups_are_padded_to_the_rows_of_a_matrix_instruction():
    assert [attention(group_size=size).block_g for size in (1, 4, 16, 17)] == [16, 16, 16, 32]


def test_attention_asks_early_where_its_programs_fill_a_third_of_the_device_and_leave_none_over():
    early = [batch for batch in range(1, 300) if attention(batch=batch).is_early]
    assert early == list(range(6, 17))
