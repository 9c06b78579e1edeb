"""How many KV blocks cache_max_entry_count gives."""

import dataclasses

import pytest
import torch
from tests.backend.runner.test_weights import HF
from tests.backend.workspace import hf_workspace_config

from turbotriton.backend.runner.kv_cache import allocate_kv_cache, free_memory_bytes, kv_block_bytes, num_kv_blocks
from turbotriton.contract.errors import ConfigError
from turbotriton.contract.ini import EngineConfig

MODEL = hf_workspace_config(HF).model_config()
ENGINE = EngineConfig(session_len=100, max_batch_size=4, cache_block_seq_len=16, cache_max_entry_count=9)
BLOCK_BYTES = 2 * 2 * 4 * 16 * 8 * 2  # k and v, layers, kv heads, tokens, head_dim, fp16


def blocks(count, free_bytes=10**9, *, cap=False):
    assert kv_block_bytes(MODEL, ENGINE, torch.float16, 0) == BLOCK_BYTES
    return num_kv_blocks(dataclasses.replace(ENGINE, cache_max_entry_count=count), free_bytes, BLOCK_BYTES, cap=cap)


def test_a_count_of_one_or_more_is_the_number_of_blocks():
    assert blocks(9) == 9
    assert blocks(12.7) == 12


def test_below_one_it_is_a_share_of_free_memory():
    assert blocks(0.5, 40 * BLOCK_BYTES) == 20


def test_a_share_of_host_memory_stops_at_what_all_slots_can_use():
    assert blocks(0.5, 10**9, cap=True) == 4 * 7
    assert blocks(500, cap=True) == 500


def test_a_pool_below_one_sequence_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"6 blocks of 16 tokens.*7 that session_len 100 needs; raise cache_max_entry_count"):
        blocks(6)


def test_the_pool_has_the_layout_of_the_ops_and_starts_finite():
    cache = allocate_kv_cache(MODEL, ENGINE, torch.device("cpu"), torch.float16)
    assert cache.num_blocks == 9
    assert len(cache.k) == len(cache.v) == 2
    for pages in (*cache.k, *cache.v):
        assert pages.shape == (9, 4, 16, 8)
        assert not pages.any()


def test_free_host_memory_is_read():
    assert free_memory_bytes(torch.device("cpu")) > 10**7
