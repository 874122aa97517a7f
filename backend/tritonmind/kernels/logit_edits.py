"""Changes to single logits: biases, and tokens that must not be drawn."""

import torch

from tritonmind.kernels.dispatch import FLOAT_DTYPES, check_ndim, check_tensor, use_triton


def edit_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    conditions: torch.Tensor,
    slots: torch.Tensor,
    last_token_ids: torch.Tensor,
) -> None:
    """logits[rows[n], token_ids[n]] += values[n], where conditions[n] is -1 or the last token of the row's slot.

    logits: [R, V] fp32, fp16 or bf16, contiguous. rows, token_ids: [N] int32; a pair may come twice only if its values
    are all -inf. values: [N] fp32. conditions: [N] int32. slots: [R] int32, in which slot a row's sequence is.
    last_token_ids: [S] int64. Indices are trusted to be in range. Raises ValueError for a wrong shape, dtype, device or
    layout.
    """
    device = logits.device
    check_ndim("logits", logits, 2)
    check_tensor("logits", logits, tuple(logits.shape), FLOAT_DTYPES, device)
    check_ndim("rows", rows, 1)
    shape = tuple(rows.shape)
    for name, tensor, dtype in (
        ("rows", rows, torch.int32),
        ("token_ids", token_ids, torch.int32),
        ("values", values, torch.float32),
        ("conditions", conditions, torch.int32),
    ):
        check_tensor(name, tensor, shape, dtype, device)
    check_tensor("slots", slots, (logits.shape[0],), torch.int32, device)
    check_ndim("last_token_ids", last_token_ids, 1)
    check_tensor("last_token_ids", last_token_ids, tuple(last_token_ids.shape), torch.int64, device)
    if use_triton(logits):
        from tritonmind.kernels import triton_logit_edits

        triton_logit_edits.edit_logits(logits, rows, token_ids, values, conditions, slots, last_token_ids)
        return
    row, token_id = rows.long(), token_ids.long()
    holds = (conditions < 0) | (last_token_ids[slots.long()[row]] == conditions)
    edited = (logits[row, token_id].float() + values).to(logits.dtype)
    logits[row[holds], token_id[holds]] = edited[holds]
