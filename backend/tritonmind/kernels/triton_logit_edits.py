"""The kernel behind logit_edits.py."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

BLOCK = 128


# The number of edits changes from step to step: it must not be a reason to compile.
@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["rows_ptr", "token_ids_ptr", "values_ptr", "conditions_ptr", "slots_ptr"],
)
def _edit_logits_kernel(
    logits_ptr,  # [R, VOCAB]
    rows_ptr,  # [count]
    token_ids_ptr,  # [count]
    values_ptr,  # [count]
    conditions_ptr,  # [count]
    slots_ptr,  # [R]
    last_token_ids_ptr,  # [S]
    count,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    edit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = edit < count
    row = tl.load(rows_ptr + edit, mask=inside, other=0).to(tl.int64)
    condition = tl.load(conditions_ptr + edit, mask=inside, other=-1)
    slot = tl.load(slots_ptr + row, mask=inside, other=0)
    last = tl.load(last_token_ids_ptr + slot, mask=inside & (condition >= 0), other=-1)
    holds = inside & ((condition < 0) | (last == condition))
    logit_ptr = logits_ptr + row * VOCAB + tl.load(token_ids_ptr + edit, mask=inside, other=0)
    value = tl.load(values_ptr + edit, mask=inside, other=0.0)
    logit = tl.load(logit_ptr, mask=holds, other=0.0).to(tl.float32) + value
    tl.store(logit_ptr, logit.to(logits_ptr.dtype.element_ty), mask=holds)


def edit_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    conditions: torch.Tensor,
    slots: torch.Tensor,
    last_token_ids: torch.Tensor,
) -> None:
    """Launch on checked arguments; see logit_edits.edit_logits."""
    count = len(rows)
    if count:
        _edit_logits_kernel[(triton.cdiv(count, BLOCK),)](
            logits, rows, token_ids, values, conditions, slots, last_token_ids, count,
            VOCAB=logits.shape[1], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
