"""Draws the next tokens from logits. The order of operations is Transformers': temperature, top-k, top-p, draw.

A draw is a Gumbel-max (Gumbel 1954; Maddison et al. 2014) whose noise depends on the request's seed, the position and
the token alone, so a seed gives the same text whatever else is in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonmind.kernels import gumbel_noise
from tritonmind.messages import EngineRequest

INT64_SIGN = 1 << 63
MIN_TEMPERATURE = 1e-6  # below it only exact ties with the largest logit are left to chance


class SamplingRow(NamedTuple):
    """How one row of logits is sampled. `position` is the index in its sequence of the token to draw."""

    request: EngineRequest
    position: int


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    """logits [num_rows, vocab_size] -> token ids [num_rows] int64. temperature 0 takes the largest logit."""
    assert len(rows) == logits.shape[0]
    token_ids = logits.argmax(dim=-1)
    random_rows = [index for index, row in enumerate(rows) if row.request.temperature > 0]
    if random_rows:
        index = torch.tensor(random_rows, device=logits.device)
        token_ids[index] = _draw(logits[index].float(), [rows[i] for i in random_rows])
    return token_ids


def _draw(logits: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    device, vocab_size = logits.device, logits.shape[1]
    requests = [row.request for row in rows]
    temperatures = torch.tensor([max(r.temperature, MIN_TEMPERATURE) for r in requests], device=device)
    # Relative to the largest, so that a tiny temperature drives the others to -inf and nothing to inf.
    scores = (logits - logits.amax(dim=1, keepdim=True)) / temperatures.unsqueeze(1)
    for index, request in enumerate(requests):
        if 0 < request.top_k < vocab_size:
            keep_top_k(scores[index], request.top_k)
        if request.top_p < 1:
            keep_top_p(scores[index], request.top_p)
    seeds = [r.seed - 2 * INT64_SIGN if r.seed >= INT64_SIGN else r.seed for r in requests]
    noise = gumbel_noise(
        torch.tensor(seeds, dtype=torch.int64, device=device),
        torch.tensor([row.position for row in rows], dtype=torch.int64, device=device),
        vocab_size,
    )
    return (scores + noise).argmax(dim=-1)


def keep_top_k(scores: torch.Tensor, top_k: int) -> None:
    """Set all but the `top_k` largest of scores [vocab_size] to -inf, in place. Ties with the last one stay."""
    threshold = scores.topk(top_k).values[-1]
    scores.masked_fill_(scores < threshold, float("-inf"))


def keep_top_p(scores: torch.Tensor, top_p: float) -> None:
    """Keep the smallest set of scores [vocab_size] with probability `top_p` (Holtzman et al. 2019), in place."""
    ordered, order = scores.sort(descending=True, stable=True)
    probabilities = ordered.softmax(dim=0)
    mass_before = probabilities.cumsum(dim=0) - probabilities
    dropped = mass_before >= top_p
    dropped[0] = False  # rounding must not drop the likeliest token
    scores[order[dropped]] = float("-inf")
