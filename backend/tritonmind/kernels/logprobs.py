"""Log-probabilities of the raw logits: log softmax, before penalties, temperature and filters."""

from typing import NamedTuple

import torch

from tritonmind.kernels.dispatch import FLOAT_DTYPES, check_ndim, check_tensor, use_triton


class TokenLogprobs(NamedTuple):
    """Of the tokens that were drawn, and of the likeliest ones, likeliest first."""

    chosen: torch.Tensor  # [R] fp32
    ranks: torch.Tensor  # [R] int64, of the chosen ones: 1 is the likeliest, equals share a rank
    top_ids: torch.Tensor  # [R, num_top] int64
    top_logprobs: torch.Tensor  # [R, num_top] fp32


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, *, num_top: int = 0) -> TokenLogprobs:
    """Log-probabilities in fp32, without host synchronisation on a GPU.

    logits: [R, V] fp32, fp16 or bf16, contiguous. token_ids: [R] int64, trusted to be in range. num_top: 0 to V; the
    order of equal ones is undefined. Raises ValueError for a wrong shape, dtype, device, layout or num_top.
    """
    check_ndim("logits", logits, 2)
    num_rows, vocab_size = logits.shape
    check_tensor("logits", logits, (num_rows, vocab_size), FLOAT_DTYPES, logits.device)
    check_tensor("token_ids", token_ids, (num_rows,), torch.int64, logits.device)
    if not 0 <= num_top <= vocab_size:
        raise ValueError(f"num_top is {num_top}, expected 0 to {vocab_size}, the number of logits of a row")
    if use_triton(logits):
        from tritonmind.kernels import triton_logprobs

        log_mass, chosen = triton_logprobs.token_logprobs(logits, token_ids)
    else:
        log_mass = logits.float().logsumexp(dim=1)
        chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1).float() - log_mass
    ranks = (logits > logits.gather(1, token_ids.unsqueeze(1))).sum(dim=1) + 1
    values, top_ids = logits.topk(num_top, dim=1)
    return TokenLogprobs(chosen, ranks, top_ids, values.float() - log_mass.unsqueeze(1))
