"""The kernel behind gather.py: one program copies a row, a block of columns at a time."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels.pdl import let_next_start, use_pdl, wait

MAX_BLOCK = 2048


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _gather_rows_kernel(
    table_ptr,  # [N, WIDTH]
    rows_ptr,  # [T]
    out_ptr,  # [T, WIDTH]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait(PDL)
    target = tl.program_id(0).to(tl.int64) * WIDTH
    source = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64) * WIDTH
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        tl.store(out_ptr + target + column, tl.load(table_ptr + source + column, mask=inside), mask=inside)


def gather_rows(table: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Launch on checked arguments; see gather.gather_rows."""
    num_rows, width = out.shape
    if out.numel():
        block, pdl = min(triton.next_power_of_2(width), MAX_BLOCK), use_pdl(table.device)
        _gather_rows_kernel[(num_rows,)](
            table, rows, out, WIDTH=width, BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl
        )
    return out
