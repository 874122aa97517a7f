"""Products of few rows with an 8-bit weight, y = x W^T, W[n, k] = level * scale[n]: for a head read in every step."""

import torch
from torch.nn import functional as F

from tritonmind.kernels import tuning
from tritonmind.kernels.dispatch import check_ndim, check_tensor, use_triton
from tritonmind.kernels.int8_layout import Int8Weight, dequantize_int8
from tritonmind.kernels.tile_table import Tile

TYPES = (torch.float16, torch.bfloat16)


def int8_linear(
    x: torch.Tensor, weight: Int8Weight, *, tile: Tile | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x W^T, accumulated in fp32.

    x: [T, K] fp16 or bf16, contiguous. out: [T, N], dtype of x. tile: instead of the one that tuning.tile has for the
    card, which must not be the library's: see `int8_tile`. Returns y, in `out` if given. Raises ValueError for a wrong
    shape, dtype, device or layout.
    """
    check_ndim("x", x, 2)
    check_tensor("x", x, (len(x), weight.k), TYPES, weight.words.device)
    size = len(x), weight.n
    if out is not None:
        check_tensor("out", out, size, x.dtype, x.device)
    if not use_triton(x):
        y = F.linear(x.float(), dequantize_int8(weight)).to(x.dtype)
        return y if out is None else out.copy_(y)
    from tritonmind.kernels import triton_int8_linear

    tile = int8_tile(weight, len(x), x.device) if tile is None else tile
    assert not tile.is_whole, f"{len(x)} rows are the 16-bit weight's"
    return triton_int8_linear.linear(x, weight, x.new_empty(size) if out is None else out, tile)


def int8_tile(weight: Int8Weight, num_rows: int, device: torch.device) -> Tile:
    """The tile for so many rows; LIBRARY where reading less does not pay, and the 16-bit weight is to be used."""
    return tuning.tile("int8_linear", device, rows=num_rows, n=weight.n, k=weight.k)
