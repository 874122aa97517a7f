"""How much memory this process may still take on a host, containers included."""

from __future__ import annotations

from pathlib import Path

# Limit, usage, statistics, and what of the usage the kernel gives back when memory runs short: pages of files.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),  # v2
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),  # v1
)


def available_bytes(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """The kernel's MemAvailable, or what the container's limit leaves, whichever is less."""
    available = _mem_available()
    for limit_file, usage_file, stat_file, reclaimable in _CGROUPS:
        limit, usage = _read_int(cgroup_root / limit_file), _read_int(cgroup_root / usage_file)
        if limit is not None and usage is not None:
            files = _read_stat(cgroup_root / stat_file)
            used = usage - sum(files.get(name, 0) for name in reclaimable)
            available = min(available, max(0, limit - used))
    return available


def _mem_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line")


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" means no limit


def _read_stat(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
