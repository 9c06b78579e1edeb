"""KV blocks: who holds them, which hold a known prefix, which are given away next. It knows token ids and blocks, not requests.

    free (ordered, oldest first) ──allocate──> held (ref count >= 1) ──release──> free (at the young end)
         └──────── hold: a prefix hit takes a free or held block ────────┘

A block whose tokens are all computed may be *published* under the digest of everything up to its end:

    digest_0 = H(root, tokens of block 0)     digest_i = H(digest_{i-1}, tokens of block i)

`root` names what besides the tokens decides the keys (rotary base, KV format), so blocks of different rules never meet. A published
block stays findable while it is free; it loses its digest when it is allocated again.

Invariants
- Every block is either free or has a ref count of at least one.
- A digest names at most one block; a second block of the same content stays unpublished.
- `release` gives a sequence's last block first, so that prefixes live longer than their continuations.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

__all__ = ["BlockManager", "chain_digest"]

DIGEST_BYTES = 16


def chain_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of one full block that follows `parent` (another digest, or the chain's root)."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), key=parent, digest_size=DIGEST_BYTES).digest()


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._ref_counts = [0] * num_blocks
        self._digest_to_block: dict[bytes, int] = {}
        self._block_to_digest: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, root: bytes, token_ids: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Published blocks that start `token_ids`, with their digests; changes nothing.

        The last token is never covered: its logits have to be computed.
        """
        blocks: list[int] = []
        digests: list[bytes] = []
        if not self.enable_prefix_caching:
            return blocks, digests
        parent = root
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            parent = chain_digest(parent, token_ids[start : start + self.block_size])
            block = self._digest_to_block.get(parent)
            if block is None:
                break
            blocks.append(block)
            digests.append(parent)
        return blocks, digests

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks `hold` would take out of the free ones."""
        return sum(self._ref_counts[block] == 0 for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Adds one holder to each of these published blocks."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """The `count` oldest free blocks, each with one holder. The caller has checked `num_free_blocks`."""
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        blocks = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            digest = self._block_to_digest.pop(block, None)
            if digest is not None:
                del self._digest_to_block[digest]
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Makes a fully computed block findable under `digest`."""
        if self.enable_prefix_caching and digest not in self._digest_to_block and block not in self._block_to_digest:
            self._digest_to_block[digest] = block
            self._block_to_digest[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Takes one holder away from each block of a sequence, last block first."""
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} released twice"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
