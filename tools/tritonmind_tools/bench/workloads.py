"""Lists of requests to measure with: the prompt and answer lengths of each, out of a file."""

from __future__ import annotations

import csv
from pathlib import Path

from tritonmind.errors import ConfigError

FILES = Path(__file__).resolve().parent / "workload_files"
COLUMNS = ("prompt_tokens", "output_tokens")


def read_workload(name_or_path: str) -> list[tuple[int, int]]:
    """Prompt and answer tokens of each request, in the file's order.

    name_or_path: mix1000, sharegpt3000, or a CSV file with the columns prompt_tokens and output_tokens. Raises
    ConfigError naming the file, and the line of it that is wrong.
    """
    shipped = FILES / f"{name_or_path}.csv"
    path = shipped if shipped.parent == FILES and shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in FILES.glob("*.csv")))
        raise ConfigError(f"--workload={name_or_path!r} is no file and none of {names}")
    return _read_csv(path)


def _read_csv(path: Path) -> list[tuple[int, int]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(f"{path}: no column {', '.join(missing)}; the first line must name {', '.join(COLUMNS)}")
        requests = []
        for row in reader:
            lengths = [row[name] or "" for name in COLUMNS]
            if not all(length.isdecimal() and int(length) for length in lengths):
                raise ConfigError(f"{path}, line {reader.line_num}: {lengths} must be two positive whole numbers")
            requests.append((int(lengths[0]), int(lengths[1])))
    if not requests:
        raise ConfigError(f"{path} names no requests")
    return requests
