"""Hands out KV-cache blocks and remembers full ones by the tokens they hold (automatic prefix caching).

Every block is in exactly one state:

    used    reference count > 0: in the block table of that many sequences; may carry a hash
    cached  reference count 0, carries a hash: its K and V can be reused; evicted least recently used first
    free    reference count 0, no hash

A block's hash covers its own tokens and, through its predecessor's hash, all tokens before it. Blocks get a hash only
once their K and V have been computed. A released sequence gives its blocks back tail first, so that the head of a
prompt, which others are likelier to share, is evicted last.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from hashlib import blake2b

from tritonmind.sequence import Sequence


def _root_hash(variant: int) -> bytes:
    return variant.to_bytes(16, "little")


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """Digest of one full block of tokens after the blocks digested in `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockManager:
    """Bookkeeping of `num_blocks` blocks of `block_size` tokens. Knows nothing of tensors."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._ref_counts = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available_blocks(self) -> int:
        """Blocks an allocation can take: free ones and cached ones that it would evict."""
        return len(self._free) + len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def admit(self, seq: Sequence, *, variant: int = 0) -> bool:
        """Give a sequence without blocks all blocks of its known tokens, reusing cached ones; False if they don't fit.

        At least the last token is left to compute, for its logits. Sets `num_computed_tokens` to what was reused.
        variant: of rotary frequencies. Blocks are shared within one only: of another, K is another.
        """
        assert not seq.block_table
        if seq.variant != variant:
            seq.variant = variant
            seq.block_hashes.clear()
        matched = self._match_prefix(seq)
        num_new = self.num_blocks_for(seq.num_tokens) - len(matched)
        # Matched blocks of reference count 0 leave the evictable set as well.
        num_revived = sum(self._ref_counts[block] == 0 for block in matched)
        if num_new + num_revived > self.num_available_blocks:
            return False
        for block in matched:
            self._cached.pop(block, None)
            self._ref_counts[block] += 1
        seq.block_table.extend(matched)
        seq.num_committed_blocks = len(matched)
        seq.num_computed_tokens = len(matched) * self.block_size
        self._extend(seq, num_new)
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make the block table cover `num_tokens` tokens; False, changing nothing, if the blocks are not there."""
        num_new = self.num_blocks_for(num_tokens) - len(seq.block_table)
        if num_new > self.num_available_blocks:
            return False
        self._extend(seq, num_new)
        return True

    def commit(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Make the sequence's full blocks among its first `num_computed_tokens` tokens available to others."""
        if not self.enable_prefix_caching:
            return
        num_full = min(num_computed_tokens, len(seq.token_ids)) // self.block_size
        if num_full <= seq.num_committed_blocks:
            return
        self._hash_blocks(seq, num_full)
        for index in range(seq.num_committed_blocks, num_full):
            digest = seq.block_hashes[index]
            # Another block may hold the same tokens already; ours then stays private and is freed with its sequence.
            if digest not in self._block_of:
                block = seq.block_table[index]
                self._block_of[digest] = block
                self._hash_of[block] = digest
        seq.num_committed_blocks = num_full

    def has_prompt(self, seq: Sequence) -> bool:
        """Whether all blocks of the sequence's prompt that another one can share have been computed."""
        return not self.enable_prefix_caching or seq.num_committed_blocks >= self._num_shareable(seq.num_prompt_tokens)

    def release(self, seq: Sequence) -> None:
        """Take all blocks back, tail first."""
        for block in reversed(seq.block_table):
            assert self._ref_counts[block] > 0
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)
        seq.block_table.clear()
        seq.num_committed_blocks = 0
        seq.num_computed_tokens = 0

    def reset_prefix_cache(self) -> None:
        """Forget every hash. Used blocks keep serving their sequences."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Re-derive every invariant from the live sequences' block tables; AssertionError if one does not hold."""
        expected: Counter[int] = Counter()
        for seq in sequences:
            assert len(set(seq.block_table)) == len(seq.block_table), f"{seq.request_id}: a block twice in one table"
            assert seq.num_computed_tokens <= len(seq.block_table) * self.block_size, (
                f"{seq.request_id}: tokens without a block"
            )
            assert seq.num_committed_blocks <= len(seq.block_table)
            expected.update(seq.block_table)
        for block in range(self.num_blocks):
            assert self._ref_counts[block] == expected[block], (
                f"block {block}: reference count {self._ref_counts[block]}, in {expected[block]} block tables"
            )
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._ref_counts) if count}
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert free.isdisjoint(cached) and free.isdisjoint(used) and cached.isdisjoint(used), "a block is in two states"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block is in no state"
        assert cached <= self._hash_of.keys() and free.isdisjoint(self._hash_of), "cached means hashed, free means not"
        assert {digest: block for block, digest in self._hash_of.items()} == self._block_of, "hash maps disagree"

    def _match_prefix(self, seq: Sequence) -> list[int]:
        # Log-probabilities of a prompt need all of it to be computed.
        if not self.enable_prefix_caching or seq.prompt_logprobs is not None:
            return []
        matched: list[int] = []
        for index in range(self._num_shareable(len(seq.token_ids))):
            self._hash_blocks(seq, index + 1)
            block = self._block_of.get(seq.block_hashes[index])
            if block is None:
                break
            matched.append(block)
        return matched

    def _num_shareable(self, num_tokens: int) -> int:
        """Full blocks before the last token, which each sequence computes for its logits."""
        return (num_tokens - 1) // self.block_size

    def _hash_blocks(self, seq: Sequence, num_blocks: int) -> None:
        hashes, size = seq.block_hashes, self.block_size
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            hashes.append(
                hash_block(hashes[-1] if hashes else _root_hash(seq.variant), seq.token_ids[start : start + size])
            )

    def _extend(self, seq: Sequence, num_blocks: int) -> None:
        for _ in range(num_blocks):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._hash_of.pop(block)]
            assert self._ref_counts[block] == 0
            self._ref_counts[block] = 1
            seq.block_table.append(block)
