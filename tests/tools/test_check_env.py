"""`tritonmind check_env`: its exit code follows what is missing, and each finding has a remedy."""

from __future__ import annotations

import argparse
import sys

import pytest

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
