"""The tile of a launch, by card, sizes and rows: from a file that `tritonmind bench tune` wrote, else by rule.

The file of a card is `<its name, spaces to dashes>.json` in the directory that TRITONMIND_TILE_CONFIGS names, if any,
or among those of the package; the first that lists a kernel at a size has the word. Of its entries there, rows take
the one with the smallest max_rows that holds them; more rows than the largest take the rule of tile_table.py:

    {"card": "NVIDIA H100 80GB HBM3", "triton": "3.6.0", "kernels": {"linear": [
        {"n": 4096, "k": 4096, "max_rows": 16, "block_m": 16, "block_n": 64, "block_k": 128, "splits": 4,
         "prefetch": 2, "num_warps": 4, "num_stages": 4},
        {"n": 4096, "k": 4096, "max_rows": 256, "library": true}]}}

A file is read once; a launch looks up a dictionary. Nothing depends on the time or on what was launched before.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tritonmind.kernels.tile_table import (
    GROUP_VALUES,
    HOPPER,
    HOPPER_SHARED_BYTES,
    KERNELS,
    MAX_GROUP_SUMS,
    UNLIMITED,
    WHOLE,
    Card,
    Kernel,
    Ladder,
    Step,
    Tile,
    aligned_rows,
    group_shared_bytes,
)

VARIABLE = "TRITONMIND_TILE_CONFIGS"
SHIPPED = Path(__file__).parent / "configs"
MAX_WARPS = 16
MINIMA = {"block_m": 8, "block_n": 16, "block_k": 16, "prefetch": 0}  # others: 1
MAX_REMEMBERED = 1 << 16  # answers of `tile`: products of a model times the numbers of rows that steps may have
LINE_COLUMNS = 64  # of a weight that a prefetch brings at least: 128 bytes
# No card: what the interpreter and the CPU's twins are given.
CPU = Card("cpu", (8, 0), 1)

# Steps of a kernel by its sizes, in the order of Kernel.sizes.
Entries = dict[str, dict[tuple[int, ...], Ladder]]

_forced: dict[tuple[str, tuple[int, ...]], Tile] = {}


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def tile(kernel: str, device: torch.device, /, *, rows: int, **sizes: int) -> Tile:
    """The launch settings of `kernel` for `rows` rows at `sizes`, which are those that KERNELS names for it.

    Raises ValueError naming file, kernel and field when the card's file is wrong.
    """
    ordered = tuple(map(sizes.__getitem__, KERNELS[kernel].sizes))
    if (kernel, ordered) in _forced:
        return _forced[kernel, ordered]
    for max_rows, found in ladder(kernel, card(device), ordered):
        if rows <= max_rows:
            return found
    raise AssertionError(f"{kernel} has no tile for {rows} rows")


@contextmanager
def forced(kernel: str, sizes: tuple[int, ...], found: Tile) -> Iterator[None]:
    """Have `tile` answer `found` for a kernel at `sizes`, in the order of Kernel.sizes, for any rows: to measure."""
    _forced[kernel, sizes] = found
    tile.cache_clear()
    try:
        yield
    finally:
        del _forced[kernel, sizes]
        tile.cache_clear()


def variants(kernel: str, device: torch.device, /, *, max_rows: int, **sizes: int) -> list[tuple[int, Tile]]:
    """Every tile that `tile` picks for 1 to `max_rows` rows, each with the most rows that get it: a warm-up's list."""
    most: dict[Tile, int] = {}
    before = 0
    for step in ladder(kernel, card(device), tuple(map(sizes.__getitem__, KERNELS[kernel].sizes))):
        if before < max_rows:
            most[step.tile] = min(step.max_rows, max_rows)
        before = step.max_rows
    return sorted(((rows, found) for found, rows in most.items()), reverse=True)


@functools.cache
def card(device: torch.device) -> Card:
    """The card behind `device`."""
    if device.type != "cuda":
        return CPU
    facts = torch.cuda.get_device_properties(device)
    return Card(facts.name, (facts.major, facts.minor), facts.multi_processor_count)


@functools.cache
def ladder(kernel: str, card: Card, sizes: tuple[int, ...]) -> Ladder:
    """The steps for all numbers of rows; the last one is UNLIMITED. sizes: in the order of Kernel.sizes."""
    spec = KERNELS[kernel]
    steps: Ladder = ()
    for directory in _directories():
        steps = steps or of_card(directory, card).get(kernel, {}).get(sizes, ())
    end = steps[-1].max_rows if steps else 0
    default = spec.default(card, dict(zip(spec.sizes, sizes, strict=True)))
    assert default[-1].max_rows == UNLIMITED, f"the rule for {kernel} ends at {default[-1].max_rows} rows"
    return (*steps, *(step for step in default if step.max_rows > end))


def listed(kernel: str, card: Card) -> set[tuple[int, ...]]:
    """The sizes, in the order of Kernel.sizes, that files have tiles for."""
    return {sizes for directory in _directories() for sizes in of_card(directory, card).get(kernel, {})}


def file_name(card_name: str) -> str:
    """Of the file with the tiles of a card."""
    return card_name.replace(" ", "-").replace("/", "-") + ".json"


def _directories() -> list[Path]:
    own = os.environ.get(VARIABLE)
    if not own:
        return [SHIPPED]
    if not Path(own).is_dir():
        raise ValueError(f"{VARIABLE}={own!r} is not a directory; name the one that holds <card>.json")
    return [Path(own), SHIPPED]


@functools.cache
def of_card(directory: Path, card: Card) -> Entries:
    """What a card's file in `directory` lists; nothing when there is none, as for most cards."""
    path = directory / file_name(card.name)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        found = parse(json.loads(text), card.name)
        for name, ladders in found.items():
            for tile in (step.tile for steps in ladders.values() for step in steps):
                if tile.hopper_field and card.capability[0] != HOPPER:
                    raise ValueError(
                        f"{name}: {tile.hopper_field} is for Hopper's cards, of compute capability {HOPPER}.0"
                    )
        return found
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct the file, or write it anew with tritonmind bench tune") from error


def parse(content: Any, card_name: str) -> Entries:
    """The entries of a file's content, checked. Raises ValueError naming kernel and field."""
    _check_keys("the file", content, {"card", "triton", "kernels"})
    for key in ("card", "triton"):
        if not isinstance(content[key], str):
            raise ValueError(f"{key}={content[key]!r} must be text")
    if content["card"] != card_name:
        raise ValueError(f"card={content['card']!r} must be {card_name!r}, for which the file is named")
    if not isinstance(content["kernels"], dict):
        raise ValueError(f"kernels={content['kernels']!r} must be an object")
    found: Entries = {}
    for name, entries in content["kernels"].items():
        if name not in KERNELS:
            raise ValueError(f"kernels has {name!r}, which is none of {', '.join(sorted(KERNELS))}")
        if not isinstance(entries, list):
            raise ValueError(f"{name}={entries!r} must be a list")
        found[name] = _ladders(name, entries)
    return found


def _ladders(name: str, entries: list[Any]) -> dict[tuple[int, ...], Ladder]:
    steps: dict[tuple[int, ...], dict[int, Tile]] = {}
    for index, entry in enumerate(entries):
        where = f"{name}[{index}]"
        sizes, step = _step(where, KERNELS[name], entry)
        if step.max_rows in steps.setdefault(sizes, {}):
            raise ValueError(f"{where}: max_rows={step.max_rows} stands twice for the same sizes")
        steps[sizes][step.max_rows] = step.tile
    return {sizes: tuple(Step(rows, tiles[rows]) for rows in sorted(tiles)) for sizes, tiles in steps.items()}


def _step(where: str, spec: Kernel, entry: Any) -> tuple[tuple[int, ...], Step]:
    given = entry if isinstance(entry, dict) else {}
    in_groups = spec.group_fields if "warp_groups" in given else ()
    fields = tuple(name for name in spec.whole if name in given) or in_groups or spec.fields
    _check_keys(where, entry, {*spec.sizes, "max_rows", *fields})
    for name, value in entry.items():
        expected = _expected(name, value, spec.minima)
        if in_groups and not expected and value not in (choice := GROUP_VALUES.get(name, (value,))):
            expected = " or ".join(map(str, choice))
        if expected:
            raise ValueError(f"{where}: {name}={value!r} must be {expected}")
    if 0 < entry.get("prefetch", 0) * entry.get("block_k", 0) < LINE_COLUMNS:
        raise ValueError(
            f"{where}: prefetch={entry['prefetch']} of block_k={entry['block_k']} is less than {LINE_COLUMNS} columns, "
            "a line of the cache; it must be 0 or more of them"
        )
    if entry.get("slices", 1) > entry.get("block_m", 1):
        raise ValueError(f"{where}: slices={entry['slices']} of block_m={entry['block_m']} leave none for a row")
    tile = Tile(**{name: entry[name] for name in fields})
    if tile.hopper_field and not aligned_rows(entry):
        raise ValueError(f"{where}: n={entry['n']} and k={entry['k']} must be multiples of 8 for {tile.hopper_field}")
    if tile.warp_groups and tile.block_m * tile.block_n > (most := MAX_GROUP_SUMS[tile.warp_groups]):
        raise ValueError(
            f"{where}: block_m={tile.block_m} times block_n={tile.block_n} must be at most {most}: one of "
            f"{tile.warp_groups} warp groups has no registers for more sums"
        )
    if tile.warp_groups and (shared := group_shared_bytes(tile)) > HOPPER_SHARED_BYTES:
        raise ValueError(
            f"{where}: num_stages={tile.num_stages} with block_m={tile.block_m} takes {shared} bytes of shared memory, "
            f"of {HOPPER_SHARED_BYTES}: lower one of them"
        )
    return tuple(entry[name] for name in spec.sizes), Step(entry["max_rows"], tile)


def _expected(name: str, value: Any, minima: Mapping[str, int]) -> str | None:
    """What the field should hold instead of `value`, None where it is right."""
    if name in WHOLE:
        return None if value is True else "true, or left out"
    least = minima.get(name, MINIMA.get(name, 1))
    if type(value) is not int or value < least:
        return f"a whole number of at least {least}"
    if (name.startswith("block_") or name in ("num_warps", "prefetch", "slices")) and value & (value - 1):
        return "a power of two"
    if name == "num_warps" and value > MAX_WARPS:
        return f"at most {MAX_WARPS}"
    return None


def _check_keys(where: str, given: Any, expected: set[str]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}={given!r} must be an object")
    unknown, missing = sorted(set(given) - expected), sorted(expected - set(given))
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is none of {', '.join(sorted(expected))}")
    if missing:
        raise ValueError(f"{where}: {missing[0]!r} is missing")
