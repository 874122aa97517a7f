"""The kernel behind norm.py: one program a row, the whole row in registers, sum of squares in fp32."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [T, HIDDEN]
    residual_ptr,  # [T, HIDDEN], read and written when HAS_RESIDUAL
    weight_ptr,  # [HIDDEN]
    out_ptr,  # [T, HIDDEN]
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + start + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    # Llama rounds before it multiplies; the product itself is fp32 because bf16 arithmetic is not for kernels.
    normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + columns, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """Launch on checked arguments; see norm.rms_norm, and norm.add_rms_norm when there is a residual."""
    num_tokens, hidden_size = x.shape
    if num_tokens:
        block = triton.next_power_of_2(hidden_size)
        _rms_norm_kernel[(num_tokens,)](
            x, residual, weight, out, eps,
            HIDDEN=hidden_size, BLOCK=block, HAS_RESIDUAL=residual is not None,
            num_warps=4 if block <= 4096 else 8,
        )  # fmt: skip
    return out
