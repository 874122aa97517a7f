"""The kernel behind logprobs.py: one program a row, a running maximum and sum in every lane, joined at the end."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

MAX_BLOCK = 4096
# The lowest maximum of a lane: one that has met only -inf must not subtract it from itself.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize_on_alignment=["token_ids_ptr"])
def _logprobs_kernel(
    logits_ptr,  # [R, VOCAB]
    token_ids_ptr,  # [R]
    log_mass_ptr,  # [R] fp32
    chosen_ptr,  # [R] fp32
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((BLOCK,), _LOWEST, tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + row * VOCAB + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, logit)
        mass = mass * tl.exp(largest - larger) + tl.exp(logit - larger)
        largest = larger
    row_max = tl.max(largest, axis=0)
    log_mass = row_max + tl.log(tl.sum(mass * tl.exp(largest - row_max), axis=0))
    logit = tl.load(logits_ptr + row * VOCAB + tl.load(token_ids_ptr + row)).to(tl.float32)
    tl.store(log_mass_ptr + row, log_mass)
    tl.store(chosen_ptr + row, logit - log_mass)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on checked arguments: the log of each row's sum of exponentials, and its token's logprob, [R] fp32."""
    num_rows, vocab_size = logits.shape
    log_mass = torch.empty((num_rows,), dtype=torch.float32, device=logits.device)
    chosen = torch.empty_like(log_mass)
    if num_rows:
        block = min(triton.next_power_of_2(vocab_size), MAX_BLOCK)
        _logprobs_kernel[(num_rows,)](
            logits, token_ids, log_mass, chosen, VOCAB=vocab_size, BLOCK=block, num_warps=8 if block > 1024 else 4
        )
    return log_mass, chosen
