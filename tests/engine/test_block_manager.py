"""Blocks: allocation, sharing, eviction order, and the self-check that must notice damage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonmind.engine.block_manager import BlockManager
from tritonmind.messages import EngineRequest
from tritonmind.sequence import Sequence

BLOCK = 4


def sequence(tokens: list[int], request_id: int = 0) -> Sequence:
    return Sequence(
        EngineRequest(
            request_id=request_id,
            prompt_token_ids=tokens,
            max_tokens=8,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            seed=0,
            stop_token_ids=[],
        )
    )


def computed(manager: BlockManager, tokens: list[int], request_id: int = 0) -> Sequence:
    """A sequence that was admitted and whose tokens were all computed."""
    seq = sequence(tokens, request_id)
    assert manager.admit(seq)
    seq.num_computed_tokens = len(tokens)
    manager.commit(seq, len(tokens))
    return seq


def test_a_prompt_gets_just_the_blocks_it_needs() -> None:
    manager = BlockManager(8, BLOCK, enable_prefix_caching=True)
    seq = sequence(list(range(9)))
    assert manager.admit(seq)
    assert len(seq.block_table) == 3 and seq.num_computed_tokens == 0
    assert manager.num_free_blocks == 5
    manager.check_integrity([seq])


def test_a_second_sequence_shares_full_blocks_of_the_first_but_computes_its_last_token() -> None:
    manager = BlockManager(8, BLOCK, enable_prefix_caching=True)
    first = computed(manager, list(range(8)))
    second = sequence(list(range(8)), 1)
    assert manager.admit(second)
    # All 8 tokens are cached, but logits of the last one are needed: only the first block may be reused.
    assert second.num_computed_tokens == BLOCK
    assert second.block_table[0] == first.block_table[0] and second.block_table[1] != first.block_table[1]
    manager.check_integrity([first, second])


def test_a_block_matches_only_behind_the_same_prefix() -> None:
    manager = BlockManager(8, BLOCK, enable_prefix_caching=True)
    computed(manager, [1, 1, 1, 1, 2, 2, 2, 2, 3])
    other = sequence([9, 9, 9, 9, 2, 2, 2, 2, 3], 1)
    assert manager.admit(other)
    assert other.num_computed_tokens == 0


def test_blocks_that_were_not_computed_are_not_shared() -> None:
    manager = BlockManager(8, BLOCK, enable_prefix_caching=True)
    first = sequence(list(range(9)))
    assert manager.admit(first)
    second = sequence(list(range(9)), 1)
    assert manager.admit(second)
    assert second.num_computed_tokens == 0


def test_released_blocks_stay_cached_and_are_evicted_oldest_sequence_first_tail_first() -> None:
    manager = BlockManager(4, BLOCK, enable_prefix_caching=True)
    old = computed(manager, list(range(8)))
    new = computed(manager, list(range(100, 108)), 1)
    old_head, old_tail = old.block_table
    new_blocks = list(new.block_table)
    manager.release(old)
    manager.release(new)
    assert manager.num_cached_blocks == 4 and manager.num_free_blocks == 0
    taker = sequence([50], 2)
    assert manager.admit(taker)
    assert taker.block_table == [old_tail]
    assert manager.grow(taker, 2 * BLOCK)
    assert taker.block_table == [old_tail, old_head]
    assert manager.grow(taker, 3 * BLOCK)
    assert taker.block_table[-1] == new_blocks[1], "the head of the newer sequence goes last"
    manager.check_integrity([taker])


def test_a_cached_prefix_is_revived_not_copied() -> None:
    manager = BlockManager(4, BLOCK, enable_prefix_caching=True)
    first = computed(manager, list(range(9)))
    blocks = list(first.block_table)
    manager.release(first)
    again = sequence(list(range(9)), 1)
    assert manager.admit(again)
    assert again.block_table[:2] == blocks[:2] and again.num_computed_tokens == 8
    manager.check_integrity([again])


def test_admission_that_does_not_fit_changes_nothing() -> None:
    manager = BlockManager(3, BLOCK, enable_prefix_caching=True)
    first = computed(manager, list(range(8)))
    big = sequence(list(range(8)) + [7] * 8, 1)
    assert not manager.admit(big), "two shared and two new blocks are asked for, one is left"
    assert big.block_table == [] and big.num_computed_tokens == 0
    manager.check_integrity([first])
    manager.release(first)
    assert not manager.admit(big), "reviving the cached blocks leaves one for the two new ones"
    manager.check_integrity([])


def test_without_prefix_caching_nothing_is_kept() -> None:
    manager = BlockManager(4, BLOCK, enable_prefix_caching=False)
    first = computed(manager, list(range(9)))
    manager.release(first)
    assert manager.num_cached_blocks == 0 and manager.num_free_blocks == 4
    again = sequence(list(range(9)), 1)
    assert manager.admit(again) and again.num_computed_tokens == 0


def test_reset_prefix_cache_forgets_cached_and_used_blocks() -> None:
    manager = BlockManager(6, BLOCK, enable_prefix_caching=True)
    done = computed(manager, list(range(9)))
    manager.release(done)
    live = computed(manager, list(range(100, 105)), 1)
    manager.reset_prefix_cache()
    manager.check_integrity([live])
    assert manager.num_cached_blocks == 0
    for tokens in (list(range(9)), list(range(100, 105))):
        probe = sequence(tokens, 2)
        assert manager.admit(probe) and probe.num_computed_tokens == 0
        manager.release(probe)
    manager.release(live)
    manager.check_integrity([])


@pytest.mark.parametrize("damage", ["lost", "double free", "wrong count", "stale hash"])
def test_check_integrity_notices(damage: str) -> None:
    manager = BlockManager(4, BLOCK, enable_prefix_caching=True)
    seq = computed(manager, list(range(6)))
    if damage == "lost":
        manager._free.pop()
    elif damage == "double free":
        manager._free.append(seq.block_table[0])
    elif damage == "wrong count":
        manager._ref_counts[seq.block_table[0]] += 1
    else:
        manager._hash_of[manager._free[0]] = b"x"
    with pytest.raises(AssertionError):
        manager.check_integrity([seq])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 14), st.integers(0, 2)), min_size=1, max_size=40),
    st.booleans(),
)
def test_integrity_under_random_use(actions: list[tuple[int, int, int]], caching: bool) -> None:
    manager = BlockManager(9, BLOCK, enable_prefix_caching=caching)
    live: list[Sequence] = []
    for number, (action, size, salt) in enumerate(actions):
        if action == 0 or not live:
            seq = sequence([salt] * size, number)
            if manager.admit(seq):
                live.append(seq)
        elif action == 1:
            seq = live[size % len(live)]
            if manager.grow(seq, len(seq.token_ids) + 1):
                seq.token_ids.append(salt)
        elif action == 2:
            seq = live[size % len(live)]
            seq.num_computed_tokens = len(seq.token_ids)
            manager.commit(seq, len(seq.token_ids))
        else:
            manager.release(live.pop(size % len(live)))
        manager.check_integrity(live)
    for seq in live:
        manager.release(seq)
    manager.check_integrity([])
    assert manager.num_used_blocks == 0
