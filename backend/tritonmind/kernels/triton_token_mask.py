"""The kernel behind token_mask.py: it writes what is forbidden, and reads no logit."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

BLOCK = 2048  # tokens of a program


# Where rows begin depends on how many masks lie before them.
@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "masks_ptr"])
def _mask_tokens_kernel(
    logits_ptr,  # [R, VOCAB]
    rows_ptr,  # [N]
    masks_ptr,  # [N, NUM_WORDS]
    VOCAB: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    word = tl.load(masks_ptr + number * NUM_WORDS + token // 32, mask=inside, other=-1)
    forbidden = inside & (((word >> (token % 32)) & 1) == 0)
    row = tl.load(rows_ptr + number).to(tl.int64)
    minus_infinity = tl.full([BLOCK], float("-inf"), tl.float32).to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * VOCAB + token, minus_infinity, mask=forbidden)


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Launch on checked arguments; see token_mask.mask_tokens."""
    if len(rows):
        vocab_size = logits.shape[1]
        _mask_tokens_kernel[(len(rows), triton.cdiv(vocab_size, BLOCK))](
            logits, rows, masks, VOCAB=vocab_size, NUM_WORDS=masks.shape[1], BLOCK=BLOCK, num_warps=4
        )
