"""Linear layers with 4-bit weights: unpacked by the kernels on a GPU, dequantised once on a CPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tritonmind.kernels import silu_mul, w4_gate_up, w4_linear, w4_variants
from tritonmind.kernels.awq_format import NIBBLES_PER_WORD, AwqWeight, dequantize
from tritonmind.kernels.w4_layout import PackedWeight, pack
from tritonmind.layers.linear import Product


class Int4Linear(Product):
    """A weight that is loaded in the portable AWQ form, [num_parts, ...] of each of its tensors; see awq_format.py.

    packed: the weight as kernels read it, on a GPU after `finalize`. scratch: see share_scratch.
    """

    qweight: torch.Tensor | None
    qzeros: torch.Tensor | None
    scales: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """dtype: computed in, on a GPU fp16 or bf16."""
        super().__init__(in_features, out_features, bias=bias, dtype=dtype, device=device)
        self.dtype = dtype
        self.device = device
        self.group_size = group_size
        self.packed: PackedWeight | None = None
        self.scratch: torch.Tensor | None = None
        width, groups = out_features // self.num_parts, in_features // group_size
        for name, size, kind in (
            ("qweight", (in_features, width // NIBBLES_PER_WORD), torch.int32),
            ("qzeros", (groups, width // NIBBLES_PER_WORD), torch.int32),
            ("scales", (groups, width), torch.float16),
        ):
            self.register_buffer(name, torch.empty((self.num_parts, *size), dtype=kind, device=device))

    def parts(self, kind: str) -> list[torch.Tensor]:
        """See Product.parts."""
        return super().parts(kind) if kind == "bias" else list(getattr(self, kind).unbind())

    def finalize(self) -> None:
        """See Product.finalize."""
        assert self.qweight is not None and self.qzeros is not None and self.scales is not None
        parts = [AwqWeight(*part) for part in zip(self.qweight, self.qzeros, self.scales, strict=True)]
        if self.device.type == "cpu":
            self._transposed = torch.cat([dequantize(part, self.dtype).t() for part in parts], 1)
        else:
            self.packed = pack(parts, self.dtype)
        self.qweight = self.qzeros = self.scales = None

    def row_variants(self, max_rows: int) -> list[int]:
        """See Product.row_variants."""
        return w4_variants("w4_linear", self.out_features, self.in_features, self.group_size, max_rows, self.device)

    def _on_gpu(
        self, x: torch.Tensor, partial_sums: bool, add_to: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        assert self.packed is not None
        return w4_linear(
            x, self.packed, self.bias, partial_sums=partial_sums, add_to=add_to, scratch=self.scratch, out=out
        )


class Int4GatedLinear(Int4Linear):
    """y = silu(x @ gate.T) * (x @ up.T), its two parts the gate and up."""

    num_parts = 2

    def __init__(
        self, in_features: int, out_features: int, *, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(in_features, 2 * out_features, group_size=group_size, bias=False, dtype=dtype, device=device)

    def row_variants(self, max_rows: int) -> list[int]:
        """See Product.row_variants."""
        return w4_variants(
            "w4_gate_up", self.out_features // 2, self.in_features, self.group_size, max_rows, self.device
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """x [num_tokens, in_features] -> [num_tokens, out_features], same dtype."""
        if self._transposed is not None:
            return silu_mul(torch.mm(x, self._transposed))
        assert self.packed is not None
        return w4_gate_up(x, self.packed, scratch=self.scratch)


def share_scratch(layers: Iterable[Int4Linear]) -> None:
    """Give layers of one device memory for the largest of their weights in 16 bits, for products of many rows.

    The layers run one after the other. Nothing is allocated on a CPU.
    """
    packed = [layer.packed for layer in layers if layer.packed is not None]
    if not packed:
        return
    size = max(weight.n * weight.k for weight in packed)
    scratch = torch.empty(size, dtype=packed[0].dtype, device=packed[0].words.device)
    for layer in layers:
        layer.scratch = scratch
