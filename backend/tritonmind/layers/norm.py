"""RMSNorm (Zhang and Sennrich, 2019), alone and fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import nn

from tritonmind.kernels import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """weight * x / rms(x). Called with a residual it first adds x to it, in place, and normalises the sum.

    A residual that something was added to already comes as both: see Product.forward.
    """

    weight: torch.Tensor

    def __init__(self, hidden_size: int, *, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(hidden_size, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [num_tokens, hidden_size] -> (normalised, the sum to carry on)."""
        if residual is None or residual is x:
            return rms_norm(x, self.weight, eps=self.eps), x
        return add_rms_norm(x, residual, self.weight, eps=self.eps)
