"""Linear layers. On a CPU the weight is transposed once: products with few rows are then up to twice as fast."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Linear(nn.Module):
    """y = x @ weight.T + bias, weight [out_features, in_features]. `finalize` must be called once after loading."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self._transposed: torch.Tensor | None = None  # [in_features, out_features]

    def finalize(self) -> None:
        """Lay the weight out for the device, dropping this layer's reference to the plain one."""
        assert self.weight is not None
        if self.weight.device.type == "cpu":
            self._transposed = self.weight.t().contiguous()
            self.weight = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features], same dtype."""
        if self._transposed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x, self._transposed)
        return torch.addmm(self.bias, x, self._transposed)
