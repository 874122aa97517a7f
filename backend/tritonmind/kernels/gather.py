"""Picks rows of a table: token ids of the embedding, and the hidden states that need logits."""

import torch

from tritonmind.kernels.dispatch import FLOAT_DTYPES, INDEX_DTYPES, check_ndim, check_tensor, use_triton


def gather_rows(table: torch.Tensor, rows: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Copy row rows[t] of `table` to row t of the result.

    table: [N, H] fp32, fp16 or bf16, contiguous. rows: [T] int32 or int64; on a GPU they are trusted to be in range,
    on a CPU one outside raises IndexError. out: [T, H], dtype of table, not part of it. Returns out. Raises ValueError
    for a wrong shape, dtype, device or layout.
    """
    check_ndim("table", table, 2)
    check_ndim("rows", rows, 1)
    num_rows, width = len(rows), table.shape[1]
    check_tensor("table", table, tuple(table.shape), FLOAT_DTYPES, table.device)
    check_tensor("rows", rows, (num_rows,), INDEX_DTYPES, table.device)
    if out is not None:
        check_tensor("out", out, (num_rows, width), table.dtype, table.device)
    if not use_triton(table):
        return torch.index_select(table, 0, rows, out=out)
    from tritonmind.kernels import triton_gather

    return triton_gather.gather_rows(table, rows, table.new_empty((num_rows, width)) if out is None else out)
