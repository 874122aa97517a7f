"""A directory that is being written is there for its writer alone; what a killed writer left is removed by the next."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tritonmind.partial_directory import MIN_AGE_S, partial_directory

KILLED = """
import os, signal, sys
from pathlib import Path
from tritonmind.partial_directory import partial_directory

with partial_directory(Path(sys.argv[1]), sys.argv[2]) as path:
    (path / "weights").write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def aged(path: Path) -> Path:
    """As if it were written a while ago."""
    then = path.stat().st_mtime - 2 * MIN_AGE_S
    os.utime(path, (then, then))
    return path


def left_by_a_killed_process(parent: Path, name: str) -> Path:
    before = set(parent.iterdir())
    done = subprocess.run([sys.executable, "-c", KILLED, str(parent), name], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = set(parent.iterdir()) - before
    assert (left / "weights").is_file()
    return left


def test_it_is_removed_or_was_moved_into_place(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), partial_directory(tmp_path, "workspace") as path:
        (path / "weights").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "plain").mkdir()
    with partial_directory(tmp_path, "workspace") as path:
        assert path.parent == tmp_path and path.name.startswith(".workspace.")
        path.rename(tmp_path / "workspace")
    mode = (tmp_path / "plain").stat().st_mode
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {
        "plain": stat.S_IMODE(mode), "workspace": stat.S_IMODE(mode),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["workspace", "a[b]*"])
def test_what_a_killed_process_left_is_removed(name: str, tmp_path: Path) -> None:
    left = aged(left_by_a_killed_process(tmp_path, name))
    other = aged(left_by_a_killed_process(tmp_path, f"{name} of another model"))
    with partial_directory(tmp_path, name) as path:
        assert set(tmp_path.iterdir()) == {path, other}
    assert left not in tmp_path.iterdir()


def test_a_directory_in_use_or_just_made_is_left_alone(tmp_path: Path) -> None:
    young = left_by_a_killed_process(tmp_path, "workspace")
    with partial_directory(tmp_path, "workspace") as first:
        aged(first)
        with partial_directory(tmp_path, "workspace") as second:
            assert set(tmp_path.iterdir()) == {young, first, second}
