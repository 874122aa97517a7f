"""RMSNorm, alone and after a residual add: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

import torch

from tritonmind.kernels import cpu
from tritonmind.kernels.dispatch import (
    FLOAT_DTYPES,
    check_ndim,
    check_tensor,
    check_values_or_partial_sums,
    use_triton,
)


def _check(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> None:
    check_ndim("x", x, 2)
    num_tokens, hidden_size = x.shape
    dtype, device = x.dtype, x.device
    check_tensor("x", x, (num_tokens, hidden_size), FLOAT_DTYPES, device)
    check_tensor("weight", weight, (hidden_size,), dtype, device)
    if out is not None:
        check_tensor("out", out, (num_tokens, hidden_size), dtype, device)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Normalise each row in fp32, round to the dtype of x, then multiply by the weight, as the Llama models do.

    x: [T, H] fp32, fp16 or bf16, contiguous. weight: [H], dtype of x. out: [T, H], dtype of x; may be x.
    Returns out. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    _check(x, weight, out)
    if not use_triton(x):
        return cpu.rms_norm(x, weight, eps=eps, out=out)
    from tritonmind.kernels import triton_norm

    return triton_norm.rms_norm(x, None, weight, eps, torch.empty_like(x) if out is None else out)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to residual in place, then normalise the sum as it is stored.

    x, residual, out: [T, H], contiguous, of one dtype; out may be x but not residual. weight: [H]. x may also be the
    partial sums of a product, [S, T, H] fp32.
    Returns (out, residual). Raises ValueError for a wrong shape, dtype, device or layout.
    """
    check_ndim("residual", residual, 2)
    shape, dtype, device = (len(residual), residual.shape[1]), weight.dtype, x.device
    check_tensor("weight", weight, shape[1:], FLOAT_DTYPES, device)
    check_tensor("residual", residual, shape, dtype, device)
    check_values_or_partial_sums("x", x, shape, dtype, device)
    if out is not None:
        check_tensor("out", out, shape, dtype, device)
    if not use_triton(x):
        return cpu.add_rms_norm(x, residual, weight, eps=eps, out=out)
    from tritonmind.kernels import triton_norm

    return triton_norm.rms_norm(x, residual, weight, eps, torch.empty_like(residual) if out is None else out), residual
