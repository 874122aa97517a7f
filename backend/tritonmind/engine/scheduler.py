"""Decides which tokens the next step computes. No torch; one thread.

Order of one `schedule()`:
 1. every running sequence that has one token left to compute (decode) gets it; a step's token budget is never smaller
    than the number of running sequences, so decodes do not starve;
 2. running sequences in the middle of their prompt get a chunk from what is left of the budget, all but the long ones,
    which need more than one whole step;
 3. waiting sequences are admitted while slots, blocks and budget last: lower priority numbers first, and first come,
    first served among equals;
 4. long prompts get what is left, and half of it was kept for them: neither they nor those behind them starve;
 5. where steps with prompts have a price of their own, few tokens of prompts beside many decodes wait a few steps for
    others to share one with: until then 2 to 4 do not happen.
A sequence that cannot get a block takes it from the running sequence of the highest priority number, among equals the
most recently admitted one, which is preempted: it loses its blocks, takes its place in the queue by its arrival, and
recomputes (or finds in the prefix cache) what it had. No sequence is admitted in a step that preempted one.

Where rotary frequencies depend on a sequence's length (see layers/rotary.py), one that outgrows its own goes back to
the queue like a preempted one, and is computed again with others.

`update()` takes the sampled ids of a step. One more step may have been scheduled in between: a sequence that ended is
then in flight once more, and that token is thrown away.
"""

from __future__ import annotations

import itertools
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

import msgspec

from tritonmind.config import SchedulerConfig
from tritonmind.engine.block_manager import BlockManager
from tritonmind.engine.decode_batch import DecodeBatch, DecodeRows
from tritonmind.engine.hold_back import HoldBack
from tritonmind.engine.rope_growth import RopeGrowth
from tritonmind.engine.scheduler_output import ScheduledSequence, SchedulerOutput
from tritonmind.grammars import Guide
from tritonmind.messages import EngineRequest, FinishReason, StepOutputs, TokenLogprob, TokenOutput
from tritonmind.sequence import Sequence, SequenceStatus

_NOTHING = itertools.repeat(None)


class _InFlight(NamedTuple):
    """A step whose sampled ids are not here yet. num_ended: how many sequences had ended when it was scheduled."""

    output: SchedulerOutput
    num_ended: int


class Scheduler:
    """Queues, slots and blocks of all live sequences. `max_num_batched_tokens` must be resolved (not 0)."""

    def __init__(
        self,
        config: SchedulerConfig,
        block_manager: BlockManager,
        *,
        rope_limits: SequenceABC[int] = (),
        holds_back: bool = False,
    ) -> None:
        """rope_limits: see RopeGrowth. holds_back: whether prompts wait as hold_back.py says."""
        assert config.max_num_batched_tokens >= config.max_num_seqs
        self._rope = RopeGrowth(rope_limits)
        self.config = config
        self.block_manager = block_manager
        self.waiting: list[Sequence] = []  # in order of priority, then arrival
        self.running: list[Sequence] = []  # in order of priority, then admission
        self.num_preemptions = 0
        self._decoding = DecodeBatch(config.max_num_seqs, block_manager.block_size)
        self._prefilling: list[Sequence] = []  # running, in the middle of their prompt, in the order of `running`
        self._in_flight: deque[_InFlight] = deque()
        self._stop_ids: Counter[int] = Counter()  # how many live sequences end at each id
        self._num_ended = 0
        self._hold_back = HoldBack() if holds_back else None
        self._num_arrivals = 0
        self._num_admissions = 0
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._live: dict[int, Sequence] = {}

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def decoding(self) -> list[Sequence]:
        """The running sequences that have a token in each step, in the order of their rows."""
        return self._decoding.seqs

    def add(self, request: EngineRequest, guide: Guide | None = None) -> None:
        """Queue a request. It must fit the context and carry an id that is not live (the client checked both).

        guide: of its answer, if that is guided.
        """
        assert request.request_id not in self._live
        assert 0 < len(request.prompt_token_ids) < self.config.max_model_len
        seq = Sequence(request, self._num_arrivals)
        seq.guide = guide
        self._num_arrivals += 1
        self._live[request.request_id] = seq
        self._stop_ids.update(seq.stop_token_ids)
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

    def fail(self, seq: Sequence, error: str) -> TokenOutput:
        """End a live sequence with an error. Returns its last output."""
        self._finish(seq, "error")
        return msgspec.structs.replace(_output(seq, []), error=error)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's tokens and account for them as computed. Nothing in it: nothing can run now.

        `update` takes what the steps draw, in the same order.
        """
        for seq in self._rope.take():
            self._requeue(seq)
        num_preemptions_before = self.num_preemptions
        for seq in [seq for seq in self._prefilling if seq.num_tokens - seq.num_computed_tokens == 1]:
            self._prefilling.remove(seq)
            self._decode(seq)
        self._grow_decodes()
        prefills: list[ScheduledSequence] = []
        if self._prefilling or self.waiting:
            self._choose_prefills(prefills, may_admit=self.num_preemptions == num_preemptions_before)
        rows = self._decoding.take()
        for item in prefills:
            if item.samples:
                item.seq.has_drawn = True
                self._prefilling.remove(item.seq)
                if item.seq.num_tokens < self._max_decoded_tokens(item.seq):
                    self._decode(item.seq)
                elif item.seq.num_tokens < self._max_num_tokens(item.seq):
                    self._rope.note(item.seq)
        for seq in [rows.seqs[row] for row in rows.ending]:
            if seq.num_tokens < self._max_num_tokens(seq):
                self._rope.note(seq)
        output = SchedulerOutput(rows, prefills)
        if rows.seqs or prefills:
            self._in_flight.append(_InFlight(output, self._num_ended))
        return output

    def update(
        self,
        output: SchedulerOutput,
        sampled_ids: list[int],
        logprobs: list[TokenLogprob | None] | None = None,
        prompt_logprobs: list[list[TokenLogprob]] | None = None,
    ) -> StepOutputs:
        """Take a finished step's sampled ids: one for each item with `samples`, in the order of `output.items`.

        logprobs: as many, None for the rows that asked for none; or None for all. prompt_logprobs: for each prefill,
        those of the tokens after its first one; or None for all.
        """
        oldest, num_ended = self._in_flight.popleft()
        assert oldest is output, "steps are updated in the order in which they were scheduled"
        rows, num_rows = output.decodes, len(output.decodes.seqs)
        # One that has ended meanwhile takes it too; nobody looks at its tokens any more.
        for seq, token_id in zip(rows.seqs, sampled_ids, strict=False):
            seq.token_ids.append(token_id)
        if rows.filling:
            self._commit_full_blocks(rows)
        special = self._special_rows(rows, sampled_ids, logprobs, num_ended)
        if not special and not output.prefills:
            assert len(sampled_ids) == num_rows, "sampled ids are not as many as the sampling sequences"
            return StepOutputs(request_ids=rows.request_ids, token_ids=sampled_ids)
        request_ids, token_ids = rows.request_ids.copy(), sampled_ids[:num_rows]
        outputs = []
        for row in special:
            if rows.seqs[row].status is not SequenceStatus.FINISHED:
                logprob = None if logprobs is None else logprobs[row]
                outputs.append(self._take_token(rows.seqs[row], token_ids[row], logprob))
        for row in reversed(special):
            del request_ids[row], token_ids[row]
        draws = zip(sampled_ids[num_rows:], logprobs[num_rows:] if logprobs else _NOTHING, strict=False)
        for item, values in zip(output.prefills, prompt_logprobs or _NOTHING, strict=False):
            outputs.extend(self._update_prefill(item, draws, values))
        assert next(draws, None) is None, "more sampled ids than sampling sequences"
        return StepOutputs(request_ids=request_ids, token_ids=token_ids, outputs=outputs)

    def check_integrity(self) -> None:
        """Re-derive every invariant of queues, slots, columns and blocks; AssertionError if one does not hold."""
        assert len(self.waiting) + len(self.running) == len(self._live)
        assert {s.request_id for s in [*self.waiting, *self.running]} == self._live.keys()
        assert self.waiting == sorted(self.waiting, key=_queue_order)
        assert self.running == sorted(self.running, key=_running_order)
        assert self._stop_ids == Counter(id_ for seq in self._live.values() for id_ in seq.stop_token_ids)
        num_pending = Counter(item.seq for step in self._in_flight for item in step.output.items if item.samples)
        for seq in self.waiting:
            assert seq.status is SequenceStatus.WAITING and seq.slot == -1 and seq.row == -1 and not seq.block_table
            assert seq.num_pending_tokens == num_pending[seq]
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING
            num_tokens = seq.num_tokens if seq.row < 0 else self._decoding.num_tokens(seq)
            num_computed = seq.num_computed_tokens if seq.row < 0 else num_tokens - 1
            assert num_tokens == len(seq.token_ids) + num_pending[seq], f"{seq.request_id}: a token is lost"
            assert num_computed < num_tokens <= self._max_num_tokens(seq)
            assert num_computed <= len(seq.block_table) * self.block_manager.block_size, "tokens without a block"
        self._decoding.check_integrity(self._max_decoded_tokens)
        decoding = [seq for seq in self.running if seq.row >= 0]
        assert set(decoding) == set(self._decoding.seqs), "a row without its sequence, or the other way round"
        rest = [seq for seq in self.running if seq.row < 0 and seq.num_tokens < self._max_decoded_tokens(seq)]
        assert rest == self._prefilling, "a sequence neither decodes nor is in its prompt"
        slots = [seq.slot for seq in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_num_seqs)), "a slot is lost or held twice"
        self.block_manager.check_integrity(self._live.values())

    def _choose_prefills(self, prefills: list[ScheduledSequence], *, may_admit: bool) -> None:
        """Chunks of prompts from what the decodes leave of the step's budget, appended to `prefills`."""
        if self._holds_back():
            return
        step_size = self.config.max_num_batched_tokens
        budget = step_size - len(self._decoding)
        long = [seq for seq in self._prefilling if seq.num_tokens - seq.num_computed_tokens > step_size]
        kept = -(-budget // 2) if long else 0
        for seq in [seq for seq in self._prefilling if seq not in long]:
            budget -= self._take_chunk(seq, budget - kept, prefills)
        if may_admit:
            budget -= self._admit(budget - kept, prefills)
        for seq in long:
            budget -= self._take_chunk(seq, budget, prefills)

    def _holds_back(self) -> bool:
        """Whether prompts wait for others to share a step with."""
        if self._hold_back is None:
            return False
        coming = itertools.chain(self._prefilling, itertools.islice(self.waiting, len(self._free_slots)))
        num_tokens = sum(seq.num_tokens - seq.num_computed_tokens for seq in coming)
        return self._hold_back.holds(len(self._decoding), num_tokens)

    def _admit(self, budget: int, prefills: list[ScheduledSequence]) -> int:
        """Start waiting sequences with chunks of at most `budget` tokens together. Returns how many they take."""
        left = budget
        while self._free_slots and left > 0:
            head, num_passed = self._next_waiting()
            # Those passed over came first: slots are kept for them. The token of a preempted sequence may still be
            # in flight; it is needed to recompute.
            if head is None or num_passed >= len(self._free_slots) or head.num_pending_tokens:
                break
            if not self.block_manager.admit(head, variant=self._rope.variant(head)):
                break
            self.waiting.remove(head)
            self._start(head)
            if head.num_tokens - head.num_computed_tokens == 1:
                self._decode(head)
                left -= 1
            else:
                insort(self._prefilling, head, key=_running_order)
                left -= self._take_chunk(head, left, prefills)
        return budget - left

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

    def _max_num_tokens(self, seq: Sequence) -> int:
        return min(seq.num_prompt_tokens + seq.request.max_tokens, self.config.max_model_len)

    def _max_decoded_tokens(self, seq: Sequence) -> int:
        return self._rope.max_tokens(seq, self._max_num_tokens(seq))

    def _decode(self, seq: Sequence) -> None:
        self._decoding.add(seq, max_num_tokens=self._max_decoded_tokens(seq))

    def _take_chunk(self, seq: Sequence, budget: int, prefills: list[ScheduledSequence]) -> int:
        """The next tokens of a prompt, as many as the budget allows. Returns how many."""
        start = seq.num_computed_tokens
        num_new = min(budget, seq.num_tokens - start)
        if num_new > 0:
            seq.num_computed_tokens += num_new
            samples = seq.num_computed_tokens == seq.num_tokens
            seq.num_tokens += samples
            prefills.append(ScheduledSequence(seq, start, num_new, samples))
        return num_new

    def _grow_decodes(self) -> None:
        """A block for each sequence whose next token begins one, preempting later sequences if need be."""
        lacking = sorted(self._decoding.without_block(), key=_running_order)
        # One of them may have been preempted for an earlier one.
        grown = [seq for seq in lacking if seq.row >= 0 and self._grow(seq)]
        if grown:
            self._decoding.add_blocks(grown)

    def _grow(self, seq: Sequence) -> bool:
        """A block for the next token; False if `seq` itself had to go."""
        while not self.block_manager.grow(seq, self._decoding.num_tokens(seq)):
            victim = self.running[-1]
            assert _running_order(victim) >= _running_order(seq), "a sequence that comes earlier would be preempted"
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _start(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        seq.slot = self._free_slots.pop()
        seq.has_drawn = False
        seq.admission = self._num_admissions
        self._num_admissions += 1
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens
            seq.queue_time_s = time.monotonic() - seq.queued_at
        insort(self.running, seq, key=_running_order)

    def _stop(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            if seq.row >= 0:
                self._decoding.remove(seq)
            elif seq in self._prefilling:
                self._prefilling.remove(seq)
            self.running.remove(seq)
            self._free_slots.append(seq.slot)
            seq.slot = -1
            self.block_manager.release(seq)
        else:
            self.waiting.remove(seq)

    def _preempt(self, seq: Sequence) -> None:
        self._requeue(seq)
        self.num_preemptions += 1

    def _requeue(self, seq: Sequence) -> None:
        self._stop(seq)
        seq.status = SequenceStatus.WAITING
        insort(self.waiting, seq, key=_queue_order)

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        self._stop(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        del self._live[seq.request_id]
        self._num_ended += 1
        for token_id in seq.stop_token_ids:
            self._stop_ids[token_id] -= 1
            if not self._stop_ids[token_id]:
                del self._stop_ids[token_id]

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        if token_id in seq.stop_token_ids:
            return "stop"
        return "length" if len(seq.token_ids) >= self._max_num_tokens(seq) else None

    def _commit_full_blocks(self, rows: DecodeRows) -> None:
        """Offer the blocks that these tokens were the last of to the prefix cache."""
        if not self.block_manager.enable_prefix_caching:
            return
        for row in rows.filling:
            # A sequence preempted since then has no blocks any more.
            if rows.seqs[row].status is SequenceStatus.RUNNING:
                self.block_manager.commit(rows.seqs[row], int(rows.starts[row]) + 1)

    def _special_rows(
        self, rows: DecodeRows, token_ids: list[int], logprobs: list[TokenLogprob | None] | None, num_ended: int
    ) -> list[int]:
        """The rows of which there is more to say than a token, or nothing at all, in order."""
        special = {*rows.fresh, *rows.ending}
        if self._num_ended != num_ended:
            special.update([row for row, seq in enumerate(rows.seqs) if seq.status is SequenceStatus.FINISHED])
        if not self._stop_ids.keys().isdisjoint(token_ids):
            special.update([row for row in range(len(rows.seqs)) if token_ids[row] in self._stop_ids])
        if logprobs is not None:
            special.update([row for row in range(len(rows.seqs)) if logprobs[row] is not None])
        return sorted(special)

    def _update_prefill(
        self,
        item: ScheduledSequence,
        draws: Iterator[tuple[int, TokenLogprob | None]],
        values: list[TokenLogprob] | None,
    ) -> Iterator[TokenOutput]:
        seq, end = item.seq, item.start + item.num_new_tokens
        if values is not None and seq.prompt_logprobs is not None:
            seq.prompt_logprobs[item.start + 1 : item.start + 1 + len(values)] = values
        token_id, logprob = next(draws) if item.samples else (None, None)
        if seq.status is SequenceStatus.FINISHED:
            return
        if token_id is not None:
            seq.token_ids.append(token_id)
        # A sequence preempted since then has no blocks any more.
        if seq.status is SequenceStatus.RUNNING and seq.num_computed_tokens >= end:
            self.block_manager.commit(seq, end)
        if token_id is not None:
            yield self._take_token(seq, token_id, logprob)

    def _take_token(self, seq: Sequence, token_id: int, logprob: TokenLogprob | None) -> TokenOutput:
        """End a sequence whose newest token is its last one."""
        reason = self._finish_reason(seq, token_id)
        if reason is not None:
            self._finish(seq, reason)
        return _output(seq, [token_id], logprob)


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
