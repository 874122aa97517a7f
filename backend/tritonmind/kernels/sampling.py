"""Draws the next token of each row of logits. Which tokens may win, and how likely, in this order:

1. Penalties: a token of the prompt or the answer has its logit divided (multiplied if negative) by the repetition
   penalty (Keskar et al. 2019); one generated n > 0 times loses n times the frequency and once the presence penalty.
2. Temperature: p is the softmax of score / max(temperature, MIN_TEMPERATURE); 0 takes the largest score.
3. top-k: the k largest scores stay, and those equal to the last of them.
4. top-p (Holtzman et al. 2019): a token stays if the strictly likelier ones hold less than top_p of what top-k left.
5. min-p: a token stays if p >= min_p times the largest p.
6. Gumbel-max (Gumbel 1954; Maddison et al. 2014): the largest score / temperature + noise, the lowest id among equals.

The noise depends on the request's seed, the position and the token alone (philox.py), and no filter depends on the
order of equal scores, so a seed gives the same text on every device and whatever else is in the batch. A NaN counts as
-inf; whatever the logits are, a drawn id is in range.
"""

import torch

from tritonmind.kernels import cpu_sampling
from tritonmind.kernels.dispatch import FLOAT_DTYPES, check_ndim, check_tensor, use_triton
from tritonmind.kernels.sampling_state import SamplingState


def sample_tokens(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    state: SamplingState,
    *,
    greedy: bool = False,
    last_token_ids: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw a token a row, without host synchronisation on a GPU; launches depend on shapes alone.

    logits: [R, V] fp32, fp16 or bf16, contiguous. slots: [R] int32, row of the state, each at most once; -1 is a
    padding row, whose token is 0 and which writes nothing else. positions: [R] int32, index in its sequence of the
    token to draw. greedy: promises that every row has temperature 0 and no penalty, so that no parameter is read.
    last_token_ids: [S] int64, receives the token at the row's slot. A slot with a penalty has the token counted.

    Slots are trusted to be in range. Returns out, [R] int64. Raises ValueError for a wrong shape, dtype, device or
    layout.
    """
    check_ndim("logits", logits, 2)
    num_rows, vocab_size = logits.shape
    device = logits.device
    if not vocab_size:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected at least one token to draw")
    check_tensor("logits", logits, (num_rows, vocab_size), FLOAT_DTYPES, device)
    check_tensor("slots", slots, (num_rows,), torch.int32, device)
    check_tensor("positions", positions, (num_rows,), torch.int32, device)
    check_state(state, vocab_size, device)
    if last_token_ids is not None:
        check_tensor("last_token_ids", last_token_ids, tuple(state.seed.shape), torch.int64, device)
    if out is None:
        out = logits.new_empty((num_rows,), dtype=torch.int64)
    else:
        check_tensor("out", out, (num_rows,), torch.int64, device)
    if not use_triton(logits):
        return cpu_sampling.sample_tokens(logits, slots, positions, state, greedy, last_token_ids, out)
    from tritonmind.kernels import triton_sampling

    return triton_sampling.sample_tokens(logits, slots, positions, state, greedy, last_token_ids, out)


def check_state(state: SamplingState, vocab_size: int, device: torch.device) -> None:
    """Raise ValueError unless the tensors of `state` have the shapes and dtypes that SamplingState says."""
    num_slots = len(state.seed)
    dtypes = {"top_k": torch.int32, "seed": torch.int64, "token_counts": torch.int32}
    for name, tensor in state._asdict().items():
        shape = (num_slots, vocab_size) if name == "token_counts" else (num_slots,)
        check_tensor(name, tensor, shape, dtypes.get(name, torch.float32), device)
