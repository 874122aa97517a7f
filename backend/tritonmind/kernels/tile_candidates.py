"""The tiles that `tritonmind bench tune` tries, for each kernel of tile_table.py.

A search goes in waves: each tries all combinations of a few settings, the others being those of the best tile so far.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tritonmind.kernels import w4_layout
from tritonmind.kernels.tile_table import (
    GROUP_VALUES,
    HOPPER_SHARED_BYTES,
    MAX_GROUP_SUMS,
    MIN_GROUP_ROWS,
    Card,
    Sizes,
    Tile,
    group_shared_bytes,
    takes_many_rows,
)

# Bytes of shared memory that a program may have, by capability; 99 KB where none is named.
SHARED_BYTES = {(8, 0): 163 << 10, (9, 0): HOPPER_SHARED_BYTES, (10, 0): 227 << 10}
SMALL_SHARED_BYTES = 99 << 10
ITEMSIZE = 2
LINE_BYTES = 128  # that a prefetch takes
MAX_PROGRAMS_PER_SM = 6  # of more, partial sums only cost their addition
MAX_W4_WARPS_PER_SM = 32
WARP_SIZE = 32
INT8_BLOCK_K = 64  # of int8_layout.py
W4_MANY_ROWS = 128  # of a tile, that arithmetic takes longer with than reading its part of the weight
W4_SLICE_K = 32  # of K, that are multiplied at a time

# Values that go together, one after the other.
Axis = tuple[Mapping[str, Any], ...]
Wave = tuple[Axis, ...]


class Search(NamedTuple):
    """rows: max_rows of the steps to be found, and the rows that each is measured with. start, waves: for such rows."""

    rows: tuple[tuple[int, int], ...]
    start: Callable[[int], Tile]
    waves: Callable[[int], tuple[Wave, ...]]


def candidates(kernel: str, card: Card, sizes: Sizes, rows: int, wave: int, best: Tile | None) -> Iterator[Tile]:
    """The tiles of a wave, from the best of the waves before; none after the last wave."""
    search = SEARCHES[kernel]
    waves = search.waves(rows)
    if wave >= len(waves):
        return
    # What warp groups do without other tiles need: those begin anew.
    base = search.start(rows) if best is None or best.is_whole or best.warp_groups else best
    for combination in itertools.product(*waves[wave]):
        settings = {name: value for part in combination for name, value in part.items()}
        tile = base._replace(**settings)
        if _fits(kernel, card, sizes, tile):
            yield tile


def _fits(kernel: str, card: Card, sizes: Sizes, tile: Tile) -> bool:
    """Whether the tile is worth a compilation."""
    limit = SHARED_BYTES.get(card.capability, SMALL_SHARED_BYTES)
    if kernel.endswith("attention"):
        row_bytes = sizes["head_dim"] * sizes["itemsize"]
        shared = (2 * tile.num_stages * tile.block_n + tile.block_m) * row_bytes
        return shared <= limit and tile.block_n <= sizes["block_size"]
    if kernel.startswith("w4_"):
        return _fits_w4(kernel, card, sizes, tile, limit)
    if kernel == "int8_linear":
        shared = tile.num_stages * (tile.block_n + ITEMSIZE * tile.block_m) * INT8_BLOCK_K
        return shared <= limit and tile.block_n >= 32
    width = tile.block_n * (2 if kernel == "gate_up" else 1) + tile.block_m
    shared = tile.num_stages * width * tile.block_k * ITEMSIZE
    num_tiles = sizes["k"] // tile.block_k
    num_programs = sizes["n"] // tile.block_n * tile.splits
    if tile.splits > 1 and (2 * tile.splits > num_tiles or num_programs > MAX_PROGRAMS_PER_SM * card.num_sms):
        return False
    lines = tile.prefetch * tile.block_k * ITEMSIZE
    return shared <= limit and (not lines or lines >= LINE_BYTES)


def _fits_w4(kernel: str, card: Card, sizes: Sizes, tile: Tile, limit: int) -> bool:
    if tile.warp_groups:
        fits = group_shared_bytes(tile) <= limit and tile.block_m * tile.block_n <= MAX_GROUP_SUMS[tile.warp_groups]
        return fits and takes_many_rows(card, sizes)
    lines = tile.block_n * tile.slices * (2 if kernel == "w4_gate_up" else 1)
    num_blocks = -(-sizes["k"] // w4_layout.BLOCK_K)
    num_warps = -(-sizes["n"] // tile.block_n) * tile.splits * tile.num_warps
    params = 4 * w4_layout.BLOCK_K // sizes["group_size"]
    shared = tile.num_stages * (lines * (w4_layout.BLOCK_K // 2 + params) + ITEMSIZE * tile.block_m * w4_layout.BLOCK_K)
    # Of what has fewer than 4 bytes a thread the compiler makes reads that the loop waits for; where rows are many it
    # has other things to wait for.
    threads = WARP_SIZE * tile.num_warps
    few_lines = lines < threads and tile.block_m < W4_MANY_ROWS
    if shared > limit or few_lines or ITEMSIZE * W4_SLICE_K * tile.block_m < 4 * threads:
        return False
    shares = tile.splits * tile.slices
    return shares == 1 or (shares <= num_blocks and num_warps <= MAX_W4_WARPS_PER_SM * card.num_sms)


def _axis(name: str, *values: int) -> Axis:
    return tuple({name: value} for value in values)


def _block_m(rows: int) -> int:
    return min(max(8, 1 << (rows - 1).bit_length()), 128)


# Columns of the output, and the warps that have enough of them each.
_COLUMNS: Axis = tuple(
    {"block_n": columns, "num_warps": warps} for columns, warps in ((32, 2), (64, 2), (64, 4), (128, 4), (128, 8))
)


_INT8_COLUMNS: Axis = tuple({"block_n": 32 * warps, "num_warps": warps} for warps in (1, 2, 4, 8))


def _w4_lines(rows: int, gated: bool) -> Axis:
    """Columns of the tile that is multiplied, its lines (rows of the weight times slices), and warps for so many."""
    found: list[Mapping[str, Any]] = []
    needed = 1 << (rows - 1).bit_length()
    for slices, lines, warps in itertools.product((1, 2, 4, 8), (32, 64, 128, 256), (1, 2, 4, 8)):
        widest = min(max(8, needed * slices), 256)
        # More columns than the narrowest tile has only for what they hold.
        if slices > 1 and not (8 <= needed * slices <= 32 or widest == 8):
            continue
        for width in sorted({widest, min(widest, 128), min(widest, 64)}):
            lines_each = {32} | ({64} if warps >= 4 else set()) | ({16} if width >= W4_MANY_ROWS else set())
            if lines // warps in lines_each and lines >= max(32 * slices, min(4 * width, 128)):
                block_n = lines // slices // (2 if gated else 1)
                found.append({"block_m": width, "block_n": block_n, "slices": slices, "num_warps": warps})
    return tuple(found)


def _w4_groups(rows: int) -> Axis:
    """Tiles for a quarter to twice the rows. Settings that tiles of warp groups have none of are the defaults."""
    most = 2 << (rows - 1).bit_length()
    return tuple(
        {**Tile()._asdict(), "block_m": block_m, "block_n": block_n, "warp_groups": groups, "num_stages": stages}
        for block_m, block_n, groups, stages in itertools.product(*GROUP_VALUES.values())
        if most // 8 <= block_m <= most
    )


def _w4_start(rows: int) -> Tile:
    return Tile(block_m=_block_m(rows), block_n=64, prefetch=2, num_warps=2, num_stages=4 if rows <= 16 else 3)


def _w4_waves(rows: int, gated: bool) -> tuple[Wave, ...]:
    splits = () if gated else (_axis("splits", 1, 2, 4, 8, 11),)
    waves = (_w4_lines(rows, gated), *splits), _W4_DEPTH
    # Where there are warp groups they are mostly the fastest: first, in case the time does not suffice for all.
    return waves if rows < MIN_GROUP_ROWS else ((_w4_groups(rows), *splits), *waves)


_W4_DEPTH: Wave = (_axis("num_stages", 2, 3, 4, 6), _axis("prefetch", 0, 2, 8))


def _product_start(rows: int) -> Tile:
    return Tile(block_m=_block_m(rows), block_n=64, block_k=128, prefetch=2, num_warps=4, num_stages=4)


def _depth(rows: int) -> tuple[Wave, ...]:
    least = _block_m(rows)
    depth = (_axis("block_k", 32, 64, 128, 256), _axis("num_stages", 3, 4, 5, 6))
    return depth, (_axis("prefetch", 0, 1, 2, 4), _axis("block_m", *sorted({least, min(2 * least, 128)})))


_PRODUCT_ROWS = tuple((rows, rows) for rows in (1, 8, 16, 32, 64, 128))
_W4_ROWS = tuple((rows, rows) for rows in (1, 8, 16, 32, 64, 128, 256, 512))
_ATTENTION_STAGES = _axis("num_stages", 2, 3, 4, 5, 6)
SEARCHES = {
    "linear": Search(
        _PRODUCT_ROWS,
        _product_start,
        lambda rows: ((_COLUMNS, _axis("splits", 1, 2, 3, 4, 6, 8, 11, 16)), *_depth(rows)),
    ),
    "gate_up": Search(_PRODUCT_ROWS, _product_start, lambda rows: ((_COLUMNS,), *_depth(rows))),
    "int8_linear": Search(
        tuple((rows, rows) for rows in (1, 8, 16, 32, 64)),
        lambda rows: Tile(block_m=_block_m(rows), block_n=128, prefetch=2, num_warps=4, num_stages=5),
        lambda rows: ((_INT8_COLUMNS, _axis("num_stages", 3, 4, 5, 6)), (_axis("prefetch", 0, 2, 4, 8),)),
    ),
    "w4_linear": Search(_W4_ROWS, _w4_start, lambda rows: _w4_waves(rows, False)),
    "w4_gate_up": Search(_W4_ROWS, _w4_start, lambda rows: _w4_waves(rows, True)),
    "decode_attention": Search(
        ((8, 8), (64, 64), (256, 256)),
        lambda rows: Tile(block_n=64, programs_per_sm=2, num_warps=2, num_stages=4),
        lambda rows: (
            (_axis("block_n", 32, 64, 128), _axis("num_warps", 1, 2, 4), _ATTENTION_STAGES),
            (_axis("programs_per_sm", 1, 2, 3, 4, 8),),
        ),
    ),
    "prefill_attention": Search(
        ((16, 16), (64, 64), (8192, 2048)),
        lambda rows: Tile(block_m=_block_m(rows), block_n=64, num_warps=4, num_stages=3),
        lambda rows: (
            (_axis("block_m", *sorted({max(16, _block_m(rows)), 64, 128})), _axis("num_warps", 4, 8)),
            (_axis("block_n", 32, 64, 128), _ATTENTION_STAGES),
        ),
    ),
}
