"""Scales of an int8 KV cache: by hand from a calibration, and into workspaces that stay whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoints import make_llama_checkpoint
from tests.tools.lite_cases import calibrated
from tests.workspaces import convert

from tritonmind import workspace_writer
from tritonmind.errors import ConfigError, WorkspaceError
from tritonmind.workspace import Workspace
from tritonmind_tools.cli import main
from tritonmind_tools.lite.kv_qparams import kv_qparams


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoint, work and, split for two ranks, workspace."""
    directory = tmp_path_factory.mktemp("kv")
    calibrated(directory)
    convert(directory / "checkpoint", directory / "workspace", "--tp", "2")
    return directory


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_are_the_formulas(work: Path, symmetric: bool) -> None:
    weights = work / "workspace" / "triton_models" / "weights"
    command = ["lite", "kv_qparams", "--work_dir", str(work / "work"), "--turbomind_dir", str(weights)]
    assert main([*command, "--kv_bits", "8", "--kv_sym", str(symmetric), "--num_tp", "2"]) == 0

    workspace = Workspace.open(work / "workspace")
    statistics = load_file(work / "work/calibration/key_stats.safetensors")
    statistics |= load_file(work / "work/calibration/value_stats.safetensors")
    for rank in range(2):
        scales = workspace.kv_scales(rank)
        assert scales is not None and scales.shape == (2, 4)
        for number in range(2):
            for column, what in ((0, "key"), (2, "value")):
                low, high = (statistics[f"layers.{number}.{what}.{kind}"][rank] for kind in ("min", "max"))
                scale, zero = scales[number, column].item(), scales[number, column + 1].item()
                if symmetric:
                    assert scale == pytest.approx(max(-low.min().item(), high.max().item()) / 127) and zero == 0
                else:
                    assert scale == pytest.approx((high.max().item() - low.min().item()) / 255)
                    assert zero == pytest.approx((high.max().item() + low.min().item()) / 2)
    assert not torch.equal(workspace.kv_scales(0), workspace.kv_scales(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_stopped_anywhere_the_workspace_can_be_opened(
    work: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kv_qparams(work / "work", work / "workspace", num_tp=2).weights_dir
    files = sorted(before.iterdir())
    expected = Workspace.open(work / "workspace").kv_scales(0)
    replace_file, num_calls = workspace_writer._replace_file, 0

    def failing(path: Path, write: Callable[[Path], None]) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == fails_at:
            raise OSError(28, "No space left on device", str(path))
        replace_file(path, write)

    monkeypatch.setattr(workspace_writer, "_replace_file", failing)
    with pytest.raises(OSError, match="No space"):
        kv_qparams(work / "work", work / "workspace", num_tp=2, kv_sym=True)
    assert sorted(before.iterdir()) == files
    found = Workspace.open(work / "workspace").kv_scales(0)
    assert found is None or (expected is not None and torch.equal(found, expected))
    assert (found is None) == (fails_at > 1)


def test_an_altered_file_is_named(work: Path) -> None:
    workspace = kv_qparams(work / "work", work / "workspace", num_tp=2)
    path = workspace.weights_dir / "kv_scales.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(WorkspaceError, match=r"kv_scales.safetensors was altered.*: run `tritonmind lite kv_qparams`"):
        Workspace.open(work / "workspace").kv_scales(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(WorkspaceError, match=r"was truncated or replaced; run `tritonmind lite kv_qparams`"):
        Workspace.open(work / "workspace")
    path.write_bytes(whole)


def test_what_does_not_fit_is_refused(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"--num_tp=1, but the workspace is split for 2 ranks"):
        kv_qparams(work / "work", work / "workspace")
    with pytest.raises(ConfigError, match=r"--kv_bits=4 is not supported"):
        kv_qparams(work / "work", work / "workspace", num_tp=2, kv_bits=4)
    with pytest.raises(ConfigError, match=r"holds no finished calibration: run `tritonmind lite calibrate"):
        kv_qparams(tmp_path, work / "workspace", num_tp=2)
    make_llama_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"calibrated for other weights than .*: norm.weight differs"):
        kv_qparams(work / "work", convert(tmp_path / "other", tmp_path / "other-workspace"))
    make_llama_checkpoint(tmp_path / "deeper", num_layers=3)
    with pytest.raises(ConfigError, match=r"another model than .*: num_layers is 2 there, 3 here"):
        kv_qparams(work / "work", convert(tmp_path / "deeper", tmp_path / "deeper-workspace"))
    with pytest.raises(SystemExit):
        main(["lite", "kv_qparams", "--turbomind_dir", "x", "--kv_sym", "maybe"])
    assert "'maybe' is neither True nor False" in capsys.readouterr().err
