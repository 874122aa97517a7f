"""The kernel behind norm.py: one program a row, the whole row in registers, sum of squares in fp32."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels.pdl import let_next_start, use_pdl, wait
from tritonmind.kernels.triton_linear import load_sum


@triton.jit(do_not_specialize=["num_tokens"])
def _rms_norm_kernel(
    x_ptr,  # [T, HIDDEN], or [SPLITS, T, HIDDEN] fp32
    residual_ptr,  # [T, HIDDEN], read and written when HAS_RESIDUAL
    weight_ptr,  # [HIDDEN]
    out_ptr,  # [T, HIDDEN]
    eps,
    num_tokens,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    let_next_start(PDL)
    wait(PDL)
    x = load_sum(x_ptr + start + columns, num_tokens.to(tl.int64) * HIDDEN, inside, SPLITS)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + start + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    # Llama rounds before it multiplies; the product itself is fp32 because bf16 arithmetic is not for kernels.
    normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + start + columns, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """Launch on checked arguments; see norm.rms_norm, and norm.add_rms_norm when there is a residual."""
    num_tokens, hidden_size = out.shape
    if num_tokens:
        block, pdl = triton.next_power_of_2(hidden_size), use_pdl(x.device)
        splits = len(x) if x.dim() == 3 else 1
        # The rows of partial sums are few: what counts is how much each of their programs has on its way.
        num_warps = 16 if splits > 1 else 4 if block <= 4096 else 8
        _rms_norm_kernel[(num_tokens,)](
            x, residual, weight, out, eps, num_tokens,
            HIDDEN=hidden_size, BLOCK=block, SPLITS=splits,
            HAS_RESIDUAL=residual is not None, PDL=pdl,
            num_warps=num_warps, launch_pdl=pdl,
        )  # fmt: skip
    return out
