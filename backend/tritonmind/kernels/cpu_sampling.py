"""The CPU twin of the sampling kernels, arranged to touch only rows and tokens that can matter."""

import torch

from tritonmind.kernels.philox import gumbel_noise
from tritonmind.kernels.sampling_state import MIN_TEMPERATURE, PROMPT_FLAG, SamplingState

# Infinities become the largest numbers, so that no difference of two scores is NaN.
LOWEST = torch.finfo(torch.float32).min


def sample_tokens(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    state: SamplingState,
    greedy: bool,
    last_token_ids: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """See sampling.sample_tokens."""
    out.zero_()
    rows = (slots >= 0).nonzero().flatten()
    row_slots = slots[rows].long()
    scores = logits[rows].float()
    if not greedy:
        penalised = (
            (state.repetition_penalty[row_slots] != 1)
            | (state.presence_penalty[row_slots] != 0)
            | (state.frequency_penalty[row_slots] != 0)
        ).nonzero().flatten()  # fmt: skip
        scores[penalised] = penalise(scores[penalised], row_slots[penalised], state)
    scores.nan_to_num_(nan=LOWEST)
    token_ids = scores.argmax(dim=1)
    if not greedy:
        random = (state.temperature[row_slots] > 0).nonzero().flatten()
        if len(random):
            token_ids[random] = _draw(scores[random], row_slots[random], positions[rows[random]], state)
        state.token_counts[row_slots[penalised], token_ids[penalised]] += 1
    if last_token_ids is not None:
        last_token_ids[row_slots] = token_ids
    out[rows] = token_ids
    return out


def penalise(scores: torch.Tensor, slots: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Scores [R, V] fp32 less what the penalties of slots [R] say."""
    counts = state.token_counts[slots]
    generated = counts & (PROMPT_FLAG - 1)
    repetition = state.repetition_penalty[slots].unsqueeze(1)
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(counts != 0, repeated, scores)
    scores -= state.frequency_penalty[slots].unsqueeze(1) * generated
    return scores - torch.where(generated > 0, state.presence_penalty[slots].unsqueeze(1), 0)


def _draw(scores: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Tokens [R] of the rows with a temperature."""
    temperatures = state.temperature[slots].clamp(min=MIN_TEMPERATURE)
    noisy = scores / temperatures.unsqueeze(1) + gumbel_noise(state.seed[slots], positions.long(), scores.shape[1])
    options = (temperatures, state.top_k[slots], state.top_p[slots], state.min_p[slots])
    for row, (temperature, top_k, top_p, min_p) in enumerate(zip(*(o.tolist() for o in options), strict=True)):
        threshold = lowest_kept(scores[row], temperature, top_k, top_p, min_p)
        noisy[row].masked_fill_(scores[row] < threshold, float("-inf"))
    return noisy.argmax(dim=1)


def lowest_kept(scores: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> float:
    """The lowest of scores [V] that top-k, top-p and min-p leave."""
    threshold = LOWEST
    if 0 < top_k < len(scores):
        threshold = scores.topk(top_k).values[-1].item()
    if top_p >= 1 and min_p <= 0:
        return threshold
    left = scores[scores >= threshold].double()
    weights = ((left - left.max()) / temperature).exp_()
    # Tokens this unlikely hold at most 1 - top_p of the mass together: all of them go, and need no sorting.
    likely = weights >= max((1 - top_p) / len(left), min(min_p, 1.0))
    ordered, order = left[likely].sort(descending=True)
    last = len(ordered) - 1
    if top_p < 1:
        mass = weights[likely][order].cumsum(0)
        last = min(last, int(torch.searchsorted(mass, top_p * weights.sum()).item()))
    return ordered[last].item()
