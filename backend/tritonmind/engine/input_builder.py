"""Turns the scheduler's choice of a step into the tensors that the model reads.

State by slot (a running sequence's row): its block table, on the device; what changes in it travels with the step that
needs it. Tensors that CUDA graphs read are at the same address in every step.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

import numpy as np
import torch

from tritonmind.config import EngineConfig
from tritonmind.engine.cuda_graph import MAX_PREFILLS, MAX_QUERY_LEN
from tritonmind.engine.decode_batch import DecodeRows
from tritonmind.engine.sampler import DRAWS, Sampler
from tritonmind.engine.scheduler_output import SchedulerOutput
from tritonmind.engine.staging import HostHead, PendingDraw, StepStaging, Tail
from tritonmind.kernels import DecodeInputs, TokenInputs, prepare_decodes, prepare_tokens, write_block_tables
from tritonmind.model_inputs import AttentionMetadata, ModelInputs
from tritonmind.sequence import Sequence


class Step(NamedTuple):
    """Sizes of a step whose inputs are on the device.

    num_tokens: padding included. wishes: what its sampling rows ask for, as Sampler.wishes. prefill_lens: query_len and
    context_len of each prefill. is_padded: whether a graph for num_tokens tokens serves it, prefills and all.
    """

    num_decodes: int
    num_prefills: int
    num_tokens: int
    num_samples: int
    max_query_len: int
    max_context_len: int
    wishes: int
    prefill_lens: list[tuple[int, int]]
    is_padded: bool = False

    @property
    def greedy(self) -> bool:
        """Whether each row takes the largest logit of those that it is given."""
        return not self.wishes & DRAWS


class InputBuilder:
    """Inputs of one step at a time, built on the host, sent in one copy and completed on the device."""

    def __init__(self, config: EngineConfig, device: torch.device, *, rope_limits: SequenceABC[int] = ()) -> None:
        """rope_limits: lengths beyond which a sequence has other rotary frequencies; see kernels/step_inputs.py."""
        limits, self._block_size = config.scheduler, config.cache.block_size
        max_num_seqs, max_num_tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self.max_blocks = -(-limits.max_model_len // self._block_size)
        self._staging = StepStaging(
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_table_writes=max_num_seqs * self.max_blocks,
            device=device,
        )
        self._head = self._staging.device_head
        self.sampler = Sampler(self._head, vocab_size=config.model.vocab_size, max_num_seqs=max_num_seqs)
        self._num_table_blocks = np.zeros(max_num_seqs, dtype=np.int32)  # how much of each slot's row is up to date
        self._admissions = [-1] * max_num_seqs  # whose slot it is
        self._wishes: tuple[np.ndarray | None, int] = (None, 0)  # of the last slots that decoded
        self._is_cpu = device.type == "cpu"
        self._rope_limits = torch.tensor(rope_limits, dtype=torch.int32, device=device) if rope_limits else None
        self._block_tables = torch.zeros((max_num_seqs, self.max_blocks), dtype=torch.int32, device=device)
        self._row_tables = torch.zeros_like(self._block_tables)  # by row of the step, for the graphs
        self._tokens = TokenInputs(
            torch.zeros(max_num_tokens, dtype=torch.int64, device=device),
            torch.zeros(max_num_tokens, dtype=torch.int64, device=device),
            torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device),
        )

    def stage(self, output: SchedulerOutput, num_padded: int = 0) -> Step:
        """Send a step. num_padded: of one with prefills that a graph serves, the graph's number of tokens."""
        return self._stage_mixed(output, num_padded) if output.prefills else self._stage_decodes(output.decodes)

    def finish(self, step: Step) -> PendingDraw:
        """Send what the step has drawn back to the host."""
        return self._staging.finish(self.sampler.token_ids, step.num_samples)

    def _stage_decodes(self, rows: DecodeRows) -> Step:
        """A step of decodes only: all in the head, at the same addresses each time, to be completed by a graph."""
        num_rows, slots = len(rows.seqs), rows.slots
        indices, blocks = self._admit_rows(rows)
        if self._wishes[0] is not slots:
            self._wishes = slots, self.sampler.wishes(slots)
        wishes = self._wishes[1]
        head = self._staging.resume(slots)
        if head is None:
            head = self._begin_decodes(rows)
        contexts = np.add(rows.starts, 1, out=head.context_lens[:num_rows])
        head.new_blocks[:num_rows] = rows.new_blocks
        if wishes & DRAWS:  # nothing else reads it
            head.sample_positions[:num_rows] = contexts
        if indices:
            self._send_tables(indices, blocks)
        else:
            self._staging.send_head()
        return Step(
            num_decodes=num_rows,
            num_prefills=0,
            num_tokens=num_rows,
            num_samples=num_rows,
            max_query_len=0,
            max_context_len=int(contexts.max()) if self._is_cpu else 0,
            wishes=wishes,
            prefill_lens=[],
        )

    def _begin_decodes(self, rows: DecodeRows) -> HostHead:
        """A head with what does not change from step to step of the same rows."""
        head, num_rows = self._staging.begin(rows.slots), len(rows.seqs)
        head.seq_slots[:num_rows] = rows.slots
        head.sample_slots[:num_rows] = rows.slots
        head.token_ids[:num_rows] = rows.token_ids
        self.sampler.stage(head)
        return head

    def _stage_mixed(self, output: SchedulerOutput, num_padded: int) -> Step:
        rows, prefills = output
        num_decodes, num_prefills = len(rows.seqs), len(prefills)
        num_seqs, num_tokens = num_decodes + num_prefills, output.num_tokens
        query_lens = np.ones(num_seqs, dtype=np.int32)
        query_lens[num_decodes:] = [item.num_new_tokens for item in prefills]
        starts = np.concatenate((rows.starts, np.array([item.start for item in prefills], dtype=np.int32)))
        slots = np.concatenate((rows.slots, np.array([item.seq.slot for item in prefills], dtype=np.int32)))
        samples = np.ones(num_seqs, dtype=bool)
        samples[num_decodes:] = [item.samples for item in prefills]
        ends = np.cumsum(query_lens, dtype=np.int32)
        contexts = starts + query_lens
        indices, blocks = self._admit_rows(rows)
        pages = rows.starts[rows.growing] // self._block_size
        indices += (rows.slots[rows.growing] * self.max_blocks + pages).tolist()
        blocks += rows.new_blocks[rows.growing].tolist()
        for item in prefills:
            self._admit(item.seq, indices, blocks)

        head = self._staging.begin()
        head.context_lens[:num_decodes] = contexts[:num_decodes]
        head.seq_slots[:num_decodes] = rows.slots
        head.prefill_context_lens[:num_prefills] = contexts[num_decodes:]
        head.prefill_slots[:num_prefills] = slots[num_decodes:]
        head.cu_seqlens_q[0] = num_decodes
        head.cu_seqlens_q[1 : num_prefills + 1] = ends[num_decodes:]
        head.cu_seqlens_q[num_prefills + 1 :] = num_tokens
        num_samples = int(samples.sum())
        head.logits_rows[:num_samples] = ends[samples] - 1
        head.sample_slots[:num_samples] = slots[samples]
        head.sample_positions[:num_samples] = contexts[samples]
        self.sampler.stage(head)

        tail = self._staging.plan_tail(max(num_tokens, num_padded), len(indices))
        token_ids, positions, token_slots, tail_indices, tail_blocks = self._staging.host_tail(tail)
        token_ids[num_tokens:], positions[num_tokens:], token_slots[num_tokens:] = 0, -1, 0
        token_ids[:num_decodes] = rows.token_ids
        for item, end in zip(prefills, ends[num_decodes:].tolist(), strict=True):
            chunk = item.seq.token_ids[item.start : item.start + item.num_new_tokens]
            token_ids[end - len(chunk) : end] = chunk
        # Position of each token: its sequence's start plus its index within the chunk.
        positions[:num_tokens] = np.arange(num_tokens) + np.repeat(starts - (ends - query_lens), query_lens)
        seq_slots = slots
        if self._rope_limits is not None:
            seqs = [*rows.seqs, *(item.seq for item in prefills)]
            seq_slots = slots + self._max_num_seqs * np.array([seq.variant for seq in seqs], dtype=np.int32)
        token_slots[:num_tokens] = np.repeat(seq_slots, query_lens)
        tail_indices[:], tail_blocks[:] = indices, blocks
        self._send(tail)
        return Step(
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            num_tokens=tail.num_tokens,
            num_samples=num_samples,
            max_query_len=int(query_lens[num_decodes:].max()),
            max_context_len=int(contexts.max()),
            wishes=self.sampler.wishes(slots[samples]),
            prefill_lens=[(item.num_new_tokens, item.start + item.num_new_tokens) for item in prefills],
            is_padded=num_padded > 0,
        )

    def stage_padding(self, num_decodes: int, prefill_lens: list[int], *, num_earlier: int = 0) -> Step:
        """Send a step of padding for a warm-up: it reads block 0, writes no K and V, and samples for nobody.

        num_earlier: tokens that each prompt has before the step's.
        """
        num_prefills = len(prefill_lens)
        num_seqs = num_decodes + num_prefills
        contexts = [length + num_earlier for length in prefill_lens]
        assert max(contexts, default=0) <= self.max_blocks * self._block_size, "a chunk longer than a block table"
        head = self._staging.begin()
        num_tokens = num_decodes + sum(prefill_lens)
        if num_prefills:
            head.context_lens[:num_decodes] = 1
            head.prefill_context_lens[:num_prefills] = contexts
            head.cu_seqlens_q[: num_prefills + 1] = np.cumsum([num_decodes, *prefill_lens])
        if num_prefills:
            tail = self._staging.plan_tail(num_tokens, 1)
            parts = self._staging.host_tail(tail)
            for part in parts:
                part.fill(0)
            parts[1].fill(-1)  # positions
            self._send(tail)
        else:
            self._staging.send_head()
        return Step(
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            num_tokens=num_tokens,
            num_samples=num_seqs,
            max_query_len=max(prefill_lens, default=0),
            max_context_len=max(contexts, default=1),
            wishes=0,
            prefill_lens=list(zip(prefill_lens, contexts, strict=True)),
        )

    def model_inputs(self, step: Step) -> ModelInputs:
        """The inputs of a step with prefills."""
        head, num_decodes, num_prefills = self._head, step.num_decodes, step.num_prefills
        tokens = TokenInputs._make(tensor[: step.num_tokens] for tensor in self._tokens)
        tables = [
            self._block_tables.index_select(0, slots)
            for slots in (head.seq_slots[:num_decodes], head.prefill_slots[:num_prefills])
        ]
        if self._is_cpu:
            tables = [table[:, : self._num_columns(step.max_context_len)] for table in tables]
        return ModelInputs(
            token_ids=tokens.token_ids,
            positions=tokens.positions,
            logits_rows=head.logits_rows[: step.num_samples],
            attention=AttentionMetadata(
                num_decodes=num_decodes,
                slot_mapping=tokens.slot_mapping,
                decode_block_tables=tables[0],
                decode_context_lens=head.context_lens[:num_decodes],
                prefill_block_tables=tables[1],
                prefill_context_lens=head.prefill_context_lens[:num_prefills],
                prefill_cu_seqlens_q=head.cu_seqlens_q[: num_prefills + 1],
                max_query_len=step.max_query_len,
                prefill_lens=None if step.is_padded else step.prefill_lens,
            ),
        )

    def padded_inputs(self, num_tokens: int, *, max_context_len: int = 0) -> ModelInputs:
        """The inputs of any step that was staged with num_padded=num_tokens, at the same addresses each time.

        max_context_len: of the step, on a CPU.
        """
        num_rows = min(num_tokens, self._max_num_seqs)
        return self.model_inputs(
            Step(
                num_decodes=num_rows,
                num_prefills=min(MAX_PREFILLS, self._max_num_seqs),
                num_tokens=num_tokens,
                num_samples=num_rows,
                max_query_len=min(num_tokens, MAX_QUERY_LEN),
                max_context_len=max_context_len,
                wishes=0,
                prefill_lens=[],
                is_padded=True,
            )
        )

    def decode_inputs(self, num_rows: int, *, max_context_len: int = 0) -> ModelInputs:
        """The inputs of a step of decodes only, completed by a kernel launched here: all that a graph must hold.

        num_rows: as many as the step has, or more, of which the rest are padding. max_context_len: of the step, on a
        CPU; a graph is for any.
        """
        head, tables = self._head, self._row_tables[:num_rows]
        tokens = TokenInputs._make(tensor[:num_rows] for tensor in self._tokens)
        prepare_decodes(
            head.token_ids[:num_rows], head.context_lens[:num_rows], head.seq_slots[:num_rows],
            head.new_blocks[:num_rows], self.sampler.last_token_ids, self._block_tables,
            block_size=self._block_size, rope_limits=self._rope_limits, out=DecodeInputs(tokens, tables),
        )  # fmt: skip
        if self._is_cpu:
            tables = tables[:, : self._num_columns(max_context_len)]
        return ModelInputs(
            token_ids=tokens.token_ids,
            positions=tokens.positions,
            logits_rows=None,
            attention=AttentionMetadata(
                num_decodes=num_rows,
                slot_mapping=tokens.slot_mapping,
                decode_block_tables=tables,
                decode_context_lens=head.context_lens[:num_rows],
                prefill_block_tables=tables[:0],
                prefill_context_lens=head.context_lens[:0],
                prefill_cu_seqlens_q=head.cu_seqlens_q[:1],
                max_query_len=0,
                prefill_lens=[],
            ),
        )

    def _num_columns(self, max_context_len: int) -> int:
        """The CPU's attention works through all columns; on a GPU their number chooses a variant, and stays."""
        return -(-max_context_len // self._block_size)

    def _send(self, tail: Tail) -> None:
        self._staging.send(tail)
        token_ids, positions, slots, indices, blocks = self._staging.device_tail(tail)
        if tail.num_writes:
            write_block_tables(self._block_tables, indices, blocks)
        prepare_tokens(
            token_ids, positions, slots, self.sampler.last_token_ids, self._block_tables,
            block_size=self._block_size, rope_limits=self._rope_limits,
            out=TokenInputs(*(tensor[: tail.num_tokens] for tensor in self._tokens)),
        )  # fmt: skip

    def _send_tables(self, indices: list[int], blocks: list[int]) -> None:
        """The head, and entries of block tables."""
        tail = self._staging.plan_tail(0, len(indices))
        *_, host_indices, host_blocks = self._staging.host_tail(tail)
        host_indices[:], host_blocks[:] = indices, blocks
        self._staging.send(tail)
        *_, device_indices, device_blocks = self._staging.device_tail(tail)
        write_block_tables(self._block_tables, device_indices, device_blocks)

    def _admit_rows(self, rows: DecodeRows) -> tuple[list[int], list[int]]:
        """Take over what is new of decoding sequences. Returns entries of block tables as `_admit` does.

        Those are of sequences that are here for the first time, and as rare as they are. The blocks that the others
        begin are not among them.
        """
        indices: list[int] = []
        blocks: list[int] = []
        for row in rows.fresh:
            self._admit(rows.seqs[row], indices, blocks)
        if rows.growing:
            growing = np.array(rows.growing)
            slots, pages = rows.slots[growing], rows.starts[growing] // self._block_size
            assert (self._num_table_blocks[slots] == pages).all(), "a block table on the device has a gap"
            self._num_table_blocks[slots] += 1
        return indices, blocks

    def _admit(self, seq: Sequence, indices: list[int], blocks: list[int]) -> None:
        """Append the new entries of its block table (flat index, block). Options of a new one go to the sampler."""
        slot = seq.slot
        if self._admissions[slot] != seq.admission:
            self._admissions[slot] = seq.admission
            self._num_table_blocks[slot] = 0
            self.sampler.admit(seq)
        known, now = int(self._num_table_blocks[slot]), len(seq.block_table)
        if now > known:
            indices.extend(range(slot * self.max_blocks + known, slot * self.max_blocks + now))
            blocks.extend(seq.block_table[known:])
            self._num_table_blocks[slot] = now
