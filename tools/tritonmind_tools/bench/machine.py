"""What a measurement was taken on: versions, processor or card, and the bandwidth and arithmetic it can reach."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COMMIT_VARIABLE = "TRITONMIND_COMMIT"  # the commit, where the code runs outside a checkout
COPY_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}
COPY_ROUNDS = 8
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
MATMUL_ROUNDS = 8


def card() -> str:
    """The name of what computes."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu_name()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Of this package and what it stands on."""
    import torch

    import tritonmind

    return {
        "tritonmind": tritonmind.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "transformers")},
    }


def driver() -> str:
    """Version of the NVIDIA driver."""
    listed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.partition("\n")[0] or "none"


def commit() -> str:
    """Of the checkout that runs, else the value of TRITONMIND_COMMIT."""
    file = Path(__file__).resolve()
    git = ("git", "-C", str(file.parent))
    # Its own checkout: an environment may lie in one of something else.
    described = _output(*git, "ls-files", file.name) and _output(*git, "describe", "--always", "--dirty")
    return described or os.environ.get(COMMIT_VARIABLE) or "no checkout"


def copy_bandwidth(num_threads: int = 0) -> float:
    """Bytes per second that a large copy reads and writes, on the GPU or with these CPU threads: the best of some."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _threads(num_threads):
        source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        best = min(_seconds(functools.partial(target.copy_, source), COPY_ROUNDS))
    del source, target
    if device == "cuda":
        torch.cuda.empty_cache()
    return 2 * COPY_BYTES[device] / best


def matmul_rate(dtype: torch.dtype, num_threads: int = 0) -> float:
    """Floating-point operations per second of a large square matrix product: the median of some.

    The median, because a card that computes hard for longer than a moment lowers its clock.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = MATMUL_SIZE[device]
    with _threads(num_threads):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = statistics.median(_seconds(functools.partial(torch.mm, left, right), MATMUL_ROUNDS)[1:])
    del left, right
    if device == "cuda":
        torch.cuda.empty_cache()
    return 2 * size**3 / seconds


@contextlib.contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """So many threads of PyTorch's, 0 for as many as it has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    yield
    torch.set_num_threads(before)


def _seconds(run: Callable[[], object], num_rounds: int) -> list[float]:
    """Wall time of each round, the device's work included."""
    import torch

    seconds = []
    for _ in range(num_rounds):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def _output(*command: str) -> str:
    """What a command prints, nothing where it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


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
