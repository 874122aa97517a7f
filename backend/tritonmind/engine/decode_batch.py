"""The sequences that decode, as columns: a step takes a token of each, at a cost that hardly grows with their number.

Between two steps every column advances by the same rule, so what a step does one by one is only for the sequences that
join, leave, or come to the end of a page; while there are none of these, all that changes is the position. Rows keep
their order but for the last one, which fills the place of one that leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tritonmind.sequence import Sequence

FROM_DEVICE = -1  # a token id that only the device knows: what was drawn last in the slot
NO_BLOCK = -1


class DecodeRows(NamedTuple):
    """What one step computes of these sequences: one token each, after which it draws the next. Not to be changed.

    While rows stay the same and none is fresh, `slots` is the same object from step to step.
    """

    starts: np.ndarray  # [n] int32, position of the token
    seqs: list[Sequence]
    request_ids: list[int]
    slots: np.ndarray  # [n] int32
    token_ids: np.ndarray  # [n] int32, FROM_DEVICE for all but the rows in `fresh`
    new_blocks: np.ndarray  # [n] int32, the block that the token is the first one of; NO_BLOCK: it has had one before
    fresh: list[int]  # rows that draw for the first time since their sequence was admitted
    growing: list[int]  # rows with a new block
    filling: list[int]  # rows whose token is the last one of its block
    ending: list[int]  # rows whose sequence has all the tokens it may have after this draw


class DecodeBatch:
    """At most `max_num_seqs` sequences, each with one token left to compute, which the next `take` takes."""

    def __init__(self, max_num_seqs: int, block_size: int) -> None:
        self._block_size = block_size
        self._seqs: list[Sequence] = []
        self._request_ids: list[int] = []
        self._columns = np.zeros((6, max_num_seqs), dtype=np.int32)
        self._slots, self._starts, self._token_ids, self._capacities, self._last_starts = self._columns[:5]
        self._marks = self._columns[5]  # the start at which a row comes to the end of its block, or to its last one
        self._num_fresh = 0
        self._new_blocks: dict[int, int] = {}  # by row, of the next take
        # While rows stay the same and none is fresh: all that a step in which nothing is special has but `starts`.
        self._quiet_rows: DecodeRows | None = None
        self._num_quiet = 0  # so many takes come before one that fills a block or ends a sequence, as far as is known
        self._full: list[Sequence] = []  # those whose next token lies beyond their blocks, and some that have left

    def __len__(self) -> int:
        return len(self._seqs)

    @property
    def seqs(self) -> list[Sequence]:
        """The sequences in the order of their rows; not to be changed."""
        return self._seqs

    def num_tokens(self, seq: Sequence) -> int:
        """How many a sequence of the batch has, those in flight included; all but the last are computed."""
        return int(self._starts[seq.row]) + 1

    def add(self, seq: Sequence, *, max_num_tokens: int) -> None:
        """Let a running sequence decode until it has `max_num_tokens`, which it has not yet."""
        start = seq.num_computed_tokens
        assert seq.row < 0 and seq.slot >= 0 and seq.num_tokens == start + 1 < max_num_tokens
        seq.row = row = len(self._seqs)
        self._seqs.append(seq)
        self._request_ids.append(seq.request_id)
        # Without a draw in its slot the token is one of the prompt, or of what it had before it was preempted.
        token_id = FROM_DEVICE if seq.has_drawn else seq.token_ids[start]
        self._num_fresh += not seq.has_drawn
        capacity = len(seq.block_table) * self._block_size
        last_start = max_num_tokens - 2
        mark = min(capacity - 1, last_start)
        self._columns[:, row] = seq.slot, start, token_id, capacity, last_start, mark
        self._quiet_rows, self._num_quiet = None, 0
        if start == capacity:
            self._full.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Let a sequence decode no more; its counts are its own again."""
        assert not self._new_blocks, "rows that have got a block are taken before any leaves"
        row, last = seq.row, len(self._seqs) - 1
        seq.num_computed_tokens = int(self._starts[row])
        seq.num_tokens = seq.num_computed_tokens + 1
        self._num_fresh -= int(self._token_ids[row] != FROM_DEVICE)
        if row < last:
            moved = self._seqs[last]
            moved.row = row
            self._seqs[row], self._request_ids[row] = moved, moved.request_id
            self._columns[:, row] = self._columns[:, last]
        self._seqs.pop()
        self._request_ids.pop()
        seq.row = -1
        self._quiet_rows, self._num_quiet = None, 0

    def without_block(self) -> list[Sequence]:
        """Those whose next token lies beyond their blocks: `add_blocks` must follow, or `remove`."""
        if not self._full:
            return []
        rows = np.array([seq.row for seq in self._full if seq.row >= 0], dtype=np.intp)
        return [self._seqs[row] for row in rows[self._starts[rows] == self._capacities[rows]].tolist()]

    def add_blocks(self, seqs: list[Sequence]) -> None:
        """Sequences have got the block that their next token needs, the last one of their table; `take` follows."""
        self._new_blocks = {seq.row: seq.block_table[-1] for seq in seqs}
        rows = np.array(list(self._new_blocks))
        capacities = self._capacities[rows]
        assert (self._starts[rows] == capacities).all() and not self._num_quiet
        capacities += self._block_size
        self._capacities[rows] = capacities
        self._marks[rows] = np.minimum(capacities - 1, self._last_starts[rows])

    def take(self) -> DecodeRows:
        """The next token of each. Those that may have no further one leave."""
        positions = self._starts[: len(self._seqs)]
        starts = positions.copy()
        positions += 1
        if self._num_quiet:
            assert self._quiet_rows is not None
            self._num_quiet -= 1
            return DecodeRows(starts, *self._quiet_rows[1:])
        rows = self._marked(starts)
        self._full = [rows.seqs[row] for row in rows.filling]
        if not rows.filling and not rows.ending and len(starts):
            self._num_quiet = int((self._marks[: len(starts)] - positions).min())
        if rows.fresh:
            for row in rows.fresh:
                rows.seqs[row].has_drawn = True
            self._token_ids[: len(starts)] = FROM_DEVICE
            self._quiet_rows, self._num_quiet = None, 0
        self._new_blocks = {}
        self._num_fresh = 0
        for row in rows.ending:
            self.remove(rows.seqs[row])
        return rows

    def _marked(self, starts: np.ndarray) -> DecodeRows:
        """The rows at these starts, and what is special about some of them."""
        num_rows = len(starts)
        if self._quiet_rows is None:
            self._quiet_rows = DecodeRows(
                starts=starts,
                seqs=list(self._seqs),
                request_ids=list(self._request_ids),
                slots=self._slots[:num_rows].copy(),
                token_ids=self._token_ids[:num_rows].copy(),
                new_blocks=np.full(num_rows, NO_BLOCK, dtype=np.int32),
                fresh=[],
                growing=[],
                filling=[],
                ending=[],
            )
        rows = DecodeRows(starts, *self._quiet_rows[1:])
        marked = (starts == self._marks[:num_rows]).nonzero()[0]
        if not (marked.size or self._num_fresh or self._new_blocks):
            return rows
        new_blocks, growing = rows.new_blocks, list(self._new_blocks)
        if growing:
            new_blocks = new_blocks.copy()
            new_blocks[growing] = list(self._new_blocks.values())
        return rows._replace(
            new_blocks=new_blocks,
            fresh=(rows.token_ids != FROM_DEVICE).nonzero()[0].tolist() if self._num_fresh else [],
            growing=growing,
            # Blocks are allotted one at a time: where they end, the block of the token ends.
            filling=marked[starts[marked] + 1 == self._capacities[marked]].tolist(),
            ending=marked[starts[marked] == self._last_starts[marked]].tolist(),
        )

    def check_integrity(self, max_num_tokens: Callable[[Sequence], int]) -> None:
        """Re-derive the columns from the sequences and their limits; AssertionError where they differ."""
        assert self._request_ids == [seq.request_id for seq in self._seqs], "request ids are not those of the rows"
        assert self._num_fresh == sum(not seq.has_drawn for seq in self._seqs) and not self._new_blocks
        assert self._quiet_rows is not None or not self._num_quiet
        if self._quiet_rows is not None:
            _, seqs, request_ids, slots, token_ids, new_blocks, *special = self._quiet_rows
            assert not any(special), "what is special about a step is in others too"
            assert seqs == self._seqs and request_ids == self._request_ids, "rows changed behind what steps share"
            assert slots.tolist() == [seq.slot for seq in seqs] and not self._num_fresh
            assert (token_ids == FROM_DEVICE).all() and (new_blocks == NO_BLOCK).all(), "steps share what is of one"
        for row, seq in enumerate(self._seqs):
            where = f"{seq.request_id} in row {row}"
            slot, start, token_id, capacity, last_start, mark = self._columns[:, row].tolist()
            assert seq.row == row and seq.slot == slot, f"{where}: row or slot is another's"
            assert start <= last_start == max_num_tokens(seq) - 2, f"{where}: decodes to another length than its own"
            assert capacity == len(seq.block_table) * self._block_size, f"{where}: blocks are not counted"
            assert start < capacity or (start == capacity and seq in self._full), f"{where}: lacks a block"
            assert capacity - start <= self._block_size, f"{where}: more than one block ahead"
            assert mark == min(capacity - 1, last_start), f"{where}: its next mark is another"
            assert not self._num_quiet or start + self._num_quiet <= mark, f"{where}: a mark would be passed over"
            assert token_id == (FROM_DEVICE if seq.has_drawn else seq.token_ids[start]), f"{where}: wrong token"
