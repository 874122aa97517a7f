"""Products with a weight matrix, y = x W^T + b: by the library, or where that leaves a card idle by kernels of our own.

Which of them, and with which tile, `tuning.tile` says by card, sizes and rows.
"""

import torch
from torch.nn import functional as F

from tritonmind.kernels import tuning
from tritonmind.kernels.activation import silu_mul
from tritonmind.kernels.dispatch import FLOAT_DTYPES, check_ndim, check_tensor, use_triton
from tritonmind.kernels.tile_table import LIBRARY, Tile

# cp.async copies 16 bytes at a time: rows of a weight must begin at a multiple of that.
ROW_ALIGNMENT = 16
# Rows from which a product adds to what it is to be added to. Fewer leave that to the kernel behind, whose start can
# overlap with the product's end.
MIN_ADDED_ROWS = 512


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    partial_sums: bool = False,
    add_to: torch.Tensor | None = None,
    tile: Tile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + b, accumulated in fp32.

    x: [T, K] fp32, fp16 or bf16, contiguous. weight: [N, K] and bias: [N], dtype of x. out: [T, N], dtype of x.
    partial_sums: the caller can also take fp32 [S, T, N], of which y is the sum over S; then out must be None.
    add_to: [T, N], dtype of x: what the caller will add y to. Where that costs little, in the library's product of many
    rows, it is done here, in place, and add_to itself is returned; then out must be None.
    tile: instead of the one that tuning.tile has for the card.
    Returns y, in `out` if given. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    _check(x, weight)
    num_rows, n = len(x), len(weight)
    if bias is not None:
        check_tensor("bias", bias, (n,), x.dtype, x.device)
    if out is not None:
        if partial_sums:
            raise ValueError(
                "out and partial_sums exclude each other: partial sums have a shape and dtype of their own"
            )
        check_tensor("out", out, (num_rows, n), x.dtype, x.device)
    tile = _choose("linear", x, weight, n) if tile is None else tile
    if add_to is not None:
        if out is not None:
            raise ValueError("out and add_to exclude each other: add_to takes the sum")
        check_tensor("add_to", add_to, (num_rows, n), x.dtype, x.device)
        if tile.library and bias is None and num_rows >= MIN_ADDED_ROWS:
            return add_to.addmm_(x, weight.t())
    if tile.library:
        return _library(x, weight, bias, out)
    from tritonmind.kernels import triton_linear

    if not partial_sums:
        tile = tile._replace(splits=1)
    if out is None:
        size = (num_rows, n)
        out = x.new_empty(size) if tile.splits == 1 else x.new_empty((tile.splits, *size), dtype=torch.float32)
    return triton_linear.linear(x, weight, bias, out, tile)


def gate_up(
    x: torch.Tensor, weight: torch.Tensor, *, tile: Tile | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(x G^T) * (x U^T) of a weight with rows [G | U]: the first half of a gated MLP.

    x: [T, K] fp32, fp16 or bf16, contiguous. weight: [2 * I, K], dtype of x. out: [T, I], dtype of x. tile: instead of
    the one that tuning.tile has for the card. Returns out. The library's way rounds gate and up before they meet.
    Raises ValueError for a wrong shape, dtype, device or layout.
    """
    _check(x, weight)
    if len(weight) % 2:
        raise ValueError(f"weight has {len(weight)} rows, expected an even number: gate and up, one after the other")
    size = len(x), len(weight) // 2
    if out is not None:
        check_tensor("out", out, size, x.dtype, x.device)
    tile = _choose("gate_up", x, weight, size[1]) if tile is None else tile
    if tile.library:
        return silu_mul(_library(x, weight, None, None), out)
    if out is None:
        out = x.new_empty(size)
    if tile.many_rows:
        from tritonmind.kernels import gluon_linear

        return gluon_linear.gate_up(x, weight, out)
    from tritonmind.kernels import triton_linear

    return triton_linear.gate_up(x, weight, out, tile)


def product_variants(kernel: str, n: int, k: int, max_rows: int, device: torch.device) -> list[int]:
    """For each variant of `kernel` that up to `max_rows` rows use on a GPU, a number of rows: a warm-up's list."""
    return [rows for rows, _ in tuning.variants(kernel, device, max_rows=max_rows, n=n, k=k)]


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    check_ndim("x", x, 2)
    check_ndim("weight", weight, 2)
    check_tensor("x", x, tuple(x.shape), FLOAT_DTYPES, x.device)
    check_tensor("weight", weight, (len(weight), x.shape[1]), x.dtype, x.device)


def _choose(kernel: str, x: torch.Tensor, weight: torch.Tensor, n: int) -> Tile:
    num_rows, k = x.shape
    if not x.is_cuda or not use_triton(x) or x.dtype == torch.float32 or k * x.itemsize % ROW_ALIGNMENT:
        return LIBRARY
    return tuning.tile(kernel, x.device, rows=num_rows, n=n, k=k)


def _library(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
