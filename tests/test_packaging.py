"""What the wheel holds: each package of both roots, and the files that convert and serve need beside the code."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from tritonmind import __version__
from tritonmind.resources import SHARE

ROOT = Path(__file__).resolve().parent.parent
ROOTS = {"tritonmind": ROOT / "backend" / "tritonmind", "tritonmind_tools": ROOT / "tools" / "tritonmind_tools"}
SHIPPED = (
    "service_docker_up.sh",
    "backend/model.py",
    "model_repository/tritonmind/config.pbtxt",
    "model_repository/tritonmind/1/weights/config.ini",
)


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def packages_on_disk() -> set[str]:
    found = set()
    for name, folder in ROOTS.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join((name, *init.parent.relative_to(folder).parts)))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources: setuptools leaves build/ and *.egg-info beside what it builds."""
    source = tmp_path_factory.mktemp("source") / "tritonmind"
    source.mkdir()
    for name in ("backend", "tools", "model_repository"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "service_docker_up.sh"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next((source / "dist").glob("tritonmind-*.whl")))


def test_package_list_is_complete() -> None:
    listed = setup_cfg()["options"]["packages"].split()
    assert set(listed) == packages_on_disk()
    assert len(listed) == len(set(listed))


def test_every_folder_with_code_is_a_package() -> None:
    for folder in ROOTS.values():
        for module in folder.rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), f"{module.parent} holds code but no __init__.py"


def test_data_files_exist_and_are_all_of_the_template() -> None:
    listed = setup_cfg()["options.data_files"]
    files = {(PurePosixPath(folder) / Path(line).name, line) for folder in listed for line in listed[folder].split()}
    assert {str(target.relative_to(SHARE)) for target, _ in files} == set(SHIPPED)
    for target, source in files:
        assert str(target.relative_to(SHARE)) == source
        assert (ROOT / source).is_file(), source
    template = {str(path.relative_to(ROOT)) for path in (ROOT / "model_repository").rglob("*") if path.is_file()}
    assert template <= set(SHIPPED)


def test_wheel_holds_each_module(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package, folder in ROOTS.items():
        for module in folder.rglob("*.py"):
            assert f"{package}/{module.relative_to(folder).as_posix()}" in names


def test_wheel_holds_data_and_command_but_no_top_level_model(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for name in SHIPPED:
        shipped = f"tritonmind-{__version__}.data/data/{SHARE / name}"
        assert wheel.read(shipped) == (ROOT / name).read_bytes()
    assert "model.py" not in names  # it would shadow the model.py of every Python-based backend
    entry_points = wheel.read(f"tritonmind-{__version__}.dist-info/entry_points.txt").decode()
    assert "tritonmind = tritonmind_tools.cli:main" in entry_points
    assert f"tritonmind-{__version__}.dist-info/licenses/LICENSE" in names


def test_changelog_knows_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
