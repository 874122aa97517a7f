"""Linear layers. On a CPU the weight is repacked once into oneDNN's blocked layout, which small batches need."""

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
        self._packed: torch.Tensor | None = None

    def finalize(self) -> None:
        """Repack for the device, dropping this layer's reference to the plain weight."""
        assert self.weight is not None
        if (
            self.weight.device.type == "cpu"
            and self.weight.dtype is torch.float32
            and torch.backends.mkldnn.is_available()
        ):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
            self.weight = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features], same dtype."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)
