"""The figures of docs/benchmarks and README are those of the recorded results, and these are as their page says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tritonmind.random_model import SHAPES
from tritonmind_tools.bench.plot import newest_rows
from tritonmind_tools.bench.recorded import OUR_ENGINE, read_results
from tritonmind_tools.bench.report import RESULTS

ROOT = Path(__file__).resolve().parents[2]
H100 = "docs/benchmarks/h100.md"
FILES = {path.name: read_results(path) for path in sorted(RESULTS.glob("*.json"))}
FACTS = ("card", "driver", "versions", "commit", "command", "date", "rows")
COLUMNS = ("fp16", "w4", "fp16+kv8", "w4+kv8")  # of the tables, in their order
TRANSFORMERS = "Transformers generate"

# The newest of each measurement, and what other engines reached.
Key = tuple[str, str, str]  # workload, precision, engine
NEWEST: dict[Key, Any] = {
    (row["workload"], row["precision"], row.get("engine", OUR_ENGINE)): row
    for row in newest_rows([result for result in FILES.values() if result["card"] == "NVIDIA H100 80GB HBM3"])
    if row["shape"] == "llama2-7b"
}
PEERS: list[Any] = json.loads((RESULTS.parent / "peers_h100.json").read_text())["rows"]


@pytest.mark.parametrize("name", FILES)
def test_a_recorded_file_is_as_the_page_says(name: str) -> None:
    results = FILES[name]
    assert all(results[fact] for fact in FACTS)
    begun = datetime.fromisoformat(results["date"])
    assert re.fullmatch(rf"{begun:%Y%m%dT%H%M}-{re.escape(results['commit'])}(-\d+)?\.json", name)
    assert "dirty" not in results["commit"] and "--quick" not in results["command"]
    for row in results["rows"]:
        assert row["precision"] and row["shape"] and row["unit"]
        if row["unit"] in ("tok/s", "req/s"):
            assert row["shape"] in SHAPES and "roofline_fraction" in row
            assert row["precision"] in COLUMNS


def rows_of_tables(page: str) -> Iterator[tuple[str, list[str]]]:
    """The first cell of each table's row, and the others."""
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("|"):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            yield first, cells


def workload(first: str) -> str | None:
    """The workload that a table's first cell names."""
    if match := re.fullmatch(r"(\d+), (\d+) / (\d+)", first):
        return "batch{}_{}_{}".format(*match.groups())
    if first.startswith(("mix1000,", "1000 of mixed lengths,")):
        return "mix1000"
    return "prefill_64x1024" if re.match(r"prefill, 64 (x|prompts of) 1024,", first) else None


def rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


@pytest.mark.parametrize(("page", "num_rows"), [("README.md", 6), (H100, 9)])
def test_the_tables_beside_other_engines(page: str, num_rows: int) -> None:
    num_seen = 0
    for first, cells in rows_of_tables(page):
        name = workload(first)
        if name is None or "(" not in cells[0]:
            continue
        num_seen += 1
        for cell, precision in zip(cells, COLUMNS, strict=True):
            theirs = max(
                row["value"] for row in PEERS
                if (row["workload"], row["precision"]) == (name, precision) and row["engine"] != TRANSFORMERS
            )  # fmt: skip
            ours = NEWEST[name, precision, OUR_ENGINE]["value"]
            assert re.findall(r"[\d.]+", cell) == [rounded(ours), rounded(theirs)], (name, precision)
    assert num_seen == num_rows


def test_the_table_of_shares_and_steps() -> None:
    sizes = {"batch 1, 1 / 512": "1_1_512", "8": "8_128_256", "64": "64_128_512", "256": "256_128_256"}
    found = [(sizes[first], cells) for first, cells in rows_of_tables(H100) if first in sizes and "%, " in cells[0]]
    assert [size for size, _ in found] == list(sizes.values())
    for size, cells in found:
        for cell, precision in zip(cells, COLUMNS, strict=True):
            row = NEWEST[f"batch{size}", precision, OUR_ENGINE]
            ms = 1e3 * row["step_time"]
            assert cell == f"{percent(row['roofline_fraction'])}, {ms:.{2 if ms < 10 else 1}f} ms", (size, precision)


def test_the_table_beside_transformers() -> None:
    found = [(first, cells) for first, cells in rows_of_tables(H100) if first in ("32", "64") and len(cells) == 3]
    assert len(found) == 2
    for size, cells in found:
        theirs, ours = (NEWEST[f"batch{size}_128_128", "fp16", engine] for engine in (TRANSFORMERS, OUR_ENGINE))
        assert cells == [f"{theirs['value']:.0f} tok/s", f"{ours['value']:.0f} tok/s", f"{ours['ratio']:.1f}"]


@pytest.mark.parametrize("sizes", ["64_128_512", "256_128_256"])
def test_the_table_through_the_server(sizes: str) -> None:
    served = NEWEST[f"server_{sizes}", "fp16", "server"]
    bare = NEWEST[f"batch{sizes}", "fp16", "bare engine"]
    first, token = (
        " / ".join(f"{1e3 * served[f'{name}_{part}']:.{digits}f}" for part in ("p50", "p99")) + " ms"
        for name, digits in (("time_to_first_token", 0), ("inter_token", 1))
    )
    rates = [f"{row['value']:.0f} tok/s" for row in (served, bare)]
    others = [percent(served["ratio_to_engine"], 1), first, token, f"{served['tokens_per_message']:.2f}"]
    name = "{}, {} / {}".format(*sizes.split("_"))
    assert (name, [*rates, *others]) in list(rows_of_tables(H100))
