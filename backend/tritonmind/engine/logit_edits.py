"""Which logits of a step are changed before the draw: logit_bias, min_tokens and bad_words of its requests.

Of a sequence whose last token is still on its way from the device only the tokens before are known here. A bad word
that those have begun is then forbidden on condition: the device compares its last token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonmind.engine.scheduler import ScheduledSequence
from tritonmind.kernels import edit_logits
from tritonmind.messages import EngineRequest
from tritonmind.sequence import Sequence

ALWAYS = -1


class _Edit(NamedTuple):
    row: int
    token_id: int
    value: float
    condition: int


def has_edits(request: EngineRequest) -> bool:
    """Whether draws of this request may need an edit."""
    return bool(request.logit_bias or request.bad_words or request.min_tokens)


class LogitEdits(NamedTuple):
    """Of one step. Biases come first: a ban wins over a bias of the same token."""

    biases: list[_Edit]
    bans: list[_Edit]

    def apply(self, logits: torch.Tensor, slots: torch.Tensor, last_token_ids: torch.Tensor) -> None:
        """Change the step's logits [R, vocab_size] in place, in the order of the current stream."""
        for edits in self:
            if edits:
                rows, token_ids, values, conditions = zip(*edits, strict=True)
                edit_logits(
                    logits,
                    _to(logits.device, rows, torch.int32),
                    _to(logits.device, token_ids, torch.int32),
                    _to(logits.device, values, torch.float32),
                    _to(logits.device, conditions, torch.int32),
                    slots,
                    last_token_ids,
                )


def plan_edits(sampling: list[ScheduledSequence]) -> LogitEdits | None:
    """The edits of a step's sampling rows, None if there are none."""
    biases: list[_Edit] = []
    bans: list[_Edit] = []
    for row, item in enumerate(sampling):
        request = item.seq.request
        if not has_edits(request):
            continue
        biases.extend(_Edit(row, token_id, value, ALWAYS) for token_id, value in request.logit_bias)
        position = item.start + item.num_new_tokens
        if position - item.seq.num_prompt_tokens < request.min_tokens:
            bans.extend(_Edit(row, token_id, -torch.inf, ALWAYS) for token_id in request.stop_token_ids)
        for word in request.bad_words:
            condition = _completes(item.seq, position, word)
            if condition is not None:
                bans.append(_Edit(row, word[-1], -torch.inf, condition))
    return LogitEdits(biases, bans) if biases or bans else None


def warm_up_edits(logits: torch.Tensor, slots: torch.Tensor, last_token_ids: torch.Tensor) -> None:
    """Run the kernel without an effect."""
    LogitEdits([_Edit(0, 0, 0.0, ALWAYS)], []).apply(logits, slots.clamp(min=0), last_token_ids)


def _completes(seq: Sequence, position: int, word: list[int]) -> int | None:
    """Under which condition the token at `position` would complete `word`: the id of the token before, or ALWAYS.

    None: it cannot, whatever the token before turns out to be.
    """
    begin = position - len(word) + 1
    if begin < 0:
        return None
    known = seq.token_ids[begin:position]
    if known != word[: len(known)]:
        return None
    num_unknown = len(word) - 1 - len(known)
    assert num_unknown <= 1, "more than one token of a sequence is in flight"
    return word[-2] if num_unknown else ALWAYS


def _to(device: torch.device, values: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
