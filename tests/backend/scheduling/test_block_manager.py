"""Exact block ids, the order in which blocks are given away, and what the prefix cache finds."""

from turbotriton.backend.scheduling.block_manager import BlockManager, chain_digest

ROOT = b"rope kv0"


def publish_all(blocks: BlockManager, token_ids: list[int], block_ids: list[int]) -> None:
    parent = ROOT
    for index, block in enumerate(block_ids):
        parent = chain_digest(parent, token_ids[index * blocks.block_size : (index + 1) * blocks.block_size])
        blocks.publish(block, parent)


def test_blocks_are_given_away_oldest_first_and_a_sequence_returns_its_last_block_first() -> None:
    blocks = BlockManager(5, 2, enable_prefix_caching=True)
    assert blocks.allocate(3) == [0, 1, 2]
    blocks.release([0, 1, 2])
    assert blocks.allocate(5) == [3, 4, 2, 1, 0]


def test_prefix_hit_never_covers_the_last_token() -> None:
    blocks = BlockManager(4, 2, enable_prefix_caching=True)
    publish_all(blocks, [1, 2, 3, 4], blocks.allocate(2))
    assert blocks.match_prefix(ROOT, [1, 2, 3, 4])[0] == [0]
    assert blocks.match_prefix(ROOT, [1, 2, 3, 4, 5])[0] == [0, 1]
    assert blocks.match_prefix(ROOT, [1, 2, 9, 4, 5])[0] == [0]
    assert blocks.match_prefix(b"other rope", [1, 2, 3, 4, 5])[0] == []


def test_published_blocks_stay_findable_while_free_and_are_forgotten_when_given_away() -> None:
    blocks = BlockManager(3, 2, enable_prefix_caching=True)
    publish_all(blocks, [1, 2, 3, 4], blocks.allocate(2))
    blocks.release([0, 1])
    assert blocks.match_prefix(ROOT, [1, 2, 3, 4, 5])[0] == [0, 1]
    assert blocks.allocate(2) == [2, 1]  # the never used one, then the continuation
    assert blocks.match_prefix(ROOT, [1, 2, 3, 4, 5])[0] == [0]


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    blocks = BlockManager(2, 2, enable_prefix_caching=True)
    publish_all(blocks, [1, 2], blocks.allocate(1))
    blocks.hold([0])
    blocks.release([0])
    assert blocks.num_free_blocks == 1
    blocks.release([0])
    assert blocks.num_free_blocks == 2


def test_nothing_is_found_when_prefix_caching_is_off() -> None:
    blocks = BlockManager(2, 2, enable_prefix_caching=False)
    publish_all(blocks, [1, 2], blocks.allocate(1))
    assert blocks.match_prefix(ROOT, [1, 2, 3])[0] == []
