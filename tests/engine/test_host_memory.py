"""Memory that a host or its container has left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tritonmind.engine import host_memory

LIMIT, USAGE, FILES = 8 << 30, 7 << 30, 3 << 30


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_mem_available", lambda: 64 << 30)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_pages_of_files_are_not_in_the_way(tmp_path: Path) -> None:
    stat = f"anon 5\ninactive_file {FILES - 100}\nactive_file 100\nslab 7\n"
    root = write(tmp_path, {"memory.max": f"{LIMIT}\n", "memory.current": f"{USAGE}\n", "memory.stat": stat})
    assert host_memory.available_bytes(root) == LIMIT - USAGE + FILES


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    stat = f"cache 9\ninactive_file 1\ntotal_inactive_file {FILES}\ntotal_active_file 0\n"
    names = ("limit_in_bytes", "usage_in_bytes", "stat")
    texts = (str(LIMIT), str(USAGE), stat)
    root = write(tmp_path, {f"memory/memory.{name}": text for name, text in zip(names, texts, strict=True)})
    assert host_memory.available_bytes(root) == LIMIT - USAGE + FILES


def test_no_limit_and_a_limit_above_the_host(tmp_path: Path) -> None:
    assert host_memory.available_bytes(tmp_path) == 64 << 30
    root = write(tmp_path, {"memory.max": "max\n", "memory.current": "5\n"})
    assert host_memory.available_bytes(root) == 64 << 30
    write(tmp_path, {"memory.max": str(1 << 50)})
    assert host_memory.available_bytes(root) == 64 << 30


def test_a_container_that_is_full(tmp_path: Path) -> None:
    root = write(tmp_path, {"memory.max": "100", "memory.current": "130", "memory.stat": "active_file 10\n"})
    assert host_memory.available_bytes(root) == 0
