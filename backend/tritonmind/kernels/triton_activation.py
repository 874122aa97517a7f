"""The kernel behind activation.py: elementwise, one program for a piece of a row, fp32 inside."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels.pdl import let_next_start, use_pdl, wait

MAX_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    let_next_start(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(x_ptr + row * 2 * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * WIDTH + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * WIDTH + columns, gated.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Launch on checked arguments; see activation.silu_mul."""
    num_tokens, width = out.shape
    if num_tokens:
        block, pdl = min(triton.next_power_of_2(width), MAX_BLOCK), use_pdl(x.device)
        _silu_mul_kernel[(num_tokens, triton.cdiv(width, block))](
            x, out, WIDTH=width, BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl
        )
    return out
