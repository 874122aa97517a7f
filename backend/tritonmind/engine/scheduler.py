"""Decides which tokens the next step computes. Pure Python, no torch; one thread.

Order of one `schedule()`:
 1. every running sequence that has one token left to compute (decode) gets it; a step's token budget is never smaller
    than the number of running sequences, so decodes do not starve;
 2. running sequences in the middle of their prompt get a chunk from what is left of the budget;
 3. waiting sequences are admitted while slots, blocks and budget last: lower priority numbers first, and first come,
    first served among equals.
A sequence that cannot get a block takes it from the running sequence of the highest priority number, among equals the
most recently admitted one, which is preempted: it loses its blocks, takes its place in the queue by its arrival, and
recomputes (or finds in the prefix cache) what it had. No sequence is admitted in a step that preempted one.

`update()` takes the sampled ids of a step. One more step may have been scheduled in between: a sequence that ended is
then in flight once more, and that token is thrown away.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable
from typing import NamedTuple

from tritonmind.config import SchedulerConfig
from tritonmind.engine.block_manager import BlockManager
from tritonmind.messages import EngineRequest, FinishReason, TokenLogprob, TokenOutput
from tritonmind.sequence import Sequence, SequenceStatus


class ScheduledSequence(NamedTuple):
    """`num_new_tokens` tokens of a sequence, from position `start`; `samples` if the step also draws its next token."""

    seq: Sequence
    start: int
    num_new_tokens: int
    samples: bool


class SchedulerOutput(NamedTuple):
    """The work of one step: decodes compute one token each and always sample, prefills compute a chunk of a prompt."""

    decodes: list[ScheduledSequence]
    prefills: list[ScheduledSequence]

    @property
    def items(self) -> list[ScheduledSequence]:
        return self.decodes + self.prefills

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(item.num_new_tokens for item in self.prefills)


class Scheduler:
    """Queues, slots and blocks of all live sequences. `max_num_batched_tokens` must be resolved (not 0)."""

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        assert config.max_num_batched_tokens >= config.max_num_seqs
        self.config = config
        self.block_manager = block_manager
        self.waiting: list[Sequence] = []  # in order of priority, then arrival
        self.running: list[Sequence] = []  # in order of priority, then admission
        self.num_preemptions = 0
        self._num_arrivals = 0
        self._num_admissions = 0
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._live: dict[int, Sequence] = {}

    @property
    def num_live(self) -> int:
        return len(self._live)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. It must fit the context and carry an id that is not live (the client checked both)."""
        assert request.request_id not in self._live
        assert 0 < len(request.prompt_token_ids) < self.config.max_model_len
        seq = Sequence(request, self._num_arrivals)
        self._num_arrivals += 1
        self._live[request.request_id] = seq
        insort(self.waiting, seq, key=_queue_order)

    def abort(self, request_ids: Iterable[int]) -> list[TokenOutput]:
        """End these requests now. Returns their last outputs; ids that are not live are ignored."""
        outputs = []
        for request_id in request_ids:
            seq = self._live.get(request_id)
            if seq is not None:
                self._finish(seq, "cancelled")
                outputs.append(_output(seq, []))
        return outputs

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's tokens and account for them as computed. Empty lists: nothing can run now."""
        decodes: list[ScheduledSequence] = []
        prefills: list[ScheduledSequence] = []
        budget = self.config.max_num_batched_tokens
        num_preemptions_before = self.num_preemptions

        # Preemption shrinks self.running while we walk it, hence the copies. It takes from the end, so it never takes
        # back what this step has already given to an earlier one.
        for seq in [s for s in self.running if s.num_tokens - s.num_computed_tokens == 1]:
            if seq.status is SequenceStatus.RUNNING and not self._is_complete(seq) and self._grow(seq, decodes):
                decodes.append(self._take(seq, 1))
                budget -= 1
        for seq in [s for s in self.running if s.num_tokens - s.num_computed_tokens > 1]:
            num_new = min(budget, seq.num_tokens - seq.num_computed_tokens)
            if seq.status is SequenceStatus.RUNNING and num_new > 0:
                prefills.append(self._take(seq, num_new))
                budget -= num_new

        if self.num_preemptions == num_preemptions_before:
            while self._free_slots and budget > 0:
                head, num_passed = self._next_waiting()
                # Those passed over came first: slots are kept for them. The token of a preempted sequence may still be
                # in flight; it is needed to recompute.
                if head is None or num_passed >= len(self._free_slots) or head.num_pending_tokens:
                    break
                if not self.block_manager.admit(head):
                    break
                self.waiting.remove(head)
                self._start(head)
                num_new = min(budget, head.num_tokens - head.num_computed_tokens)
                item = self._take(head, num_new)
                (decodes if num_new == 1 and item.samples else prefills).append(item)
                budget -= num_new
        return SchedulerOutput(decodes, prefills)

    def update(
        self,
        output: SchedulerOutput,
        sampled_ids: list[int],
        logprobs: list[TokenLogprob | None] | None = None,
        prompt_logprobs: list[list[TokenLogprob]] | None = None,
    ) -> list[TokenOutput]:
        """Take a finished step's sampled ids: one for each item with `samples`, in the order of `output.items`.

        logprobs: as many, None for the rows that asked for none; or None for all. prompt_logprobs: for each prefill,
        those of the tokens after its first one; or None for all.
        """
        for item, values in zip(output.prefills, prompt_logprobs or (), strict=False):
            if item.seq.prompt_logprobs is not None:
                item.seq.prompt_logprobs[item.start + 1 : item.start + 1 + len(values)] = values
        outputs = []
        ids = iter(sampled_ids)
        row_logprobs = iter(logprobs or [None] * len(sampled_ids))
        for item in output.items:
            seq = item.seq
            token_id, logprob = (next(ids), next(row_logprobs)) if item.samples else (None, None)
            if seq.status is SequenceStatus.FINISHED:
                continue
            if token_id is not None:
                seq.num_pending_tokens -= 1
                seq.token_ids.append(token_id)
            end = item.start + item.num_new_tokens
            # A sequence preempted since then has no blocks any more.
            if seq.status is SequenceStatus.RUNNING and seq.num_computed_tokens >= end:
                self.block_manager.commit(seq, end)
            if token_id is not None:
                reason = self._finish_reason(seq, token_id)
                if reason is not None:
                    self._finish(seq, reason)
                outputs.append(_output(seq, [token_id], logprob))
        assert next(ids, None) is None, "more sampled ids than sampling sequences"
        return outputs

    def check_integrity(self) -> None:
        """Re-derive every invariant of queues, slots and blocks; AssertionError if one does not hold."""
        assert len(self.waiting) + len(self.running) == len(self._live)
        assert {s.request_id for s in [*self.waiting, *self.running]} == self._live.keys()
        assert self.waiting == sorted(self.waiting, key=_queue_order)
        assert self.running == sorted(self.running, key=_running_order)
        for seq in self.waiting:
            assert seq.status is SequenceStatus.WAITING and seq.slot == -1 and not seq.block_table
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING
            assert seq.num_computed_tokens <= seq.num_tokens
        slots = [seq.slot for seq in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_num_seqs)), "a slot is lost or held twice"
        self.block_manager.check_integrity(self._live.values())

    def _next_waiting(self) -> tuple[Sequence | None, int]:
        """The first in the queue that can start, and how many before it wait for the prompt that they share."""
        for num_passed, seq in enumerate(self.waiting):
            if not self._awaits_parent(seq):
                return seq, num_passed
        return None, len(self.waiting)

    def _awaits_parent(self, seq: Sequence) -> bool:
        """Whether the prompt that `seq` shares is still being computed by the request it names, if that is live."""
        parent_id = seq.request.parent_id
        parent = None if parent_id is None else self._live.get(parent_id)
        return parent is not None and not self.block_manager.has_prompt(parent)

    def _is_complete(self, seq: Sequence) -> bool:
        """All tokens it may have are known or in flight; it only waits for the last update."""
        return seq.num_generated_tokens >= seq.request.max_tokens or seq.num_tokens >= self.config.max_model_len

    def _take(self, seq: Sequence, num_new_tokens: int) -> ScheduledSequence:
        start = seq.num_computed_tokens
        seq.num_computed_tokens += num_new_tokens
        samples = seq.num_computed_tokens == seq.num_tokens
        if samples:
            seq.num_pending_tokens += 1
        return ScheduledSequence(seq, start, num_new_tokens, samples)

    def _grow(self, seq: Sequence, decodes: list[ScheduledSequence]) -> bool:
        """A block for the next token, preempting later sequences if need be; False if `seq` itself had to go."""
        while not self.block_manager.grow(seq, seq.num_computed_tokens + 1):
            victim = self.running[-1]
            assert all(item.seq is not victim for item in decodes), "a sequence of this step was chosen for preemption"
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _start(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        seq.slot = self._free_slots.pop()
        seq.admission = self._num_admissions
        self._num_admissions += 1
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens
            seq.queue_time_s = time.monotonic() - seq.queued_at
        insort(self.running, seq, key=_running_order)

    def _stop(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._free_slots.append(seq.slot)
            seq.slot = -1
            self.block_manager.release(seq)
        else:
            self.waiting.remove(seq)

    def _preempt(self, seq: Sequence) -> None:
        self._stop(seq)
        seq.status = SequenceStatus.WAITING
        insort(self.waiting, seq, key=_queue_order)
        self.num_preemptions += 1

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        self._stop(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        del self._live[seq.request_id]

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        if token_id in seq.stop_token_ids:
            return "stop"
        num_generated = len(seq.token_ids) - seq.num_prompt_tokens
        if num_generated >= seq.request.max_tokens or len(seq.token_ids) >= self.config.max_model_len:
            return "length"
        return None


def _queue_order(seq: Sequence) -> tuple[int, int]:
    return seq.request.priority, seq.arrival


def _running_order(seq: Sequence) -> tuple[int, int]:
    return seq.request.priority, seq.admission


def _output(seq: Sequence, token_ids: list[int], logprob: TokenLogprob | None = None) -> TokenOutput:
    is_first = len(seq.token_ids) == seq.num_prompt_tokens + len(token_ids)
    return TokenOutput(
        request_id=seq.request_id,
        token_ids=token_ids,
        num_prompt_tokens=seq.num_prompt_tokens,
        num_cached_tokens=seq.num_cached_tokens or 0,
        finish_reason=seq.finish_reason,
        stop_token_id=token_ids[-1] if seq.finish_reason == "stop" else None,
        queue_time_s=seq.queue_time_s if is_first else None,
        logprobs=None if logprob is None else [logprob],
        prompt_logprobs=seq.prompt_logprobs if is_first and token_ids else None,
    )
