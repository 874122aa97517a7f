"""`tritonmind check_env`: its exit code follows what is missing, and each finding has a remedy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from tritonmind.engine import device
from tritonmind_tools import check_env, server_install
from tritonmind_tools.server_install import ServerInstallError, check_numpy, find_libpython, find_server


def report() -> dict[str, check_env.Finding]:
    return {finding.topic: finding for finding in check_env.findings()}


def test_this_machine_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_env.run(argparse.Namespace()) == 0
    shown = capsys.readouterr().out
    for topic in ("torch", "tritonclient", "numpy", "libpython", "server", "GPU", "C compiler", "memory", "gRPC port"):
        assert f"  {topic} " in shown
    assert shown.rstrip().endswith("This machine can serve.")


def test_new_numpy_makes_serving_impossible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server_install.importlib.metadata, "version", lambda name: "2.4.6")
    with pytest.raises(ServerInstallError, match=r"NumPy 2\.4\.6 .*pip install \"numpy<2\""):
        check_numpy()
    assert report()["numpy"].level == "missing"
    assert check_env.run(argparse.Namespace()) == 1
    assert "Serving is impossible here: see numpy, server" in capsys.readouterr().out


def test_python_without_shared_library_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_install.Path, "exists", lambda self: False)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(ServerInstallError) as caught:
        find_libpython()
    assert f"libpython{version}.so.1.0" in str(caught.value)
    assert f"apt-get install libpython{version}" in str(caught.value)
    assert "--enable-shared" in str(caught.value)


def test_unsupported_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_install, "python_version", lambda: "3.14")
    with pytest.raises(ServerInstallError, match=r"Python 3\.14 .*3\.10, 3\.11, 3\.12"):
        find_server()


def test_incomplete_server_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: server_install.Path) -> None:
    monkeypatch.setenv(server_install.HOME_VARIABLE, str(tmp_path))
    with pytest.raises(ServerInstallError, match="bin/tritonserver is missing"):
        find_server()


def test_missing_server_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(server_install.HOME_VARIABLE, raising=False)
    monkeypatch.setattr(
        server_install.importlib.util, "find_spec", lambda name: None if name == "pytriton" else object()
    )
    with pytest.raises(ServerInstallError, match=r"tritonmind\[serve\]"):
        find_server()


def test_environment_puts_this_python_and_its_libraries_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    install = find_server()
    env = install.environment()
    assert env["PATH"] == f"{install.python_dir}:/usr/bin"
    assert env["LD_LIBRARY_PATH"].endswith(":/opt/lib")
    assert str(find_libpython().parent) in env["LD_LIBRARY_PATH"].split(":")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that PyTorch can use, as far as it goes without one."""
    monkeypatch.setattr(device, "card_present", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 24 << 30))


@pytest.mark.usefixtures("card")
def test_a_usable_card_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "check_device", lambda device: None)
    monkeypatch.setattr(device, "check_triton_cache", lambda: tmp_path)
    found = report()
    assert found["GPU in use"].level == "ok"
    assert found["GPU in use"].text.startswith("NVIDIA Test, compute capability 8.6, 3.0 GiB free of 24.0;")
    assert found["Triton cache"].text == str(tmp_path)


@pytest.mark.usefixtures("card")
def test_an_old_card_makes_serving_impossible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert check_env.run(argparse.Namespace()) == 1
    shown = capsys.readouterr().out
    assert "NVIDIA Test has compute capability 7.5, the kernels need 8.0 or newer" in shown
    assert "use device='cpu'" in shown and "Serving is impossible here: see GPU above." in shown


@pytest.mark.usefixtures("card")
def test_a_driver_that_does_not_fit_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    found = report()["GPU"]
    assert found.level == "missing"
    assert "made for CUDA 11.4" in found.text and "install driver 525.60 or newer" in found.text


@pytest.mark.usefixtures("card")
def test_a_card_out_of_use_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = report()["GPU"]
    assert found.level == "note"
    assert "is built without CUDA: install a CUDA build of it; until then models run on the CPU" in found.text
    monkeypatch.setattr(device, "card_present", lambda: False)
    assert report()["GPU"].text == "no NVIDIA card: models run on the CPU"


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "nowhere/gcc")
    found = report()["C compiler"]
    assert found.level == "note"
    assert found.text.startswith("CC='nowhere/gcc' is no program") and "apt-get install gcc" in found.text
    monkeypatch.setenv("CC", sys.executable)
    assert report()["C compiler"].text == sys.executable
