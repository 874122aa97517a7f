"""Log-probabilities on their way from the device to the messages of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tritonmind.engine.scheduler_output import ScheduledSequence
from tritonmind.kernels import TokenLogprobs, token_logprobs
from tritonmind.messages import TokenLogprob
from tritonmind.models.llama import HiddenStates, LlamaForCausalLM


class PendingLogprobs(NamedTuple):
    """Rows whose values may still be on their way. num_top: how many of the likeliest each row wants, None for none."""

    values: TokenLogprobs
    num_top: list[int | None]

    def take(self) -> list[TokenLogprob | None]:
        """The rows, once the device has sent them."""
        rows = zip(self.num_top, *(tensor.tolist() for tensor in self.values), strict=True)
        return [
            None
            if wanted is None
            else TokenLogprob(chosen, rank, list(zip(ids[:wanted], values[:wanted], strict=True)))
            for wanted, chosen, rank, ids, values in rows
        ]


def of_draws(logits: torch.Tensor, token_ids: torch.Tensor, num_top: list[int | None]) -> PendingLogprobs | None:
    """Of the tokens drawn from logits [R, vocab_size]. None if no row wants any."""
    if all(number is None for number in num_top):
        return None
    values = token_logprobs(logits, token_ids, num_top=max(number or 0 for number in num_top))
    return PendingLogprobs(_to_host(values), num_top)


def of_prompts(
    model: LlamaForCausalLM, hidden: HiddenStates, prefills: Sequence[ScheduledSequence], scratch: torch.Tensor
) -> list[list[PendingLogprobs]] | None:
    """Of the prompt tokens after each one of a step's prefills, whose rows come last in `hidden`, in parts.

    scratch: [rows, vocab_size], for the logits of a part. None if no request wants any.
    """
    if all(item.seq.prompt_logprobs is None for item in prefills):
        return None
    end = len(hidden.residual)
    pending: list[list[PendingLogprobs]] = []
    for item in reversed(prefills):
        end -= item.num_new_tokens
        pending.append(list(_of_prompt(model, hidden, item, end, scratch)))
    return pending[::-1]


def _of_prompt(
    model: LlamaForCausalLM, hidden: HiddenStates, item: ScheduledSequence, first_row: int, scratch: torch.Tensor
) -> Iterator[PendingLogprobs]:
    seq = item.seq
    if seq.prompt_logprobs is None:
        return
    # The last token of the prompt has no successor in it.
    num_rows = min(item.num_new_tokens, seq.num_prompt_tokens - 1 - item.start)
    for begin in range(0, num_rows, len(scratch)):
        count = min(len(scratch), num_rows - begin)
        rows = torch.arange(first_row + begin, first_row + begin + count, dtype=torch.int32, device=scratch.device)
        start = item.start + begin + 1
        following = torch.tensor(seq.token_ids[start : start + count])
        if scratch.is_cuda:
            following = following.pin_memory().to(scratch.device, non_blocking=True)
        logits = model.logits(hidden, rows, out=scratch[:count])
        wanted = seq.request.num_prompt_logprobs
        yield PendingLogprobs(_to_host(token_logprobs(logits, following, num_top=wanted or 0)), [wanted] * count)


def _to_host(values: TokenLogprobs) -> TokenLogprobs:
    """Into pinned memory: a copy to other memory would wait. PyTorch's allocator keeps and reuses it."""
    if not values.chosen.is_cuda:
        return values
    return TokenLogprobs._make(
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in values
    )
