"""`tritonmind bench static`: it measures what it says, on a tiny model, and refuses nonsense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.workspaces import tiny_workspace

from tritonmind.config import ModelConfig
from tritonmind_tools.bench import machine
from tritonmind_tools.bench.static import step_bytes
from tritonmind_tools.cli import main


def test_static_reports_each_batch_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 1 << 20)
    workspace = tiny_workspace(tmp_path)
    report = tmp_path / "report.json"
    arguments = ["--batch-sizes", "1,3", "--input-len", "5", "--output-len", "7", "--rounds", "1", "--num-threads", "1"]
    assert main(["bench", "static", str(workspace), *arguments, "--json", str(report)]) == 0
    results = json.loads(report.read_text())
    assert [(row["batch_size"], row["input_len"], row["output_len"]) for row in results["rows"]] == [
        (1, 5, 7),
        (3, 5, 7),
    ]
    for row in results["rows"]:
        assert row["tokens_per_second"] > 0 and row["time_to_first_token"] > 0
    assert {"torch", "commit", "device", "copy bandwidth"} <= results["machine"].keys()
    assert "batch   3  5/7" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", ["", "0", "1,x", "-1"])
def test_batch_sizes_must_be_positive_numbers(tmp_path: Path, sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "static", str(tmp_path), f"--batch-sizes={sizes}"]) == 1
    assert f"--batch-sizes={sizes!r}" in capsys.readouterr().err


def test_step_bytes_of_llama_2_7b() -> None:
    model = ModelConfig(
        architecture="LlamaForCausalLM",
        model_name="llama2",
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=11008,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=4096,
        weight_type="fp16",
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    # 6.476 G projection weights, 0.131 G of the head, 512 KiB of K and V a token, two bytes each.
    assert step_bytes(model, 2, 1, 0) == pytest.approx(13.21e9, rel=1e-3)
    assert step_bytes(model, 2, 4, 100) - step_bytes(model, 2, 4, 0) == 400 * 512 * 1024
