"""Sequences that grow beyond what their rotary frequencies are for; see layers/rotary.py."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceABC

from tritonmind.sequence import Sequence, SequenceStatus


class RopeGrowth:
    """limits: lengths beyond which a sequence has other frequencies, ascending; none where they never change."""

    def __init__(self, limits: SequenceABC[int]) -> None:
        self._limits = limits
        self._outgrown: list[Sequence] = []

    def variant(self, seq: Sequence) -> int:
        """Of a sequence that is to be admitted: how many limits it exceeds."""
        return bisect_left(self._limits, seq.num_tokens)

    def max_tokens(self, seq: Sequence, most: int) -> int:
        """How many of `most` tokens it can have as it was admitted: one more than its limit, which is only drawn."""
        return min(most, self._limits[seq.variant] + 1) if seq.variant < len(self._limits) else most

    def note(self, seq: Sequence) -> None:
        """A running sequence has outgrown its frequencies. The step that is being scheduled computes its last token."""
        self._outgrown.append(seq)

    def take(self) -> list[Sequence]:
        """Those noted that are still running."""
        found = [seq for seq in self._outgrown if seq.status is SequenceStatus.RUNNING]
        self._outgrown.clear()
        return found
