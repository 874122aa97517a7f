"""Products with a 4-bit weight, y = x W^T + b, W[n, k] = (level - zero point) * scale: W4A16, activations in 16 bits.

By kernels that unpack the weight while they multiply: for a few rows that of triton_w4_linear.py, for more that of
gluon_w4_linear.py. Cards that cannot run the latter have one that writes the weight out in 16 bits for the products of
linear.py. Which of them, and with which tile, `tuning.tile` says by card, sizes and rows.
"""

import torch

from tritonmind.kernels import tuning
from tritonmind.kernels.dispatch import check_ndim, check_tensor, use_triton
from tritonmind.kernels.linear import MIN_ADDED_ROWS, gate_up, linear, product_variants
from tritonmind.kernels.tile_table import Tile
from tritonmind.kernels.w4_layout import PackedWeight, unpack


def w4_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    partial_sums: bool = False,
    add_to: torch.Tensor | None = None,
    tile: Tile | None = None,
    scratch: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + b, accumulated in fp32.

    x: [T, K] of weight.dtype, contiguous. bias: [N], dtype of x. out: [T, N], dtype of x.
    partial_sums: the caller can also take fp32 [S, T, N], of which y is the sum over S; then out must be None.
    add_to: [T, N], dtype of x: what the caller will add y to; see linear.linear.
    tile: instead of the one that tuning.tile has for the card. scratch: at least N * K elements of weight.dtype, which
    the weight is written to where rows are many; one is allocated where none is given.
    Returns y, in `out` if given. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    _check(x, weight, scratch)
    size = len(x), weight.n
    if weight.is_gated:
        raise ValueError("weight is packed as gate and up: multiply with it by w4_gate_up")
    if bias is not None:
        check_tensor("bias", bias, size[1:], x.dtype, x.device)
    if out is not None:
        if partial_sums:
            raise ValueError(
                "out and partial_sums exclude each other: partial sums have a shape and dtype of their own"
            )
        check_tensor("out", out, size, x.dtype, x.device)
    tile = _choose("w4_linear", x, weight) if tile is None else tile
    if tile.is_whole or not use_triton(x):
        return linear(x, _dense(x, weight, scratch), bias, partial_sums=partial_sums, add_to=add_to, out=out)
    if not partial_sums:
        tile = tile._replace(splits=1)
    elif tile.warp_groups:
        # Groups without a block of K to multiply would wait for one that never comes.
        tile = tile._replace(splits=min(tile.splits, weight.words.shape[1]))
    if add_to is not None:
        if out is not None:
            raise ValueError("out and add_to exclude each other: add_to takes the sum")
        check_tensor("add_to", add_to, size, x.dtype, x.device)
        if tile.warp_groups and tile.splits == 1 and len(x) >= MIN_ADDED_ROWS:
            from tritonmind.kernels import gluon_w4_linear

            return gluon_w4_linear.multiply(x, weight, bias, add_to, tile, add=True)
    if out is None:
        out = x.new_empty(size) if tile.splits == 1 else x.new_empty((tile.splits, *size), dtype=torch.float32)
    if tile.warp_groups:
        from tritonmind.kernels import gluon_w4_linear

        return gluon_w4_linear.multiply(x, weight, bias, out, tile)
    from tritonmind.kernels import triton_w4_linear

    return triton_w4_linear.linear(x, weight, bias, out, tile)


def w4_gate_up(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    tile: Tile | None = None,
    scratch: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(x G^T) * (x U^T) of a weight that is packed as gate G and up U: the first half of a gated MLP.

    x: [T, K] of weight.dtype, contiguous. out: [T, N / 2], dtype of x. tile, scratch: as of w4_linear. Returns out.
    Raises ValueError as w4_linear does.
    """
    _check(x, weight, scratch)
    if not weight.is_gated:
        raise ValueError("weight is packed as one, not as gate and up: multiply with it by w4_linear")
    size = len(x), weight.n // 2
    if out is not None:
        check_tensor("out", out, size, x.dtype, x.device)
    tile = _choose("w4_gate_up", x, weight) if tile is None else tile
    if tile.is_whole or not use_triton(x):
        return gate_up(x, _dense(x, weight, scratch), out=out)
    if out is None:
        out = x.new_empty(size)
    if tile.warp_groups:
        from tritonmind.kernels import gluon_w4_linear

        return gluon_w4_linear.multiply(x, weight, None, out, tile)
    from tritonmind.kernels import triton_w4_linear

    return triton_w4_linear.gate_up(x, weight, out, tile)


def w4_variants(kernel: str, n: int, k: int, group_size: int, max_rows: int, device: torch.device) -> list[int]:
    """For each variant of w4_linear or w4_gate_up, and of what it hands over to, that up to `max_rows` rows use on a
    GPU, a number of rows: a warm-up's list.
    """
    sizes = {"n": n, "k": k, "group_size": group_size}
    # A tile of warp groups has one variant for rows that are added to what they are for, and one for fewer.
    limits = {max_rows, min(max_rows, MIN_ADDED_ROWS - 1)}
    found = {rows for limit in limits for rows, _ in tuning.variants(kernel, device, max_rows=limit, **sizes)}
    handed_over = product_variants(kernel.removeprefix("w4_"), n, k, max_rows, device)
    found.update(rows for rows in handed_over if tuning.tile(kernel, device, rows=rows, **sizes).is_whole)
    return sorted(found, reverse=True)


def w4_scratch_elements(kernel: str, n: int, k: int, group_size: int, max_rows: int, device: torch.device) -> int:
    """How large a scratch w4_linear or w4_gate_up uses for up to `max_rows` rows on a GPU.

    n: of w4_gate_up rows of gate, as many as of up. 0 where no tile for so many rows writes the weight out.
    """
    picked = tuning.variants(kernel, device, max_rows=max_rows, n=n, k=k, group_size=group_size)
    if not any(tile.is_whole for _, tile in picked):
        return 0
    return n * k * (2 if kernel == "w4_gate_up" else 1)


def _check(x: torch.Tensor, weight: PackedWeight, scratch: torch.Tensor | None) -> None:
    check_ndim("x", x, 2)
    check_tensor("x", x, (len(x), weight.k), weight.dtype, weight.words.device)
    if scratch is not None:
        check_ndim("scratch", scratch, 1)
        check_tensor("scratch", scratch, (max(len(scratch), weight.n * weight.k),), weight.dtype, x.device)


def _choose(kernel: str, x: torch.Tensor, weight: PackedWeight) -> Tile:
    sizes = {"n": weight.n // 2 if weight.is_gated else weight.n, "k": weight.k, "group_size": weight.group_size}
    return tuning.tile(kernel, x.device, rows=len(x), **sizes)


def _dense(x: torch.Tensor, weight: PackedWeight, scratch: torch.Tensor | None) -> torch.Tensor:
    """The weight in 16 bits, [N, K], in the scratch if there is one."""
    if not use_triton(x):
        return unpack(weight, weight.dtype)
    from tritonmind.kernels import triton_w4_linear

    if scratch is None:
        scratch = torch.empty(weight.n * weight.k, dtype=weight.dtype, device=weight.words.device)
    return triton_w4_linear.dequantize(weight, scratch[: weight.n * weight.k].view(weight.n, weight.k))
