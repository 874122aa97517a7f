"""What a measurement was taken on: versions, processor or card, and the memory bandwidth it can reach."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

COPY_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}
COPY_ROUNDS = 8


def describe() -> dict[str, str]:
    """Versions and machine, for the head of a report."""
    import torch

    import tritonmind

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu_name()}, {os.cpu_count()} cores"
    return {
        "tritonmind": tritonmind.__version__,
        "commit": _commit(),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "transformers")},
    }


def copy_bandwidth(num_threads: int) -> float:
    """Bytes per second that a large copy reads and writes, on the GPU or with these CPU threads: the best of some."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads or threads_before)
    size = COPY_BYTES[device]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(COPY_ROUNDS):
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(threads_before)
    del source, target
    if device == "cuda":
        torch.cuda.empty_cache()
    return 2 * size / best


def _version(package: str) -> str:
    """Of an installed package; bench runs without either of those it asks for."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    directory = Path(__file__).resolve().parent
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "no checkout"
