"""What every report carries: card, driver, versions, commit, command and date, on paper and in its JSON file."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tritonmind.errors import ConfigError
from tritonmind_tools.bench import machine

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # as torch names a dtype, and as rows do


class Report:
    """The facts of one measurement, taken when it begins, and notes that it adds on the way."""

    def __init__(self, json_path: str | None) -> None:
        # Looked at before the measurement, which may take long, and not after it.
        if json_path and not Path(json_path).absolute().parent.is_dir():
            raise ConfigError(f"--json={json_path!r}: its folder does not exist; make it first")
        self._json_path = json_path
        self.facts: dict[str, Any] = {
            "card": machine.card(),
            "driver": machine.driver(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self.notes: dict[str, str] = {}

    def print_facts(self) -> None:
        """Facts and notes, a line each."""
        facts = {**self.facts, "versions": ", ".join(f"{name} {text}" for name, text in self.facts["versions"].items())}
        print()
        for name, value in {**facts, **self.notes}.items():
            print(f"{name:>16}: {value}")

    def write_json(self, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
        """Write facts, notes and rows to the file that --json names, if any. Raises OSError naming the file."""
        if self._json_path:
            results = {**self.facts, "notes": self.notes, "rows": list(rows), **more}
            Path(self._json_path).write_text(json.dumps(results, indent=2) + "\n")


def positive_numbers(option: str, text: str) -> list[int]:
    """The numbers of a comma-separated option. Raises ConfigError naming it."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option}={text!r} must be positive numbers separated by commas")
    return numbers
