"""Stand-ins for the executor whose "model" is arithmetic: one without tensors, one that reads a step's inputs.

The next token is a hash of all tokens before it, read back through the block tables: a block that was lost, shared
wrongly or not computed changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from tritonmind.config import EngineConfig, SchedulerConfig
from tritonmind.engine.cuda_graph import MAX_PREFILLS, batch_buckets, bucket_of, token_buckets
from tritonmind.engine.input_builder import InputBuilder, Step
from tritonmind.engine.scheduler_output import SchedulerOutput
from tritonmind.engine.step_handle import StepResult
from tritonmind.model_inputs import ModelInputs

VOCAB_SIZE = 97


def next_token(token_ids: list[int]) -> int:
    """The fake model: what follows these tokens."""
    state = 7
    for token_id in token_ids:
        state = (state * 31 + token_id + 1) % 1_000_003
    return state % VOCAB_SIZE


def generate(prompt: list[int], num_tokens: int) -> list[int]:
    """The fake model's greedy answer."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeHandle:
    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    def wait(self) -> StepResult:
        return StepResult(self._token_ids, None, None)


class FakeExecutor:
    """Keeps "K and V" as the token ids themselves, by slot of the paged cache; -1 marks what was never written."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self.block_size = block_size
        self.cache = np.full(num_blocks * block_size, -1, dtype=np.int64)
        self.last_token_ids = [-1] * max_num_seqs
        self.max_tokens_in_a_step = 0

    def execute(self, output: SchedulerOutput) -> FakeHandle:
        self.max_tokens_in_a_step = max(self.max_tokens_in_a_step, output.num_tokens)
        sampled = []
        for item in output.items:
            end = item.start + item.num_new_tokens
            slots = self._slots(item.seq.block_table, end)
            chunk = item.seq.token_ids[item.start : end]
            if len(chunk) < item.num_new_tokens:
                chunk = [*chunk, self.last_token_ids[item.seq.slot]]
            self.cache[slots[item.start :]] = chunk
            if item.samples:
                context = self.cache[slots].tolist()
                assert -1 not in context, "attention would read K and V that were never written"
                token_id = next_token(context)
                self.last_token_ids[item.seq.slot] = token_id
                sampled.append(token_id)
        return FakeHandle(sampled)

    def _slots(self, block_table: list[int], num_tokens: int) -> np.ndarray:
        positions = np.arange(num_tokens)
        return np.asarray(block_table)[positions // self.block_size] * self.block_size + positions % self.block_size


class InputsExecutor:
    """The same model behind the real input builder: it knows of a step only what the builder's tensors say.

    A step runs as a graph would: in a bucket that may be larger, over tensors that are always the same. Of those with
    prompts each second one does.
    """

    def __init__(
        self, num_blocks: int, block_size: int, limits: SchedulerConfig, rope_limits: Sequence[int] = ()
    ) -> None:
        config = SimpleNamespace(
            scheduler=limits, cache=SimpleNamespace(block_size=block_size), model=SimpleNamespace(vocab_size=VOCAB_SIZE)
        )
        self.block_size = block_size
        self.cache = np.full(num_blocks * block_size, -1, dtype=np.int64)
        self.rotations = np.full(num_blocks * block_size, -1, dtype=np.int64)  # rows of the rotary table, alike
        self.max_tokens_in_a_step = 0
        self._rope_limits = rope_limits
        self._builder = InputBuilder(cast(EngineConfig, config), torch.device("cpu"), rope_limits=rope_limits)
        self._buckets = batch_buckets(limits.max_num_seqs)
        self._token_buckets = token_buckets(limits.max_num_batched_tokens)
        self._addresses: dict[tuple[bool, int], list[int]] = {}
        self._num_mixed = 0

    def execute(self, output: SchedulerOutput) -> FakeHandle:
        self.max_tokens_in_a_step = max(self.max_tokens_in_a_step, output.num_tokens)
        num_padded = 0
        if output.prefills and len(output.prefills) <= MAX_PREFILLS:
            self._num_mixed += 1
            num_padded = bucket_of(self._token_buckets, output.num_tokens) if self._num_mixed % 2 else 0
        step = self._builder.stage(output, num_padded)
        sampler = self._builder.sampler
        if step.is_padded:
            inputs = self._builder.padded_inputs(step.num_tokens, max_context_len=step.max_context_len)
            self._check_padding(step, inputs, output.num_tokens)
            sampling_rows = cast(torch.Tensor, inputs.logits_rows)[: step.num_samples].tolist()
        elif step.num_prefills:
            inputs = self._builder.model_inputs(step)
            sampling_rows = cast(torch.Tensor, inputs.logits_rows).tolist()
        else:
            bucket = bucket_of(self._buckets, step.num_decodes)
            inputs = self._builder.decode_inputs(bucket, max_context_len=step.max_context_len)
            self._check_replay(bucket, inputs, step.num_decodes)
            sampling_rows = list(range(step.num_decodes))
        answers = self._forward(inputs)
        slots = sampler.slots_and_last_token_ids(self._buckets[-1])[0].tolist()
        assert all(slot == -1 for slot in slots[step.num_samples :]), "a token would be drawn for nobody"
        for number, row in enumerate(sampling_rows):
            sampler.token_ids[number] = answers[row]
            sampler.last_token_ids[slots[number]] = answers[row]
        return FakeHandle(self._builder.finish(step).wait())

    def _forward(self, inputs: ModelInputs) -> dict[int, int]:
        """Write the "K and V" of all tokens, then say for the last token of each sequence what follows it."""
        attention = inputs.attention
        token_ids, slots = inputs.token_ids.numpy(), attention.slot_mapping.numpy()
        self.cache[slots[slots >= 0]] = token_ids[slots >= 0]
        self.rotations[slots[slots >= 0]] = inputs.positions.numpy()[slots >= 0]
        answers: dict[int, int] = {}
        for row in range(attention.num_decodes):
            length = int(attention.decode_context_lens[row])
            if length:
                assert inputs.positions[row] == length - 1 + self._offset(length)
                answers[row] = self._read(attention.decode_block_tables[row], length)
        for number, (start, end) in enumerate(pairwise(attention.prefill_cu_seqlens_q.tolist())):
            if start == end:
                continue
            length = int(attention.prefill_context_lens[number])
            offset = int(inputs.positions[start]) - (length - (end - start))
            assert inputs.positions[start:end].tolist() == list(range(length - (end - start) + offset, length + offset))
            answers[end - 1] = self._read(attention.prefill_block_tables[number], length)
        return answers

    def _offset(self, length: int) -> int:
        """Of the rotary table's rows for a sequence of this length."""
        return sum(limit for limit in self._rope_limits if limit < length)

    def _read(self, block_table: torch.Tensor, length: int) -> int:
        positions = np.arange(length)
        slots = block_table.numpy()[positions // self.block_size] * self.block_size + positions % self.block_size
        context = self.cache[slots].tolist()
        assert -1 not in context, "attention would read K and V that were never written"
        offsets = set((self.rotations[slots] - positions).tolist())
        assert len(offsets) == 1, "attention would see keys that were rotated in different ways"
        # In the midst of a prompt they are those of its whole length.
        assert offsets.pop() >= self._offset(length)
        return next_token(context)

    def _check_replay(self, bucket: int, inputs: ModelInputs, num_rows: int) -> None:
        """A graph reads where it read when it was captured; its padding rows must touch nothing."""
        attention: Any = inputs.attention
        tensors = (inputs.token_ids, inputs.positions, attention.slot_mapping, attention.decode_context_lens)
        self._check_addresses((False, bucket), [*tensors, attention.decode_block_tables])
        assert inputs.logits_rows is None and all(len(tensor) == bucket for tensor in tensors)
        padding = [tensor[num_rows:].tolist() for tensor in tensors]
        num_padding = bucket - num_rows
        assert padding == [[0] * num_padding, [0] * num_padding, [-1] * num_padding, [0] * num_padding]

    def _check_padding(self, step: Step, inputs: ModelInputs, num_tokens: int) -> None:
        """The same of a step with prompts."""
        attention, bucket = inputs.attention, step.num_tokens
        tokens = inputs.token_ids, inputs.positions, attention.slot_mapping
        rows = attention.decode_context_lens, attention.prefill_context_lens, attention.prefill_cu_seqlens_q
        self._check_addresses((True, bucket), [*tokens, *rows, cast(torch.Tensor, inputs.logits_rows)])
        assert all(len(tensor) == bucket for tensor in tokens)
        padding = [tensor[num_tokens:].tolist() for tensor in tokens]
        assert padding == [[fill] * (bucket - num_tokens) for fill in (0, 0, -1)]
        assert not rows[0][step.num_decodes :].any() and not rows[1][step.num_prefills :].any()
        assert (rows[2][step.num_prefills :] == num_tokens).all() and int(rows[2][0]) == step.num_decodes
        assert int(cast(torch.Tensor, inputs.logits_rows).max()) < num_tokens and attention.prefill_lens is None

    def _check_addresses(self, graph: tuple[bool, int], tensors: list[torch.Tensor]) -> None:
        addresses = [tensor.data_ptr() for tensor in tensors]
        assert self._addresses.setdefault(graph, addresses) == addresses
