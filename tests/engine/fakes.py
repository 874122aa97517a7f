"""A stand-in for the executor whose "model" is arithmetic, so that scheduling can be tested without tensors.

The next token is a hash of all tokens before it, read back through the block tables: a block that was lost, shared
wrongly or not computed changes the answer.
"""

from __future__ import annotations

import numpy as np

from tritonmind.engine.model_runner import StepResult
from tritonmind.engine.scheduler import SchedulerOutput

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
