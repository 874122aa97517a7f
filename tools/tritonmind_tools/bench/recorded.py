"""The last recorded figures of each workload, to hold new ones against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tritonmind.errors import ConfigError

KEY = ("workload", "shape", "precision", "unit", "engine")
OUR_ENGINE = "tritonmind"


class Recorded(NamedTuple):
    """A recorded figure and where it came from."""

    value: float
    date: datetime
    file: str


def read_results(path: Path) -> dict[str, Any]:
    """One file of results. Raises ConfigError naming it when it is none."""
    try:
        results = json.loads(path.read_bytes())
        if not (isinstance(results["card"], str) and isinstance(results["rows"], list)):
            raise ValueError("card is no text, or rows is no list")
        datetime.fromisoformat(results["date"])
        for row in results["rows"]:
            if not (isinstance(row["workload"], str) and float(row["value"]) >= 0):
                raise ValueError(f"the row {row} has no workload or no value")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ConfigError(f"{path} holds no results of `tritonmind bench --json`: {reason}") from None
    return dict(results)


def last_recorded(directory: Path, card: str) -> dict[tuple[str, ...], Recorded]:
    """The newest figure for each (workload, shape, precision, unit, engine) on `card`, of all files in `directory`.

    Raises ConfigError naming a file that holds no results.
    """
    newest: dict[tuple[str, ...], Recorded] = {}
    for path in sorted(directory.glob("*.json")):
        results = read_results(path)
        if results["card"] != card:
            continue
        date = datetime.fromisoformat(results["date"])
        for row in results["rows"]:
            key = row_key(row)
            if key not in newest or newest[key].date <= date:
                newest[key] = Recorded(float(row["value"]), date, path.name)
    return newest


def row_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What two rows must share to be the same measurement."""
    return tuple(str(row.get(name, OUR_ENGINE if name == "engine" else "")) for name in KEY)


def ratios(rows: Sequence[Mapping[str, Any]], recorded: Mapping[tuple[str, ...], Recorded]) -> list[float | None]:
    """Each row's value over the recorded one, None where there is none."""
    found = [recorded.get(row_key(row)) for row in rows]
    return [
        row["value"] / before.value if before and before.value else None
        for row, before in zip(rows, found, strict=True)
    ]
