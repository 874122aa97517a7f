"""`bench load` on a tiny checkpoint and its workspace: every row is there, and says what it read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.checkpoints import make_llama_checkpoint

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.loading import weight_files
from tritonmind_tools.bench.recorded import read_results
from tritonmind_tools.cli import main
from tritonmind_tools.convert import convert


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, workspace, results = tmp_path / "checkpoint", tmp_path / "workspace", tmp_path / "results.json"
    make_llama_checkpoint(checkpoint)
    assert main(["bench", "load", str(checkpoint), "--device", "cpu", "--convert", "--json", str(results)]) == 0
    rows = read_results(results)["rows"]
    assert [(row["what"], row["cache"]) for row in rows] == [
        *((what, cache) for cache in ("cold", "cached") for what in ("cat", "load")),
        ("cp + sync", "cold"),
        ("convert", "cold"),
    ]
    size = (checkpoint / "model.safetensors").stat().st_size
    for row in rows:
        assert row["num_bytes"] == size and row["value"] == pytest.approx(size / row["seconds"] / 1e9)
        assert (row["workload"], row["precision"], row["unit"]) == (f"{row['what']} {row['cache']}", "fp32", "GB/s")
        assert (row["host_memory"] is None) == (row["what"] in ("cat", "cp + sync"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "results.json"], "nothing is left behind"
    assert " %" in capsys.readouterr().out
    convert("tiny", checkpoint, workspace)
    assert main(["bench", "load", str(workspace), "--device", "cpu", "--cached-only", "--json", str(results)]) == 0
    weights = sorted((workspace / "triton_models" / "weights").glob("*.safetensors"))
    assert {row["num_bytes"] for row in json.loads(results.read_text())["rows"]} == {
        sum(file.stat().st_size for file in weights)
    }


def test_no_weight_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to read"):
        weight_files(object(), tmp_path)  # type: ignore[arg-type]
