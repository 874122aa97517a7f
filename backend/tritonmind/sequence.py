"""One request while it is being generated: its tokens, its blocks, its place in the batch. Pure data, no torch.

How the counts relate, for a sequence whose known tokens are `token_ids`:

    num_computed_tokens <= num_tokens == len(token_ids) + num_pending_tokens

`num_computed_tokens` counts tokens whose K and V are in the cache or will be by the steps in flight.
`num_pending_tokens` counts tokens that steps in flight will sample: their number is known, their ids are not yet.
While a sequence is in the decode batch (`row` >= 0) the batch counts for it: here the numbers are those of its joining.
"""

from __future__ import annotations

import time
from enum import Enum, auto

from tritonmind.grammars import Guide
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
        "guide",
        "has_drawn",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "prompt_logprobs",
        "queue_time_s",
        "queued_at",
        "request",
        "request_id",
        "row",
        "slot",
        "status",
        "stop_token_ids",
        "token_ids",
        "variant",
    )

    def __init__(self, request: EngineRequest, arrival: int = 0) -> None:
        self.request = request
        self.request_id = request.request_id
        self.arrival = arrival  # requests are numbered as they come
        self.queued_at = time.monotonic()
        self.queue_time_s: float | None = None  # set when first admitted
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_tokens = self.num_prompt_tokens  # those in flight included
        self.num_cached_tokens: int | None = None  # set when first admitted
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of the leading full blocks, extended as tokens become known
        self.variant = 0  # of its rotary frequencies, since it was admitted: how many limits its length exceeded
        self.num_committed_blocks = 0  # leading blocks already offered to the prefix cache
        self.admission = -1  # changes each time it is admitted: what the runner kept of an earlier time is stale
        self.slot = -1  # row of the runner's per-sequence state while RUNNING
        self.row = -1  # row of the decode batch while it decodes
        self.has_drawn = False  # since it was admitted: the device knows its last token
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_token_ids = frozenset(request.stop_token_ids)
        self.guide: Guide | None = None  # which tokens its answer may go on with; None: with any
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            None if request.num_prompt_logprobs is None else [None] * self.num_prompt_tokens
        )

    @property
    def num_pending_tokens(self) -> int:
        """Not of a sequence in the decode batch."""
        return self.num_tokens - len(self.token_ids)
