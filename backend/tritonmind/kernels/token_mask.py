"""Tokens that a grammar does not allow next, as bits: their logits become -inf."""

import torch

from tritonmind.kernels.dispatch import FLOAT_DTYPES, check_ndim, check_tensor, use_triton

BITS_PER_WORD = 32


def mask_words(vocab_size: int) -> int:
    """Words of one row's mask."""
    return -(-vocab_size // BITS_PER_WORD)


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """logits[rows[n], t] = -inf wherever bit t % 32 of masks[n, t // 32] is 0.

    logits: [R, V] fp32, fp16 or bf16, contiguous. rows: [N] int32, none twice, trusted to be in range. masks:
    [N, ceil(V / 32)] int32, contiguous; bits beyond V mean nothing. Raises ValueError for a wrong shape, dtype, device
    or layout.
    """
    device = logits.device
    check_ndim("logits", logits, 2)
    check_tensor("logits", logits, tuple(logits.shape), FLOAT_DTYPES, device)
    check_ndim("rows", rows, 1)
    check_tensor("rows", rows, tuple(rows.shape), torch.int32, device)
    check_tensor("masks", masks, (len(rows), mask_words(logits.shape[1])), torch.int32, device)
    if use_triton(logits):
        from tritonmind.kernels import triton_token_mask

        triton_token_mask.mask_tokens(logits, rows, masks)
        return
    bits = (masks.unsqueeze(-1) >> torch.arange(BITS_PER_WORD, dtype=torch.int32, device=device)) & 1
    forbidden = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows.long()] = logits[rows.long()].masked_fill(forbidden, -torch.inf)
