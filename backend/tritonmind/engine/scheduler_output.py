"""What the scheduler chose for one step."""

from __future__ import annotations

from typing import NamedTuple

from tritonmind.engine.decode_batch import DecodeRows
from tritonmind.sequence import Sequence


class ScheduledSequence(NamedTuple):
    """`num_new_tokens` tokens of a sequence, from position `start`; `samples` if the step also draws its next token."""

    seq: Sequence
    start: int
    num_new_tokens: int
    samples: bool


class SchedulerOutput(NamedTuple):
    """The work of one step: decodes compute one token each and always sample, prefills compute a chunk of a prompt."""

    decodes: DecodeRows
    prefills: list[ScheduledSequence]

    @property
    def items(self) -> list[ScheduledSequence]:
        """All of it one by one, decodes first."""
        starts = self.decodes.starts.tolist()
        decodes = [ScheduledSequence(seq, start, 1, True) for seq, start in zip(self.decodes.seqs, starts, strict=True)]
        return decodes + self.prefills

    @property
    def num_tokens(self) -> int:
        return len(self.decodes.seqs) + sum(item.num_new_tokens for item in self.prefills)
