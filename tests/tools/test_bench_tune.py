"""`tritonmind bench tune`: its search finds the fastest of what it may try, and its file is what launches read."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tritonmind.kernels import tuning
from tritonmind.kernels.tile_candidates import SEARCHES
from tritonmind.kernels.tile_table import KERNELS, LIBRARY, Card, Tile
from tritonmind_tools.bench import tune, tune_cases
from tritonmind_tools.bench.kernel_case import Point, Setting
from tritonmind_tools.bench.shapes import SHAPES
from tritonmind_tools.bench.tune import Pick, merged, search, written
from tritonmind_tools.bench.tune_cases import Task
from tritonmind_tools.cli import main

H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 132)
O_16 = Task("linear", "wo", (4096, 4096), 16, 16)
O_64 = Task("linear", "wo", (4096, 4096), 64, 64)
BEST = Tile(block_m=32, block_n=128, block_k=64, splits=4, prefetch=1, num_warps=8, num_stages=3)


def distance(tile: Tile) -> float:
    """A time that is least for BEST, and tells each of its settings apart."""
    if tile.is_whole:
        return 3.0 + tile.many_rows
    return 1.0 + sum(abs(math.log2((ours + 1) / (its + 1))) for ours, its in zip(tile[:-2], BEST[:-2], strict=True))


def everything(jobs: list[tuple[Task, Tile]]) -> list[tuple[Task, Tile]]:
    return jobs


def test_search_finds_the_fastest() -> None:
    timed: list[tuple[Task, Tile]] = []

    def seconds(task: Task, tile: Tile) -> float:
        timed.append((task, tile))
        return distance(tile)

    picks = search([O_16, O_64], H100, everything, seconds, lambda: False)
    assert picks[O_16].tile == BEST and picks[O_16].seconds == 1.0 and picks[O_16].library_seconds == 3.0
    assert picks[O_64].tile == BEST._replace(block_m=64)  # no tile of 64 rows may be smaller
    assert len(timed) == len(set(timed)) == sum(pick.num_tried for pick in picks.values())


def test_a_product_that_nothing_follows_is_not_split() -> None:
    head = Task("linear", "output", (32000, 4096), 16, 16)
    tried: set[int] = set()

    def seconds(task: Task, tile: Tile) -> float:
        tried.add(tile.splits)
        return distance(tile)

    search([head], H100, everything, seconds, lambda: False)
    assert tried == {1}


def test_library_stands_where_nothing_beats_it_clearly() -> None:
    pick = search([O_16], H100, everything, lambda task, tile: 1.0 if tile.is_whole else 0.995, lambda: False)[O_16]
    assert pick.tile == LIBRARY and pick.seconds == 1.0
    pick = search([O_16], H100, everything, lambda task, tile: 1.0 if tile.is_whole else 0.9, lambda: False)[O_16]
    assert not pick.tile.library and pick.seconds == 0.9


def test_what_spills_or_is_refused_is_no_choice() -> None:
    def usable(jobs: list[tuple[Task, Tile]]) -> list[tuple[Task, Tile]]:
        return [(task, tile) for task, tile in jobs if tile.block_n != BEST.block_n]

    picks = search([O_16], H100, usable, lambda task, tile: distance(tile), lambda: False)
    assert not picks[O_16].tile.library and picks[O_16].tile.block_n != BEST.block_n
    picks = search([O_16], H100, everything, lambda task, tile: 2.0 if tile.is_whole else math.inf, lambda: False)
    assert picks[O_16].tile == LIBRARY
    assert search([O_16], H100, lambda jobs: [], lambda task, tile: 1.0, lambda: False) == {}


@pytest.mark.parametrize("num_timings", [0, 5])
def test_search_ends_with_the_time(num_timings: int) -> None:
    timed: list[float] = []

    def seconds(task: Task, tile: Tile) -> float:
        timed.append(distance(tile))
        return timed[-1]

    picks = search([O_16, O_64], H100, everything, seconds, lambda: len(timed) >= num_timings)
    assert len(timed) == num_timings
    assert O_64 not in picks
    if num_timings:
        assert picks[O_16].seconds == min(timed)


def pick(tile: Tile) -> Pick:
    return Pick(tile, 1e-6, 2e-6, 9)


def test_file_is_what_launches_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Task("decode_attention", "paged_decode_attention", (128, 1, 64, 2), 64, 64)
    tile = Tile(block_n=64, programs_per_sm=2, num_warps=2, num_stages=4)
    picks = {O_64: pick(LIBRARY), O_16: pick(BEST), decode: pick(tile)}
    (tmp_path / tuning.file_name(H100.name)).write_text(written(merged({}, H100.name, "3.6.0", picks)))
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    assert [tuple(step) for step in tuning.ladder("linear", H100, (4096, 4096))[:2]] == [(16, BEST), (64, LIBRARY)]
    assert tuple(tuning.ladder("decode_attention", H100, (128, 1, 64, 2))[0]) == (64, tile)


def test_a_new_ladder_replaces_its_own_and_no_other() -> None:
    other = Task("linear", "w2", (4096, 11008), 16, 16)
    before = merged({}, H100.name, "3.5.0", {O_16: pick(LIBRARY), other: pick(BEST)})
    content = merged(before, H100.name, "3.6.0", {O_16: pick(BEST), O_64: pick(BEST)})
    assert content["triton"] == "3.6.0" and json.loads(written(content)) == content
    # Steps with one tile are one step.
    assert [(entry["k"], entry["max_rows"]) for entry in content["kernels"]["linear"]] == [(4096, 64), (11008, 16)]


def test_a_search_that_was_cut_short_leaves_the_steps_beyond_it() -> None:
    before = merged({}, H100.name, "3.6.0", {O_16: pick(LIBRARY), O_64: pick(BEST)})
    content = merged(before, H100.name, "3.6.0", {O_16: pick(BEST._replace(splits=1))})
    entries = content["kernels"]["linear"]
    assert [(entry["max_rows"], entry["splits"]) for entry in entries] == [(16, 1), (64, BEST.splits)]


@pytest.mark.parametrize("shape", ["llama2-7b", "llama3-8b"])
def test_every_product_of_a_model_is_searched_at_its_size(shape: str) -> None:
    setting = Setting(SHAPES[shape], torch.float16, torch.device("cpu"))
    tasks = tune_cases.tasks(setting, list(KERNELS))
    assert len({(task.kernel, task.sizes, task.max_rows) for task in tasks}) == len(tasks)
    sizes = {(task.kernel, task.sizes) for task in tasks}
    expected = {
        "llama2-7b": {(12288, 4096), (4096, 4096), (4096, 11008), (32000, 4096)},
        "llama3-8b": {(6144, 4096), (4096, 4096), (4096, 14336), (128256, 4096)},
    }[shape]
    assert {found for kernel, found in sizes if kernel == "linear"} == expected
    for kernel in KERNELS:
        steps = [task.max_rows for task in tasks if task.kernel == kernel]
        assert set(steps) == {max_rows for max_rows, _ in SEARCHES[kernel].rows}


def test_the_jit_functions_of_each_kernel_exist() -> None:
    pytest.importorskip("triton")
    assert tune_cases.JITTED.keys() == tune_cases.PRODUCTS.keys() == KERNELS.keys()
    for names in tune_cases.JITTED.values():
        for name in names:
            module, _, function = name.partition(".")
            assert callable(getattr(importlib.import_module(f"tritonmind.kernels.{module}"), function))


TINY = Setting(SHAPES["tiny"], torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("task", tune_cases.tasks(TINY, list(KERNELS)), ids=str)
def test_work_runs(task: Task) -> None:
    query_len = 3 if tune_cases.point(task).query_len > 1 else 1
    work = tune_cases.case(TINY, task, Point(2, query_len, 5))
    with torch.inference_mode():
        call = work.make()
        call()
    assert work.num_bytes > 0


def test_partial_sums_are_taken_by_the_kernel_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[str] = []
    for name in ("add_rms_norm", "rotary_kv_write"):
        original: Callable[..., Any] = getattr(tune_cases.kernels, name)

        def follow(*args: Any, original: Callable[..., Any] = original, name: str = name, **kwargs: Any) -> Any:
            followed.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(tune_cases.kernels, name, follow)
    for product in ("w_qkv", "wo", "w2", "output"):
        (task,) = (t for t in tune_cases.tasks(TINY, ["linear"]) if (t.product, t.max_rows) == (product, 1))
        with torch.inference_mode():
            tune_cases.case(TINY, task, Point(2, 1, 5)).make()()
    assert followed == ["rotary_kv_write", "add_rms_norm", "add_rms_norm"]
    followed.clear()
    # With 4-bit weights in the chain of a layer, whichever of its products is looked at.
    task = tune_cases.tasks(TINY, ["w4_gate_up"])[0]
    with torch.inference_mode():
        tune_cases.case(TINY, task, Point(2, 1, 5)).make()()
    assert followed == ["rotary_kv_write", "add_rms_norm", "add_rms_norm"]


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--kernel=gemm", "--kernel='gemm' has no tiles; those that have are linear, gate_up"),
        ("--budget=0", "--budget=0.0 must be a number of seconds above 0"),
        ("--budget=nan", "--budget=nan must be"),
        ("--max-rows=0", "--max-rows=0 must be at least 1"),
    ],
)
def test_tune_refuses_nonsense(option: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tune", option]) == 1
    assert named in capsys.readouterr().err


def test_tune_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "tune"]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_wrong_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text('{"card": "another", "triton": "3.6.0", "kernels": {}}')
    with pytest.raises(tune.ConfigError, match=r"no file of tiles for this card: card='another'.*name another"):
        tune._read(path, H100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tune_on_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, report = tmp_path / "tiles.json", tmp_path / "report.json"
    arguments = ["--shape=llama-150m", "--kernel=gate_up", "--budget=60", f"--output={output}", f"--json={report}"]
    assert main(["bench", "tune", *arguments]) == 0
    entries = json.loads(output.read_text())["kernels"]["gate_up"]
    assert entries and {(entry["n"], entry["k"]) for entry in entries} == {(2048, 768)}
    rows = json.loads(report.read_text())["rows"]
    assert rows and all(0 < row["value"] < 1000 for row in rows)
    assert "library us" in capsys.readouterr().out
