"""Which kernels have tiles to choose, by which sizes, and what they get on a card that nobody has tuned.

A tile is all that a launch compiles with beside the model's sizes. To give a kernel tiles, add its line to KERNELS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from tritonmind.kernels import w4_layout

UNLIMITED = 1 << 62
FEW_SEQS = 4
MIN_ROWS = 16  # of the smallest tile that the tensor cores take
# From this capability on the tensor cores read their operands from shared memory, which leaves registers free.
WARP_GROUP_PRODUCTS = (9, 0)
# Of gluon_prefill_attention.py, which keeps one program on an SM: short runs would leave it idle between their blocks.
LONG_RUN_BLOCK_M, LONG_RUN_BLOCK_N = 128, 64
MIN_LONG_RUN = 1536
# Rows up to which the library serves gate and up: gluon_linear.py's large tiles leave much of the card idle below 400
# rows, gain a few percent up to here, and take the host longer to launch, which counts where decodes wait.
GATE_UP_LIBRARY_ROWS = 1024
# Of gluon_w4_linear.py, by rows of a tile, and by the weight's rows for a warp group and warp groups: microseconds that
# an H100 took for a block of K, beside those that a turn takes to begin and to store, and for an element of a further
# partial sum. Up to MAX_FILLED_ROWS the tile is taken that leaves least of a card idle; above, where the card's power
# is the limit, the one that unpacks least often.
GROUP_TIMES = {
    16: {(64, 2): 0.36, (64, 3): 0.39, (128, 2): 0.46},
    32: {(64, 2): 0.43, (64, 3): 0.46, (128, 2): 0.57},
    64: {(64, 2): 0.51, (64, 3): 0.63, (128, 2): 0.78},
    128: {(64, 2): 0.75, (64, 3): 1.03, (128, 2): 1.45},
}
GROUP_TURN_TIME, PART_TIME = 3.0, 3.2e-6
MIN_GROUP_ROWS, MAX_FILLED_ROWS = 9, 768
MIN_SPLIT_BLOCKS = 4  # of K, as many as tiles are fetched ahead
# Capabilities whose SMs have shared memory for several programs with tiles in flight: more than 100 KB.
LARGE_SHARED_MEMORY = {(8, 0), (9, 0), (10, 0)}


class Card(NamedTuple):
    """What a choice may depend on. name: as the driver says it. capability: (8, 0) and newer."""

    name: str
    capability: tuple[int, int]
    num_sms: int


class Tile(NamedTuple):
    """Launch settings; which of them a kernel has stands in KERNELS.

    block_m: rows (tokens, queries) of a program. block_n: output columns, or KV tokens, at a time. block_k: of the
    reduced dimension at a time. splits: programs that share a reduction. slices: of a reduction that a program computes
    beside each other, for block_m / slices rows. prefetch: tiles of the weight that are fetched before the kernel
    before has ended. warp_groups: of a program of gluon_w4_linear.py, which is meant if there are any; then block_n
    counts the weight's rows for one of them, and num_stages tiles that are fetched ahead. library: the
    library's product instead; of 4-bit weights, what 16-bit ones get, after writing them out. many_rows:
    gluon_linear.py's, which has tiles of its own.
    """

    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    splits: int = 1
    slices: int = 1
    prefetch: int = 0
    programs_per_sm: int = 0
    num_warps: int = 4
    num_stages: int = 3
    warp_groups: int = 0
    library: bool = False
    many_rows: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it names another way to do it, rather than settings of a kernel."""
        return self.library or self.many_rows

    @property
    def hopper_field(self) -> str:
        """The field that asks for a kernel of Hopper's, of aligned_rows; empty where none does."""
        return "warp_groups" if self.warp_groups else "many_rows" if self.many_rows else ""


class Step(NamedTuple):
    """The tile for up to `max_rows` rows."""

    max_rows: int
    tile: Tile


Sizes = Mapping[str, int]
Ladder = tuple[Step, ...]  # max_rows rising

LIBRARY = Tile(library=True)
MANY_ROWS = Tile(many_rows=True)
# Of what gluon_w4_linear.py has warp groups for: rows of a weight are multiplied 64 at a time.
GROUP_VALUES = {"block_m": (16, 32, 64, 128, 256), "block_n": (64, 128), "warp_groups": (2, 3), "num_stages": (2, 4)}
# By warp groups: sums, of block_m by block_n, that one of them has registers for.
MAX_GROUP_SUMS = {2: 128 * 128, 3: 64 * 128}
GROUP_STORED = 64  # features that a group stores at a time
HOPPER = 9  # major compute capability
HOPPER_SHARED_BYTES = 227 << 10  # that a program may have
# How a file names tiles that are no settings.
WHOLE = {"library": LIBRARY, "many_rows": MANY_ROWS}


class Kernel(NamedTuple):
    """sizes: must match exactly. fields: of Tile, that a file must give. whole: which of WHOLE may stand for them.

    default: a ladder that compiles on every card and ends at UNLIMITED. minima: of fields, over those of tuning.py.
    group_fields: instead of fields, of a tile with warp groups.
    """

    sizes: tuple[str, ...]
    fields: tuple[str, ...]
    whole: tuple[str, ...]
    default: Callable[[Card, Sizes], Ladder]
    minima: Mapping[str, int] = MappingProxyType({})
    group_fields: tuple[str, ...] = ()

    def fields_of(self, tile: Tile) -> tuple[str, ...]:
        """The fields of `tile` that a file gives."""
        whole = tuple(name for name in self.whole if WHOLE[name] == tile)
        return whole or (self.group_fields if tile.warp_groups else self.fields)


def _linear(card: Card, sizes: Sizes) -> Ladder:
    """Shared reductions where the output has too few tiles to fill the card, which is where the library is slow."""
    block_n, block_k = 64, 64
    num_tiles = sizes["n"] // block_n
    if sizes["n"] % block_n or sizes["k"] % block_k or num_tiles >= 2 * card.num_sms:
        return (Step(UNLIMITED, LIBRARY),)
    wanted = min(4 * card.num_sms // num_tiles, sizes["k"] // (4 * block_k), 8)
    splits = 1 << (max(wanted, 1).bit_length() - 1)
    steps = [
        Step(rows, Tile(rows, block_n, block_k, splits=splits, prefetch=2, num_warps=4, num_stages=4))
        for rows in (16, 32)
    ]
    return (*steps, Step(UNLIMITED, LIBRARY))


def _gate_up(card: Card, sizes: Sizes) -> Ladder:
    """Its output has tiles enough for any card, and at few rows the library is as fast on those."""
    if not takes_many_rows(card, sizes):
        return (Step(UNLIMITED, LIBRARY),)
    return Step(GATE_UP_LIBRARY_ROWS, LIBRARY), Step(UNLIMITED, MANY_ROWS)


def group_shared_bytes(tile: Tile) -> int:
    """Shared memory of gluon_w4_linear.py's programs, without their barriers' few bytes."""
    itemsize, columns = 2, tile.warp_groups * tile.block_n
    slot = tile.block_m * w4_layout.BLOCK_K * itemsize + columns * w4_layout.BLOCK_K // 2
    return tile.num_stages * slot + tile.warp_groups * tile.block_m * GROUP_STORED * itemsize


def takes_many_rows(card: Card, sizes: Sizes) -> bool:
    """Whether gluon_linear.py and gluon_w4_linear.py can multiply these: on Hopper, if aligned_rows."""
    return card.capability[0] == HOPPER and aligned_rows(sizes)


def aligned_rows(sizes: Sizes) -> bool:
    """Whether rows of 2-byte elements begin at multiples of 16 bytes, as copies of tiles need it."""
    return sizes["n"] % 8 == 0 and sizes["k"] % 8 == 0


def _w4_linear(card: Card, sizes: Sizes) -> Ladder:
    """A 4-bit weight is so small that few programs cannot read it at the card's speed: they share reductions."""
    steps = []
    for max_rows, tile in _w4_steps(card):
        wanted = 4 * card.num_sms // -(-sizes["n"] // tile.block_n)
        # Partial sums grow with the rows, and their addition with them.
        most = max(1, min(wanted, -(-sizes["k"] // w4_layout.BLOCK_K) // (4 * tile.slices), 8, 128 // max_rows))
        steps.append(Step(max_rows, tile._replace(splits=1 << most.bit_length() - 1)))
    if takes_many_rows(card, sizes):
        return _in_groups(steps, card, sizes, sizes["n"], (1, 2, 4, 8))
    return (*steps, Step(UNLIMITED, LIBRARY))


def _w4_gate_up(card: Card, sizes: Sizes) -> Ladder:
    """SiLU needs whole sums. A program has as many rows of gate as of up."""
    steps = [Step(rows, tile._replace(block_n=tile.block_n // 2)) for rows, tile in _w4_steps(card)]
    if takes_many_rows(card, sizes):
        return _in_groups(steps, card, sizes, 2 * sizes["n"], (1,))
    return (*steps, Step(UNLIMITED, LIBRARY))


def _in_groups(few: list[Step], card: Card, sizes: Sizes, weight_rows: int, split_choices: tuple[int, ...]) -> Ladder:
    """The steps for few rows, and those of gluon_w4_linear.py for more."""
    steps = [step for step in few if step.max_rows < MIN_GROUP_ROWS]
    blocks_of_k = -(-sizes["k"] // w4_layout.BLOCK_K)
    most = max(1, blocks_of_k // MIN_SPLIT_BLOCKS)

    def microseconds(rows: int, tile: Tile) -> float:
        tile_rows = tile.block_n * tile.warp_groups
        num_tiles = -(-rows // tile.block_m) * -(-weight_rows // tile_rows) * tile.splits
        block_time = GROUP_TIMES[tile.block_m][tile.block_n, tile.warp_groups]
        one = blocks_of_k / tile.splits * block_time + GROUP_TURN_TIME
        return -(-num_tiles // card.num_sms) * one + (tile.splits - 1) * rows * weight_rows * PART_TIME

    widest = max(GROUP_TIMES)
    for rows in (*GROUP_TIMES, *range(2 * widest, MAX_FILLED_ROWS + 1, widest)):
        block_m = min(rows, widest)
        tiles = [
            Tile(block_m=block_m, block_n=block_n, warp_groups=groups, splits=splits, num_stages=4)
            for splits in split_choices
            for block_n, groups in GROUP_TIMES[block_m]
            if splits <= most
        ]
        tile = min(tiles, key=lambda tile: microseconds(rows, tile))
        if steps[-1].tile == tile:
            steps.pop()
        steps.append(Step(rows, tile))
    return (*steps, Step(UNLIMITED, Tile(block_m=256, block_n=64, warp_groups=2, num_stages=2)))


def _int8_linear(card: Card, sizes: Sizes) -> Ladder:
    """Of a head, which has tiles enough; with more rows than these the 16-bit weight is as fast."""
    tile = Tile(block_n=128, prefetch=2, num_warps=4, num_stages=5)
    return (*(Step(rows, tile._replace(block_m=rows)) for rows in (8, 16, 32)), Step(UNLIMITED, LIBRARY))


def _w4_steps(card: Card) -> list[Step]:
    """A line of the tile for each thread: of fewer the compiler makes reads that the loop waits for."""
    fewest = Tile(block_m=8, block_n=w4_layout.BLOCK_ROWS, slices=4, prefetch=4, num_warps=4, num_stages=4)
    few = Tile(block_m=16, block_n=64, slices=2, prefetch=4, num_warps=4, num_stages=4)
    many = Tile(block_n=128, prefetch=2, num_warps=4, num_stages=3)
    steps = [Step(tile.block_m // tile.slices, tile) for tile in (fewest, few)]
    steps += [Step(rows, many._replace(block_m=rows)) for rows in (16, 32, 64)]
    if card.capability >= WARP_GROUP_PRODUCTS:
        # Unpacking for each block of rows again costs less than writing the weight out.
        steps.append(Step(384, many._replace(block_m=64)))
    return steps


def _decode_attention(card: Card, sizes: Sizes) -> Ladder:
    roomy = card.capability in LARGE_SHARED_MEMORY or sizes["itemsize"] == 1
    stages = 5 if roomy and sizes["itemsize"] < 4 else _attention_stages(sizes)
    tile = Tile(block_n=_tile_tokens(sizes), programs_per_sm=2, num_warps=2, num_stages=stages)
    # Few sequences wait for the latency of their tiles, which shorter pieces have fewer of.
    return Step(FEW_SEQS, tile._replace(programs_per_sm=4)), Step(UNLIMITED, tile)


def _prefill_attention(card: Card, sizes: Sizes) -> Ladder:
    """As few query rows as hold the longest run, within what registers allow."""
    block_n, stages = _tile_tokens(sizes), _attention_stages(sizes)
    if sizes["itemsize"] == 4:
        few, many = (Tile(block_m=rows, block_n=block_n, num_warps=4, num_stages=stages) for rows in (MIN_ROWS, 32))
        return Step(MIN_ROWS, few), Step(UNLIMITED, many)
    hopper = card.capability >= WARP_GROUP_PRODUCTS
    if not hopper:
        block_n = min(block_n, 32)
    small = Step(MIN_ROWS, Tile(block_m=MIN_ROWS, block_n=block_n, num_warps=4, num_stages=stages))
    middle = Tile(block_m=64, block_n=block_n, num_warps=4, num_stages=stages)
    if takes_long_runs(card, sizes):
        long = Tile(block_m=LONG_RUN_BLOCK_M, block_n=LONG_RUN_BLOCK_N, num_warps=8, num_stages=4)
        return small, Step(MIN_LONG_RUN - 1, middle), Step(UNLIMITED, long)
    if hopper:
        # Two programs to an SM, one of which multiplies while the other takes exponentials.
        return small, Step(UNLIMITED, middle)
    large = Tile(block_m=128, block_n=block_n, num_warps=8, num_stages=stages)
    return small, Step(64, middle), Step(UNLIMITED, large)


def takes_long_runs(card: Card, sizes: Sizes) -> bool:
    """Whether gluon_prefill_attention.py can serve blocks of LONG_RUN_BLOCK_M queries: Hopper, pages of whole tiles."""
    whole = sizes["block_size"] % LONG_RUN_BLOCK_N == 0
    return card.capability[0] == HOPPER and sizes["head_dim"] in (64, 128) and whole and sizes["itemsize"] == 2


def _tile_tokens(sizes: Sizes) -> int:
    """A page or an even part of it. fp32 has no tensor cores: ptxas takes minutes over its large tiles."""
    return min(sizes["block_size"], 32 if sizes["itemsize"] == 4 else 64)


def _attention_stages(sizes: Sizes) -> int:
    return 2 if sizes["itemsize"] == 4 else 3


# itemsize: bytes of an element of the pages that are read; see decode_plan.decode_itemsize.
_ATTENTION_SIZES = ("head_dim", "group", "block_size", "itemsize")
_PRODUCT_FIELDS = ("block_m", "block_n", "block_k", "prefetch", "num_warps", "num_stages")
_W4_SIZES = ("n", "k", "group_size")
_W4_FIELDS = ("block_m", "block_n", "slices", "prefetch", "num_warps", "num_stages")
_W4_GROUP_FIELDS = ("block_m", "block_n", "warp_groups", "num_stages")
_INT8_FIELDS = tuple(name for name in _W4_FIELDS if name != "slices")
_W4_MINIMA = {"block_n": w4_layout.BLOCK_ROWS}
# gluon_prefill_attention.py gives a tile of V back when it has the next one: with room for one it waits for ever.
_PREFILL_MINIMA = {"num_stages": 2}
KERNELS = {
    "linear": Kernel(("n", "k"), (*_PRODUCT_FIELDS, "splits"), ("library",), _linear),
    "gate_up": Kernel(("n", "k"), _PRODUCT_FIELDS, ("library", "many_rows"), _gate_up),
    "w4_linear": Kernel(
        _W4_SIZES, (*_W4_FIELDS, "splits"), ("library",), _w4_linear, _W4_MINIMA, (*_W4_GROUP_FIELDS, "splits")
    ),
    "w4_gate_up": Kernel(_W4_SIZES, _W4_FIELDS, ("library",), _w4_gate_up, group_fields=_W4_GROUP_FIELDS),
    "int8_linear": Kernel(("n", "k"), _INT8_FIELDS, ("library",), _int8_linear, _W4_MINIMA),
    "decode_attention": Kernel(
        _ATTENTION_SIZES, ("block_n", "num_warps", "num_stages", "programs_per_sm"), (), _decode_attention
    ),
    "prefill_attention": Kernel(
        _ATTENTION_SIZES, ("block_m", "block_n", "num_warps", "num_stages"), (), _prefill_attention, _PREFILL_MINIMA
    ),
}
