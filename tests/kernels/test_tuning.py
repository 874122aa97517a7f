"""Which tile a launch gets: the files of tiles, the rules, and what a warm-up is told of both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tritonmind.kernels import tuning, w4_variants
from tritonmind.kernels.linear import MIN_ADDED_ROWS
from tritonmind.kernels.tile_candidates import SEARCHES, candidates
from tritonmind.kernels.tile_table import KERNELS, LIBRARY, UNLIMITED, Card, Tile

DEVICE = torch.device("cpu")
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 132)
CARDS = (H100, Card("NVIDIA A100-SXM4-80GB", (8, 0), 108), Card("NVIDIA L4", (8, 9), 58), tuning.CPU)
SIZES = {
    "linear": {"n": 4096, "k": 4096},
    "gate_up": {"n": 11008, "k": 4096},
    "int8_linear": {"n": 32000, "k": 4096},
    "w4_linear": {"n": 4096, "k": 4096, "group_size": 128},
    "w4_gate_up": {"n": 11008, "k": 4096, "group_size": 64},
    "decode_attention": {"head_dim": 128, "group": 4, "block_size": 64, "itemsize": 2},
    "prefill_attention": {"head_dim": 128, "group": 4, "block_size": 64, "itemsize": 2},
}
ENTRY = {
    "n": 4096, "k": 4096, "max_rows": 16, "block_m": 16, "block_n": 64, "block_k": 128, "splits": 4, "prefetch": 0,
    "num_warps": 4, "num_stages": 5,
}  # fmt: skip
TILE = Tile(block_m=16, block_n=64, block_k=128, splits=4, num_warps=4, num_stages=5)


def forget() -> None:
    for cached in (tuning.tile, tuning.ladder, tuning.of_card):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "card", lambda device: H100)
    monkeypatch.setattr(tuning, "SHIPPED", Path("nowhere"))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    forget()
    yield
    forget()


def entry_of(kernel: str, tile: Tile, max_rows: int) -> dict[str, Any]:
    """As a file has it."""
    fields = KERNELS[kernel].fields_of(tile)
    return {**SIZES[kernel], "max_rows": max_rows, **{name: getattr(tile, name) for name in fields}}


def write(directory: Path, *entries: dict[str, Any], card: str = H100.name) -> Path:
    path = directory / tuning.file_name(card)
    path.write_text(json.dumps({"card": card, "triton": "3.6.0", "kernels": {"linear": entries}}))
    return path


def linear(rows: int, **sizes: int) -> Tile:
    return tuning.tile("linear", DEVICE, rows=rows, **{**SIZES["linear"], **sizes})


def test_rows_take_the_smallest_step_that_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    middle = {**ENTRY, "max_rows": 64, "block_m": 64}
    write(tmp_path, {"n": 4096, "k": 4096, "max_rows": 200, "library": True}, middle, ENTRY)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    assert [linear(rows) for rows in (1, 16, 17, 64)] == [TILE, TILE, *[TILE._replace(block_m=64)] * 2]
    assert linear(65) == linear(200) == LIBRARY
    # More rows than the file knows, and sizes that it does not, are the rule's.
    rule = KERNELS["linear"].default(H100, SIZES["linear"])
    assert linear(201) == next(step.tile for step in rule if step.max_rows >= 201)
    assert linear(16, k=11008) != TILE


def test_own_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, shipped = tmp_path / "own", tmp_path / "shipped"
    for directory in (own, shipped):
        directory.mkdir()
    write(own, {**ENTRY, "splits": 2})
    write(shipped, ENTRY, {**ENTRY, "max_rows": 32}, {**ENTRY, "k": 11008})
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    monkeypatch.setenv(tuning.VARIABLE, str(own))
    assert linear(16) == TILE._replace(splits=2)
    assert linear(17) != TILE  # the whole ladder is the first directory's
    assert linear(16, k=11008) == TILE
    assert tuning.listed("linear", H100) == {(4096, 4096), (4096, 11008)}


def test_own_directory_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"TRITONMIND_TILE_CONFIGS=.*gone.* is not a directory"):
        linear(1)


def test_a_card_without_a_file_has_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ENTRY, card="NVIDIA L4")
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    assert linear(16) == KERNELS["linear"].default(H100, SIZES["linear"])[0].tile != TILE


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"block_n": 48}, r"linear\[0\]: block_n=48 must be a power of two"),
        ({"block_m": 4}, r"linear\[0\]: block_m=4 must be a whole number of at least 8"),
        ({"splits": 0}, r"linear\[0\]: splits=0 must be a whole number of at least 1"),
        ({"splits": 2.0}, r"linear\[0\]: splits=2.0 must be a whole number"),
        ({"num_stages": True}, r"linear\[0\]: num_stages=True must be a whole number"),
        ({"num_warps": 32}, r"linear\[0\]: num_warps=32 must be at most 16"),
        ({"prefetch": -1}, r"linear\[0\]: prefetch=-1 must be a whole number of at least 0"),
        ({"prefetch": 3}, r"linear\[0\]: prefetch=3 must be a power of two"),
        ({"prefetch": 1, "block_k": 32}, r"linear\[0\]: prefetch=1 of block_k=32 is less than 64 columns"),
        ({"block_q": 16}, r"linear\[0\]: 'block_q' is none of block_k, block_m"),
        ({"library": True}, r"linear\[0\]: 'block_k' is none of k, library, max_rows, n"),
    ],
)
def test_a_wrong_field_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], complaint: str
) -> None:
    write(tmp_path, {**ENTRY, **change})
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    with pytest.raises(ValueError, match=rf"NVIDIA-H100-80GB-HBM3\.json: {complaint}.*correct the file"):
        linear(1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([], r"the file=\[\] must be an object"),
        ({"card": H100.name, "kernels": {}}, "the file: 'triton' is missing"),
        ({"card": H100.name, "triton": 3.6, "kernels": {}}, "triton=3.6 must be text"),
        ({"card": "NVIDIA L4", "triton": "3.6.0", "kernels": {}}, "card='NVIDIA L4' must be 'NVIDIA H100 80GB HBM3'"),
        ({"card": H100.name, "triton": "3.6.0", "kernels": []}, r"kernels=\[\] must be an object"),
        ({"card": H100.name, "triton": "3.6.0", "kernels": {"gemm": []}}, "kernels has 'gemm', which is none of"),
        ({"card": H100.name, "triton": "3.6.0", "kernels": {"linear": {}}}, r"linear=\{\} must be a list"),
        ({"card": H100.name, "triton": "3.6.0", "kernels": {"linear": [3]}}, r"linear\[0\]=3 must be an object"),
        (
            {"card": H100.name, "triton": "3.6.0", "kernels": {"linear": [ENTRY, ENTRY]}},
            r"linear\[1\]: max_rows=16 stands twice",
        ),
        (
            {"card": H100.name, "triton": "3.6.0", "kernels": {"linear": [{"n": 1, "k": 1, "library": True}]}},
            r"linear\[0\]: 'max_rows' is missing",
        ),
        (
            {
                "card": H100.name,
                "triton": "3.6.0",
                "kernels": {"linear": [{"n": 1, "k": 1, "max_rows": 1, "library": 1}]},
            },
            "library=1 must be true",
        ),
    ],
)
def test_a_wrong_file_is_refused(content: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tuning.parse(content, H100.name)


def test_broken_json_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / tuning.file_name(H100.name)).write_text("{")
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    with pytest.raises(ValueError, match=r"NVIDIA-H100-80GB-HBM3\.json: .*tritonmind bench tune"):
        linear(1)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("max_rows", [1, 16, 17, 100])
def test_variants_are_what_dispatch_picks(
    kernel: str, card: Card, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "card", lambda device: card)
    sizes = SIZES[kernel]
    picked = {tuning.tile(kernel, DEVICE, rows=rows, **sizes) for rows in range(1, max_rows + 1)}
    listed = tuning.variants(kernel, DEVICE, max_rows=max_rows, **sizes)
    assert {tile for _, tile in listed} == picked and len(listed) == len(picked)
    for rows, tile in listed:
        assert 1 <= rows <= max_rows and tuning.tile(kernel, DEVICE, rows=rows, **sizes) == tile
    assert [rows for rows, _ in listed] == sorted((rows for rows, _ in listed), reverse=True)


@pytest.mark.parametrize("max_rows", [16, MIN_ADDED_ROWS - 1, MIN_ADDED_ROWS, 1024])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (5120, 13824), (2560, 9728)])
def test_a_warm_up_meets_products_that_add_and_those_that_do_not(n: int, k: int, max_rows: int) -> None:
    """What a product of many rows is for is added to by another variant of a tile that fewer rows may have too."""

    def variants(numbers: Iterable[int]) -> set[tuple[Tile, bool]]:
        found = [(rows, tuning.tile("w4_linear", DEVICE, rows=rows, n=n, k=k, group_size=128)) for rows in numbers]
        return {(tile, tile.warp_groups > 0 and rows >= MIN_ADDED_ROWS) for rows, tile in found}

    listed = w4_variants("w4_linear", n, k, 128, max_rows, DEVICE)
    assert min(listed) >= 1 and max(listed) == max_rows
    assert variants(listed) == variants(range(1, max_rows + 1))


def test_a_tile_that_returns_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ENTRY, {**ENTRY, "max_rows": 32, "splits": 1}, {**ENTRY, "max_rows": 64})
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    sizes = SIZES["linear"]
    assert tuning.variants("linear", DEVICE, max_rows=50, **sizes) == [(50, TILE), (32, TILE._replace(splits=1))]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_rules_give_what_a_file_could_say(kernel: str, card: Card) -> None:
    spec, entries = KERNELS[kernel], []
    for step in spec.default(card, SIZES[kernel]):
        settings = {name: getattr(step.tile, name) for name in spec.fields_of(step.tile)}
        entries.append({**SIZES[kernel], "max_rows": step.max_rows, **settings})
    (steps,) = tuning.parse({"card": "c", "triton": "t", "kernels": {kernel: entries}}, "c")[kernel].values()
    assert steps == spec.default(card, SIZES[kernel]) and steps[-1].max_rows == UNLIMITED


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"slices": 3}, "slices=3 must be a power of two"),
        ({"slices": 16}, "slices=16 of block_m=8 leave none for a row"),
        ({"block_n": 16}, "block_n=16 must be a whole number of at least 32"),
    ],
)
def test_slices_of_a_4_bit_weight(change: dict[str, int], complaint: str) -> None:
    entry = {
        "n": 4096, "k": 4096, "group_size": 128, "max_rows": 1, "block_m": 8, "block_n": 32, "splits": 2, "slices": 4,
        "prefetch": 2, "num_warps": 4, "num_stages": 4,
    }  # fmt: skip
    content = {"card": "c", "triton": "t", "kernels": {"w4_linear": [entry]}}
    assert tuning.parse(content, "c")["w4_linear"][4096, 4096, 128][0].tile.slices == 4
    with pytest.raises(ValueError, match=rf"w4_linear\[0\]: {complaint}"):
        tuning.parse({**content, "kernels": {"w4_linear": [{**entry, **change}]}}, "c")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"warp_groups": 4}, "warp_groups=4 must be 2 or 3"),
        ({"block_n": 32}, "block_n=32 must be 64 or 128"),
        ({"num_stages": 3}, "num_stages=3 must be 2 or 4"),
        ({"prefetch": 2}, "'prefetch' is none of"),
        ({"block_n": 128}, "block_m=128 times block_n=128 must be at most 8192: one of 3 warp groups"),
        ({"block_m": 256, "warp_groups": 2, "block_n": 128}, "block_m=256 times block_n=128 must be at most 16384"),
        ({"block_m": 256, "warp_groups": 2}, "num_stages=4 with block_m=256 takes 360448 bytes of shared memory"),
        ({"n": 4100}, "n=4100 and k=4096 must be multiples of 8 for warp_groups"),
    ],
)
@pytest.mark.parametrize("kernel", ["w4_linear", "w4_gate_up"])
def test_warp_groups_of_a_4_bit_weight(kernel: str, change: dict[str, int], complaint: str) -> None:
    tile = Tile(block_m=128, block_n=64, warp_groups=3, num_stages=4)
    entry = entry_of(kernel, tile, 256)
    content = {"card": "c", "triton": "t", "kernels": {kernel: [entry]}}
    assert tuning.parse(content, "c")[kernel][tuple(SIZES[kernel].values())][0].tile == tile
    with pytest.raises(ValueError, match=rf"{kernel}\[0\]: {complaint}"):
        tuning.parse({**content, "kernels": {kernel: [{**entry, **change}]}}, "c")


def test_many_rows_of_aligned_sizes() -> None:
    def entries(n: int) -> dict[str, object]:
        entry = {"n": n, "k": 4096, "max_rows": 4096, "many_rows": True}
        return {"card": "c", "triton": "t", "kernels": {"gate_up": [entry]}}

    assert tuning.parse(entries(4096), "c")["gate_up"]
    with pytest.raises(ValueError, match=r"gate_up\[0\]: n=4100 and k=4096 must be multiples of 8 for many_rows"):
        tuning.parse(entries(4100), "c")


def test_warp_groups_in_the_file_of_another_card(tmp_path: Path) -> None:
    l4 = CARDS[2]
    tile = Tile(block_m=128, block_n=64, warp_groups=3, num_stages=4)
    content = {"card": l4.name, "triton": "t", "kernels": {"w4_gate_up": [entry_of("w4_gate_up", tile, 256)]}}
    (tmp_path / tuning.file_name(l4.name)).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"NVIDIA-L4\.json: w4_gate_up: warp_groups is for Hopper's cards"):
        tuning.of_card(tmp_path, l4)


def test_prefill_attention_has_room_for_two_tiles() -> None:
    """Its kernel for Hopper gives a tile of V back when it has the next one."""
    entry = {**SIZES["prefill_attention"], "max_rows": 4096, "block_m": 128, "block_n": 64, "num_warps": 8}
    content = {"card": "c", "triton": "t", "kernels": {"prefill_attention": [{**entry, "num_stages": 2}]}}
    assert tuning.parse(content, "c")["prefill_attention"]
    content["kernels"] = {"prefill_attention": [{**entry, "num_stages": 1}]}
    with pytest.raises(ValueError, match=r"prefill_attention\[0\]: num_stages=1 must be a whole number of at least 2"):
        tuning.parse(content, "c")


@pytest.mark.parametrize("n", [4096, 4100, 4096 * 64])
def test_the_library_multiplies_what_fills_the_card_or_fits_no_tile(n: int) -> None:
    assert linear(1, n=n).library == (n != 4096)
    assert linear(10**6, n=n).library


def test_many_gated_rows_are_for_hopper() -> None:
    for card in CARDS:
        default = KERNELS["gate_up"].default
        assert default(card, {"n": 4096, "k": 4096})[-1].tile.many_rows == (card.capability[0] == 9)
        # Rows that do not begin at multiples of 16 bytes.
        assert default(card, {"n": 4100, "k": 4096})[-1].tile.library


def test_warp_groups_are_for_hopper_and_fill_it() -> None:
    def found(card: Card, rows: int, kernel: str = "w4_linear", **sizes: int) -> Tile:
        steps = KERNELS[kernel].default(card, {"n": 4096, "k": 4096, "group_size": 128, **sizes})
        return next(step.tile for step in steps if rows <= step.max_rows)

    for card in CARDS:
        is_hopper = card.capability[0] == 9
        for kernel in ("w4_linear", "w4_gate_up"):
            for rows in (16, 33, 64, 256):
                assert bool(found(card, rows, kernel).warp_groups) == is_hopper
            assert not found(card, 8, kernel).warp_groups
            # Rows that do not begin at multiples of 16 bytes.
            assert not found(card, 256, kernel, n=4100).warp_groups
    hopper = Card("an H100", (9, 0), 132)
    assert [found(hopper, rows).block_m for rows in (9, 17, 33, 65)] == [16, 32, 64, 128]
    # Whole sums where K has too few blocks to share.
    assert [found(hopper, 64, k=k).splits for k in (512, 1024, 4096)] == [1, 2, 4]
    few, many = found(hopper, 256), found(hopper, 512)
    assert (few.warp_groups, few.splits) == (many.warp_groups, 2 * many.splits) == (2, 2)
    assert found(hopper, 256, n=12288).warp_groups == 3
    assert found(hopper, 10**6).block_m == 256


def test_forced_tiles_hold_for_a_while() -> None:
    before = linear(1)
    with tuning.forced("linear", (4096, 4096), TILE):
        assert linear(1) == linear(500) == TILE
        assert linear(1, k=11008) != TILE  # of other sizes
    assert linear(1) == before


@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_are_tiles_that_a_file_takes(kernel: str) -> None:
    for max_rows, rows in SEARCHES[kernel].rows:
        num_waves = len(SEARCHES[kernel].waves(rows))
        best = None
        for wave in range(num_waves):
            found = list(candidates(kernel, H100, SIZES[kernel], rows, wave, best))
            assert found and len(set(found)) == len(found), f"wave {wave} of {rows} rows"
            for tile in found:
                content = {"card": "c", "triton": "t", "kernels": {kernel: [entry_of(kernel, tile, max_rows)]}}
                tuning.parse(content, "c")
            best = found[-1]
        assert not list(candidates(kernel, H100, SIZES[kernel], rows, num_waves, best))


def test_every_kernel_with_tiles_can_be_searched() -> None:
    assert SEARCHES.keys() == KERNELS.keys()


def test_shipped_files_are_right_and_in_the_wheel() -> None:
    root = Path(tuning.__file__).parent
    for path in (root / "configs").glob("*"):
        assert path.suffix == ".json"
        content = json.loads(path.read_text())
        tuning.parse(content, content["card"])
        assert path.name == tuning.file_name(content["card"])
    assert "kernels = configs/*.json" in (root.parents[2] / "setup.cfg").read_text()
