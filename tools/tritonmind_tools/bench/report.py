"""What every report carries: card, driver, versions, commit, command and date, on paper and in its files."""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from tritonmind.config import ModelConfig, QuantPolicy
from tritonmind.errors import ConfigError
from tritonmind_tools.bench import machine

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # as torch names a dtype, and as rows do
INT4_PRECISION = "w4"  # 4-bit weights, computed with in 16 bits
RESULTS = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "results"  # in a checkout
PLAIN_WIDTH = 200  # columns of a table that no terminal breaks


def precision(model: ModelConfig, dtype: str, quant_policy: int = QuantPolicy.NONE) -> str:
    """What rows say of an engine that computes in `dtype`, as torch names it, over a KV cache of this policy.

    A CPU's has its 4-bit weights in that.
    """
    weights = INT4_PRECISION if model.weight_type == "int4" and dtype != "float32" else PRECISIONS[dtype]
    return weights + (f"+kv{int(quant_policy)}" if quant_policy else "")


def add_output_options(parser: argparse.ArgumentParser, *, plots: bool = True) -> None:
    """--json, --csv, --plot, --record and --results, as Report.from_args reads them."""
    parser.add_argument("--json", metavar="FILE", help="also write facts and rows there")
    parser.add_argument("--csv", metavar="FILE", help="also write the rows there")
    if plots:
        parser.add_argument(
            "--plot", metavar="DIR", help="also draw PNGs of them there (pip install tritonmind[bench])"
        )
    parser.add_argument("--record", action="store_true", help="keep the results as DATE-COMMIT.json among the recorded")
    parser.add_argument(
        "--results", metavar="DIR", default=str(RESULTS), help="recorded results (default: docs/benchmarks/results)"
    )


class Report:
    """The facts of one measurement, taken when it begins, and notes that it adds on the way.

    Files and folders are looked at before the measurement, which may take long, and not after it.
    """

    def __init__(
        self, *, json_path: str | None, csv_path: str | None, plot_dir: str | None, record_dir: str | None
    ) -> None:
        check_file("--json", json_path)
        check_file("--csv", csv_path)
        if record_dir and not Path(record_dir).is_dir():
            raise ConfigError(f"--results={record_dir!r} is no folder to record in; make it first")
        if plot_dir:
            from tritonmind_tools.bench.plot import require_matplotlib

            require_matplotlib()
            if Path(plot_dir).exists() and not Path(plot_dir).is_dir():
                raise ConfigError(f"--plot={plot_dir!r} is a file; name a folder for the PNGs")
        self._json_path, self._csv_path = json_path, csv_path
        self._plot_dir, self._record_dir = plot_dir, record_dir
        self.facts: dict[str, Any] = {
            "card": machine.card(),
            "driver": machine.driver(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self.notes: dict[str, str] = {}

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Report:
        """As the options of add_output_options say. Raises ConfigError for a file that could not be written."""
        return cls(
            json_path=args.json,
            csv_path=args.csv,
            plot_dir=getattr(args, "plot", None),
            record_dir=args.results if args.record else None,
        )

    def print_facts(self) -> None:
        """Facts and notes, a line each."""
        facts = {**self.facts, "versions": ", ".join(f"{name} {text}" for name, text in self.facts["versions"].items())}
        print()
        for name, value in {**facts, **self.notes}.items():
            print(f"{name:>16}: {value}")

    def results(self, rows: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """What a file of results holds."""
        return {**self.facts, "notes": self.notes, "rows": list(rows), **more}

    def write(self, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
        """Write all that the options ask for, and say where what they do not name has gone. Raises OSError."""
        if self._json_path:
            _write_json(Path(self._json_path), self.results(rows, **more))
        if self._csv_path:
            columns = dict.fromkeys(name for row in rows for name in row)
            with Path(self._csv_path).open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
        if self._record_dir:
            path = self._record_path(Path(self._record_dir))
            _write_json(path, self.results(rows, **more))
            print(f"recorded: {path}")
        if self._plot_dir:
            from tritonmind_tools.bench.plot import draw

            for path in draw([self.results(rows, **more)], Path(self._plot_dir)):
                print(f"plot: {path}")

    def _record_path(self, directory: Path) -> Path:
        """YYYYMMDDTHHMM-commit.json, with a number where two runs began within a minute."""
        begun = datetime.fromisoformat(self.facts["date"])
        commit = re.sub(r"[^\w.-]", "-", self.facts["commit"])
        stem = f"{begun:%Y%m%dT%H%M}-{commit}"
        names = (stem, *(f"{stem}-{number}" for number in range(2, 100)))
        return next(path for name in names if not (path := directory / f"{name}.json").exists())


def check_file(option: str, path: str | None) -> None:
    """Raise ConfigError where the file that an option names could not be written."""
    if path and not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{option}={path!r}: its folder does not exist; make it first")
    if path and Path(path).is_dir():
        raise ConfigError(f"{option}={path!r} is a folder; name a file")


def _write_json(path: Path, results: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=2) + "\n")


class Progress:
    """What is being measured, on standard error: a bar on a terminal, else a line for each piece of work."""

    def __init__(self, num_pieces: int) -> None:
        self._num_pieces, self._num_begun = num_pieces, 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._num_pieces)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, text: str) -> None:
        """The next piece of work begins: `text` says what it is."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._num_begun, description=text)
        self._num_begun += 1
        if self._bar is None:
            print(f"[{self._num_begun}/{self._num_pieces}] {text}", file=sys.stderr, flush=True)


def print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table on standard output, the first column to the left and numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, markup=False, highlight=False).print(table)


def positive_numbers(option: str, text: str) -> list[int]:
    """The numbers of a comma-separated option. Raises ConfigError naming it."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option}={text!r} must be positive numbers separated by commas")
    return numbers


def prompt_sizes(option: str, text: str) -> list[tuple[int, int]]:
    """How many prompts and how long each, for each SxT of a comma-separated option. Raises ConfigError naming it."""
    try:
        pairs = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ConfigError(f"{option}={text!r} must be like 4x1024,1x512: prompts x tokens of each, separated by commas")
    return [(num_prompts, num_tokens) for num_prompts, num_tokens in pairs]
