"""SwiGLU's elementwise half: y = silu(gate) * up, where a row of x is [gate | up] and silu(g) = g / (1 + exp(-g))."""

import torch

from tritonmind.kernels import cpu
from tritonmind.kernels.dispatch import FLOAT_DTYPES, check_ndim, check_tensor, use_triton


def silu_mul(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Gate the second half of each row by the SiLU of the first.

    x: [T, 2 * I] fp32, fp16 or bf16, contiguous. out: [T, I], dtype of x. Returns out; arithmetic is fp32.
    Raises ValueError for a wrong shape, dtype, device or layout.
    """
    check_ndim("x", x, 2)
    num_tokens, width = x.shape
    if width % 2:
        raise ValueError(f"x has {width} columns, expected an even number: gate and up side by side")
    check_tensor("x", x, (num_tokens, width), FLOAT_DTYPES, x.device)
    if out is not None:
        check_tensor("out", out, (num_tokens, width // 2), x.dtype, x.device)
    if not use_triton(x):
        return cpu.silu_mul(x, out=out)
    from tritonmind.kernels import triton_activation

    return triton_activation.silu_mul(x, x.new_empty((num_tokens, width // 2)) if out is None else out)
