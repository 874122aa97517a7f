"""One request while it is being generated: its tokens, its blocks, its place in the batch. Pure data, no torch.

How the counts relate, for a sequence whose known tokens are `token_ids`:

    num_computed_tokens <= num_tokens == len(token_ids) + num_pending_tokens

`num_computed_tokens` counts tokens whose K and V are in the cache or will be by the steps in flight.
`num_pending_tokens` counts tokens that steps in flight will sample: their number is known, their ids are not yet.
"""

from __future__ import annotations

import time
from enum import Enum, auto

from tritonmind.messages import EngineRequest, FinishReason, TokenLogprob


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """The engine's state of one request. Only the scheduler and the block manager write to it."""

    __slots__ = (
        "admission",
        "arrival",
        "block_hashes",
        "block_table",
        "finish_reason",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_pending_tokens",
        "num_prompt_tokens",
        "prompt_logprobs",
        "queue_time_s",
        "queued_at",
        "request",
        "slot",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, request: EngineRequest, arrival: int = 0) -> None:
        self.request = request
        self.arrival = arrival  # requests are numbered as they come
        self.queued_at = time.monotonic()
        self.queue_time_s: float | None = None  # set when first admitted
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_cached_tokens: int | None = None  # set when first admitted
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of the leading full blocks, extended as tokens become known
        self.num_committed_blocks = 0  # leading blocks already offered to the prefix cache
        self.admission = -1  # changes each time it is admitted: what the runner kept of an earlier time is stale
        self.slot = -1  # row of the runner's per-sequence state while RUNNING
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_token_ids = frozenset(request.stop_token_ids)
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            None if request.num_prompt_logprobs is None else [None] * self.num_prompt_tokens
        )

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated so far, those in flight included."""
        return self.num_tokens - self.num_prompt_tokens
