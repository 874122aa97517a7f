"""Linear layers. On a CPU the weight is transposed once: products with few rows are then up to twice as fast."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from tritonmind.kernels import gate_up, int8_linear, linear, product_variants, silu_mul
from tritonmind.kernels.int8_layout import Int8Weight, quantize_int8
from tritonmind.kernels.int8_linear import int8_tile


class Product(nn.Module):
    """y = x W^T + bias, of which W may be kept in several ways.

    num_parts: weights of the workspace, of one size, that W consists of.
    """

    num_parts = 1
    bias: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self._transposed: torch.Tensor | None = None  # [in_features, out_features]

    def parts(self, kind: str) -> list[torch.Tensor]:
        """What holds one of the workspace's tensors each, until `finalize`: of `bias` one, else num_parts."""
        return [getattr(self, kind)]

    @abstractmethod
    def finalize(self) -> None:
        """Lay the weight out for the device, once, after loading, and drop what was loaded."""

    @abstractmethod
    def row_variants(self, max_rows: int) -> list[int]:
        """For each kernel that up to `max_rows` rows use on a GPU, a number of rows that uses it."""

    def forward(
        self,
        x: torch.Tensor,
        *,
        partial_sums: bool = False,
        add_to: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features], same dtype, in `out` if given.

        partial_sums: the result may also be fp32 [num_parts, num_tokens, out_features], for the next kernel to add up.
        add_to: what the next kernel would add the result to; it may be added in place here, and add_to returned.
        """
        if self._transposed is None:
            return self._on_gpu(x, partial_sums, add_to, out)
        if self.bias is None and add_to is not None:
            return add_to.addmm_(x, self._transposed)
        if self.bias is None:
            return torch.mm(x, self._transposed, out=out)
        return torch.addmm(self.bias, x, self._transposed, out=out)

    @abstractmethod
    def _on_gpu(
        self, x: torch.Tensor, partial_sums: bool, add_to: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        """See forward."""


class Linear(Product):
    """A weight in the type that is computed in, [out_features, in_features]."""

    weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        weight: torch.Tensor | None = None,
    ) -> None:
        """weight: one to share with another module instead of one of its own."""
        super().__init__(in_features, out_features, bias=bias, dtype=dtype, device=device)
        if weight is None:
            weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.register_buffer("weight", weight)

    def parts(self, kind: str) -> list[torch.Tensor]:
        """See Product.parts."""
        return super().parts(kind) if kind == "bias" else list(getattr(self, kind).chunk(self.num_parts))

    def finalize(self) -> None:
        """See Product.finalize. A weight that another module shares stays there."""
        assert self.weight is not None
        if self.weight.device.type == "cpu":
            self._transposed = self.weight.t().contiguous()
            self.weight = None

    def row_variants(self, max_rows: int) -> list[int]:
        """See Product.row_variants."""
        assert self.weight is not None
        return product_variants("linear", self.out_features, self.in_features, max_rows, self.weight.device)

    def _on_gpu(
        self, x: torch.Tensor, partial_sums: bool, add_to: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        assert self.weight is not None
        return linear(x, self.weight, self.bias, partial_sums=partial_sums, add_to=add_to, out=out)


class Int8Linear(Linear):
    """A Linear without bias that has its weight in 8 bits as well, for steps of few tokens on a GPU."""

    int8: Int8Weight | None = None

    def finalize(self) -> None:
        """See Product.finalize."""
        super().finalize()
        if self.weight is not None:
            self.int8 = quantize_int8(self.weight)

    def row_variants(self, max_rows: int) -> list[int]:
        """See Product.row_variants."""
        assert self.weight is not None
        sizes = (self.out_features, self.in_features, max_rows, self.weight.device)
        return product_variants("int8_linear", *sizes) + super().row_variants(max_rows)

    def _on_gpu(
        self, x: torch.Tensor, partial_sums: bool, add_to: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        if self.int8 is None or int8_tile(self.int8, len(x), x.device).is_whole:
            return super()._on_gpu(x, partial_sums, add_to, out)
        return int8_linear(x, self.int8, out=out)


class GatedLinear(Linear):
    """y = silu(x @ gate.T) * (x @ up.T), weight [gate | up]: [2 * out_features, in_features]."""

    num_parts = 2

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(in_features, 2 * out_features, bias=False, dtype=dtype, device=device)

    def row_variants(self, max_rows: int) -> list[int]:
        """See Product.row_variants."""
        assert self.weight is not None
        return product_variants("gate_up", self.out_features // 2, self.in_features, max_rows, self.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """x [num_tokens, in_features] -> [num_tokens, out_features], same dtype."""
        if self._transposed is not None:
            return silu_mul(torch.mm(x, self._transposed))
        assert self.weight is not None
        return gate_up(x, self.weight)
