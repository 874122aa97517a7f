"""Turns the scheduler's choice of a step into the tensors that the model reads.

State by slot (a running sequence's row): its block table, on the device; what changes in it travels with the step that
needs it. Tensors that CUDA graphs read are at the same address in every step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from tritonmind.config import EngineConfig
from tritonmind.engine.sampler import Sampler
from tritonmind.engine.scheduler import ScheduledSequence, SchedulerOutput
from tritonmind.engine.staging import StepStaging, Tail
from tritonmind.kernels import TokenInputs, prepare_tokens, write_block_tables
from tritonmind.model_inputs import AttentionMetadata, ModelInputs


class Step(NamedTuple):
    """Sizes of a step whose inputs are on the device. `greedy`: each row takes the largest logit and nothing else."""

    num_decodes: int
    num_prefills: int
    num_tokens: int
    num_samples: int
    max_query_len: int
    max_context_len: int
    greedy: bool


class InputBuilder:
    """Inputs of one step at a time, built on the host, sent in one copy and completed on the device."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        limits, self._block_size = config.scheduler, config.cache.block_size
        max_num_seqs, max_num_tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        self.max_blocks = -(-limits.max_model_len // self._block_size)
        self._staging = StepStaging(
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_table_writes=max_num_seqs * self.max_blocks,
            device=device,
        )
        self._head = self._staging.device_head
        self.sampler = Sampler(self._head, vocab_size=config.model.vocab_size, max_num_seqs=max_num_seqs)
        self._num_table_blocks = [0] * max_num_seqs  # how much of each slot's row is up to date
        self._admissions = [-1] * max_num_seqs  # whose slot it is
        self._block_tables = torch.zeros((max_num_seqs, self.max_blocks), dtype=torch.int32, device=device)
        self._row_tables = torch.zeros_like(self._block_tables)  # by row of the step, for the graphs
        self._tokens = TokenInputs(
            torch.zeros(max_num_tokens, dtype=torch.int64, device=device),
            torch.zeros(max_num_tokens, dtype=torch.int64, device=device),
            torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device),
        )

    def stage(self, output: SchedulerOutput, *, num_rows: int) -> Step:
        """Send a step. num_rows: its tokens, or more, of which the rest are padding."""
        items = output.items
        num_decodes, num_seqs, num_tokens = len(output.decodes), len(items), output.num_tokens
        query_lens = np.fromiter((item.num_new_tokens for item in items), dtype=np.int32, count=num_seqs)
        starts = np.fromiter((item.start for item in items), dtype=np.int32, count=num_seqs)
        slots = np.fromiter((item.seq.slot for item in items), dtype=np.int32, count=num_seqs)
        samples = np.fromiter((item.samples for item in items), dtype=bool, count=num_seqs)
        ends = np.cumsum(query_lens, dtype=np.int32)
        contexts = starts + query_lens
        table_indices, table_blocks = self._admit_and_grow(items)

        head = self._staging.begin()
        head.context_lens[:num_seqs] = contexts
        head.seq_slots[:num_seqs] = slots
        num_prefills = num_seqs - num_decodes
        np.cumsum(query_lens[num_decodes:], dtype=np.int32, out=head.cu_seqlens_q[1 : num_prefills + 1])
        num_samples = int(samples.sum())
        head.logits_rows[:num_samples] = ends[samples] - 1
        head.sample_slots[:num_samples] = slots[samples]
        head.sample_positions[:num_samples] = contexts[samples]
        self.sampler.stage(head)

        tail = self._staging.plan_tail(num_rows, len(table_indices))
        token_ids, positions, token_slots, indices, blocks = self._staging.host_tail(tail)
        token_ids[:num_tokens] = _known_token_ids(output)
        # Position of each token: its sequence's start plus its index within the chunk.
        positions[:num_tokens] = np.arange(num_tokens) + np.repeat(starts - (ends - query_lens), query_lens)
        positions[num_tokens:] = -1
        token_slots[:num_tokens] = np.repeat(slots, query_lens)
        indices[:], blocks[:] = table_indices, table_blocks
        self._send(tail)
        return Step(
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            num_tokens=num_tokens,
            num_samples=num_samples,
            max_query_len=int(query_lens[num_decodes:].max(initial=0)),
            max_context_len=int(contexts.max()),
            greedy=self.sampler.all_greedy(slots[samples]),
        )

    def stage_padding(self, num_decodes: int, prefill_lens: list[int]) -> Step:
        """Send a step of padding for a warm-up: it reads block 0, writes no K and V, and samples for nobody."""
        num_prefills = len(prefill_lens)
        num_seqs = num_decodes + num_prefills
        assert max(prefill_lens, default=0) <= self.max_blocks * self._block_size, "a chunk longer than a block table"
        head = self._staging.begin()
        head.context_lens[:num_seqs] = [1] * num_decodes + prefill_lens
        np.cumsum(prefill_lens, dtype=np.int32, out=head.cu_seqlens_q[1 : num_prefills + 1])
        head.logits_rows[:num_seqs] = 0
        num_tokens = num_decodes + sum(prefill_lens)
        tail = self._staging.plan_tail(num_tokens, 1)
        parts = self._staging.host_tail(tail)
        for part in parts:
            part.fill(0)
        parts[1].fill(-1)  # positions
        self._send(tail)
        return Step(
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            num_tokens=num_tokens,
            num_samples=num_seqs,
            max_query_len=max(prefill_lens, default=0),
            max_context_len=max(prefill_lens, default=1),
            greedy=True,
        )

    def model_inputs(self, step: Step) -> ModelInputs:
        """The inputs of any step."""
        head, num_decodes = self._head, step.num_decodes
        num_seqs = num_decodes + step.num_prefills
        tables = self._block_tables.index_select(0, head.seq_slots[:num_seqs])
        if not tables.is_cuda:
            # The CPU's attention works through all columns; on a GPU their number chooses a variant, and stays.
            tables = tables[:, : -(-step.max_context_len // self._block_size)]
        return ModelInputs(
            token_ids=self._tokens.token_ids[: step.num_tokens],
            positions=self._tokens.positions[: step.num_tokens],
            logits_rows=head.logits_rows[: step.num_samples],
            attention=AttentionMetadata(
                num_decodes=num_decodes,
                slot_mapping=self._tokens.slot_mapping[: step.num_tokens],
                decode_block_tables=tables[:num_decodes],
                decode_context_lens=head.context_lens[:num_decodes],
                prefill_block_tables=tables[num_decodes:],
                prefill_context_lens=head.context_lens[num_decodes:num_seqs],
                prefill_cu_seqlens_q=head.cu_seqlens_q[: step.num_prefills + 1],
                max_query_len=step.max_query_len,
            ),
        )

    def decode_inputs(self, num_rows: int) -> ModelInputs:
        """The inputs of a step of decodes only, at fixed addresses: for graphs. Launches a kernel of its own."""
        head, tables = self._head, self._row_tables[:num_rows]
        torch.index_select(self._block_tables, 0, head.seq_slots[:num_rows], out=tables)
        return ModelInputs(
            token_ids=self._tokens.token_ids[:num_rows],
            positions=self._tokens.positions[:num_rows],
            logits_rows=None,
            attention=AttentionMetadata(
                num_decodes=num_rows,
                slot_mapping=self._tokens.slot_mapping[:num_rows],
                decode_block_tables=tables,
                decode_context_lens=head.context_lens[:num_rows],
                prefill_block_tables=tables[:0],
                prefill_context_lens=head.context_lens[:0],
                prefill_cu_seqlens_q=head.cu_seqlens_q[:1],
                max_query_len=0,
            ),
        )

    def _send(self, tail: Tail) -> None:
        self._staging.send(tail)
        token_ids, positions, slots, indices, blocks = self._staging.device_tail(tail)
        if tail.num_writes:
            write_block_tables(self._block_tables, indices, blocks)
        prepare_tokens(
            token_ids, positions, slots, self.sampler.last_token_ids, self._block_tables,
            block_size=self._block_size,
            out=TokenInputs(*(tensor[: tail.num_tokens] for tensor in self._tokens)),
        )  # fmt: skip

    def _admit_and_grow(self, items: list[ScheduledSequence]) -> tuple[list[int], list[int]]:
        """New entries of the block tables (flat index, block). Options of new sequences go to the sampler."""
        indices: list[int] = []
        blocks: list[int] = []
        for item in items:
            seq = item.seq
            slot = seq.slot
            if self._admissions[slot] != seq.admission:
                self._admissions[slot] = seq.admission
                self._num_table_blocks[slot] = 0
                self.sampler.admit(seq)
            known, now = self._num_table_blocks[slot], len(seq.block_table)
            if now > known:
                indices.extend(range(slot * self.max_blocks + known, slot * self.max_blocks + now))
                blocks.extend(seq.block_table[known:])
                self._num_table_blocks[slot] = now
        return indices, blocks


def _known_token_ids(output: SchedulerOutput) -> list[int]:
    """The step's token ids, -1 where the last one of a sequence is on the device only."""
    token_ids = []
    for item in output.decodes:
        known = item.seq.token_ids
        token_ids.append(known[item.start] if item.start < len(known) else -1)
    for item in output.prefills:
        known = item.seq.token_ids[item.start : item.start + item.num_new_tokens]
        token_ids.extend(known)
        token_ids.extend([-1] * (item.num_new_tokens - len(known)))
    return token_ids
