"""How an engine's process takes a card's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tritonmind.engine import allocator
from tritonmind.engine.launch import start_engine

CUDA = torch.device("cuda")
GROWING, FIXED = "expandable_segments:True", "expandable_segments:False"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What PyTorch is told, on a machine with a card whose memory can be allocated."""
    told: list[str] = []
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(allocator, "KERNEL_RELEASE", tmp_path / "osrelease")
    (tmp_path / "osrelease").write_text("6.8.0-60-generic\n")
    return told


def test_segments_grow_on_a_card(settings: list[str]) -> None:
    allocator.use_expandable_segments(torch.device("cpu"))
    assert settings == []
    allocator.use_expandable_segments(CUDA)
    assert settings == [GROWING]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_up_stays(name: str, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512")
    allocator.use_expandable_segments(CUDA)
    assert settings == []


def test_segments_are_of_fixed_size_under_wsl(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "osrelease").write_text("5.15.167.4-microsoft-standard-WSL2\n")
    allocator.use_expandable_segments(CUDA)
    assert settings == []


def test_a_card_that_has_no_such_segments(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(size: int, device: torch.device) -> None:
        raise RuntimeError("CUDA driver error: operation not supported\nException raised from map")

    monkeypatch.setattr(torch, "empty", fail)
    allocator.use_expandable_segments(CUDA)
    assert settings == [GROWING, FIXED]
    assert caplog.messages == [
        "the card's memory is taken in segments of fixed size: CUDA driver error: operation not supported"
    ]


def test_this_torch_takes_the_settings() -> None:
    for text in (GROWING, FIXED):
        torch._C._accelerator_setAllocatorSettings(text)
    with pytest.raises((RuntimeError, ValueError)):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:perhaps")


@pytest.mark.gpu
def test_an_engine_with_graphs_in_such_segments(capfd: pytest.CaptureFixture[str]) -> None:
    client = start_engine("random:tiny", {"device": "cuda", "max_num_seqs": 2})
    client.shutdown()
    assert "the card's memory is taken in segments that grow" in capfd.readouterr().err
