"""Linear layers with 4-bit weights: unpacked by the kernels on a GPU, dequantised once on a CPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tritonmind.kernels import silu_mul, w4_gate_up, w4_linear, w4_scratch_elements, w4_variants
from tritonmind.kernels.awq_format import NIBBLES_PER_WORD, AwqWeight, dequantize
from tritonmind.kernels.w4_layout import PackedWeight, pack
from tritonmind.layers.linear import Product


class Int4Linear(Product):
    """A weight that is loaded in the portable AWQ form, [num_parts, ...] of each of its tensors; see awq_format.py.

    packed: the weight as kernels read it, on a GPU after `finalize`. scratch: see share_scratch.
    """

    kernel = "w4_linear"  # by its name in kernels/tile_table.py
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
        return w4_variants(self.kernel, *self._sizes, max_rows, self.device)

    def scratch_elements(self, max_rows: int) -> int:
        """How large a scratch up to `max_rows` rows use on a GPU; 0 for none."""
        return w4_scratch_elements(self.kernel, *self._sizes, max_rows, self.device)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """n, k and group size of the kernel's tiles."""
        return self.out_features // self.num_parts, self.in_features, self.group_size

    def _on_gpu(
        self, x: torch.Tensor, partial_sums: bool, add_to: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        assert self.packed is not None
        return w4_linear(
            x, self.packed, self.bias, partial_sums=partial_sums, add_to=add_to, scratch=self.scratch, out=out
        )


class Int4GatedLinear(Int4Linear):
    """y = silu(x @ gate.T) * (x @ up.T), its two parts the gate and up."""

    kernel = "w4_gate_up"
    num_parts = 2

    def __init__(
        self, in_features: int, out_features: int, *, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(in_features, 2 * out_features, group_size=group_size, bias=False, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """x [num_tokens, in_features] -> [num_tokens, out_features], same dtype."""
        if self._transposed is not None:
            return silu_mul(torch.mm(x, self._transposed))
        assert self.packed is not None
        return w4_gate_up(x, self.packed, scratch=self.scratch)


def share_scratch(layers: Iterable[Int4Linear], max_rows: int) -> None:
    """Give those layers of one device that write their weight out in 16 bits for up to `max_rows` rows room for it.

    The layers run one after the other. Where none does, as on a CPU, nothing is allocated.
    """
    sizes = {layer: layer.scratch_elements(max_rows) for layer in layers if layer.packed is not None}
    writers = [layer for layer, size in sizes.items() if size]
    if not writers:
        return
    scratch = torch.empty(max(sizes.values()), dtype=writers[0].dtype, device=writers[0].device)
    for layer in writers:
        layer.scratch = scratch
