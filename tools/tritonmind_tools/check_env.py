"""`tritonmind check_env`: what this machine has for serving, what is missing and how to get it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tritonmind import __version__
from tritonmind.errors import TritonmindError
from tritonmind_tools.embedded_server import (
    DEFAULT_ADDRESS,
    DEFAULT_GRPC_PORT,
    DEFAULT_HTTP_PORT,
    DEFAULT_METRICS_PORT,
)
from tritonmind_tools.ports import ensure_port_free
from tritonmind_tools.server_install import check_numpy, find_libpython, find_server

Level = Literal["ok", "note", "missing"]
MIN_FREE_MEMORY_GIB = 2.0
MIN_SHARED_MEMORY_MIB = 64


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    "missing" means that serving is impossible (for a GPU: unless device='cpu' is asked for), "note" that something is
    limited.
    """

    level: Level
    topic: str
    text: str


def findings() -> Iterator[Finding]:
    """Everything that is checked, in the order of the report."""
    yield Finding("ok", "tritonmind", f"{__version__}, Python {platform.python_version()} ({sys.executable})")
    yield from _package("torch", required=True, remedy="pip install torch")
    yield from _package("triton", required=False, remedy="pip install triton, needed on a GPU only")
    yield from _package(
        "transformers", required=False, remedy="pip install 'tritonmind[gguf]', needed to convert a .gguf file"
    )
    yield from _package("tritonclient", required=True, remedy="pip install 'tritonmind[serve]'")
    yield _attempt("numpy", lambda: _version("numpy"), check_numpy)
    yield _attempt("libpython", lambda: str(find_libpython()))
    yield _attempt("server", lambda: f"{find_server().executable}, nvidia-pytriton {_version('nvidia-pytriton')}")
    yield from _gpu()
    yield _memory()
    yield _shared_memory()
    for name, port in (("gRPC", DEFAULT_GRPC_PORT), ("HTTP", DEFAULT_HTTP_PORT), ("metrics", DEFAULT_METRICS_PORT)):
        yield _port(name, port)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _package(name: str, *, required: bool, remedy: str) -> Iterator[Finding]:
    try:
        yield Finding("ok", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        yield Finding("missing" if required else "note", name, f"not installed: {remedy}")


def _attempt(topic: str, describe: Callable[[], str], check: Callable[[], None] = lambda: None) -> Finding:
    try:
        check()
        return Finding("ok", topic, describe())
    except TritonmindError as error:
        return Finding("missing", topic, str(error))


def _gpu() -> Iterator[Finding]:
    """Cards, and whether the engine could use the one that it would take. Loads torch and runs a first kernel."""
    cpus = len(os.sched_getaffinity(0))
    yield Finding("ok", "CPU", f"{cpus} cores, {platform.machine()}")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        answer = ""
    for line in answer.strip().splitlines():
        yield Finding("ok", "GPU", f"{line} (name, memory, driver)")
    try:
        import torch

        from tritonmind.engine import device
    except ImportError:
        return
    if not device.card_present():
        yield Finding("note", "GPU", "no NVIDIA card: models run on the CPU")
    elif torch.version.cuda is None:
        yield Finding("note", "GPU", f"{device.cuda_problem()}; until then models run on the CPU")
    else:
        yield from _usable_gpu()
    yield _compiler(device.find_compiler())


def _usable_gpu() -> Iterator[Finding]:
    import torch

    from tritonmind.engine.device import check_device, check_triton_cache, cuda_problem, resolve_device

    try:
        chosen = resolve_device("auto")
        if chosen.type == "cpu":
            yield Finding("note", "GPU", f"{cuda_problem()}; until then models run on the CPU")
            return
        check_device(chosen)
        cache = check_triton_cache()
    except TritonmindError as error:
        yield Finding("missing", "GPU", str(error))
        return
    free, total = torch.cuda.mem_get_info(chosen)
    major, minor = torch.cuda.get_device_capability(chosen)
    yield Finding(
        "ok",
        "GPU in use",
        f"{torch.cuda.get_device_name(chosen)}, compute capability {major}.{minor}, {free / 2**30:.1f} GiB free of "
        f"{total / 2**30:.1f}; a first kernel ran",
    )
    yield Finding("ok", "Triton cache", str(cache))


def _compiler(found: str | None) -> Finding:
    if found is not None:
        return Finding("ok", "C compiler", found)
    chosen = os.environ.get("CC")
    problem = "none" if chosen is None else f"CC={chosen!r} is no program that can be run"
    return Finding(
        "note",
        "C compiler",
        f"{problem}: Triton needs one on a GPU (apt-get install gcc, or set CC to the path of one)",
    )


def _memory() -> Finding:
    with open("/proc/meminfo") as lines:
        amounts = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in lines}  # GiB
    text = f"{amounts['MemAvailable']:.1f} GiB available of {amounts['MemTotal']:.1f}"
    if amounts["MemAvailable"] < MIN_FREE_MEMORY_GIB:
        return Finding(
            "note", "memory", f"{text}: the demo model wants {MIN_FREE_MEMORY_GIB:g} GiB; close other programs"
        )
    return Finding("ok", "memory", text)


def _shared_memory() -> Finding:
    try:
        status = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding(
            "missing", "/dev/shm", f"{error.strerror}: the server passes tensors through it; mount a tmpfs there"
        )
    free = status.f_bavail * status.f_frsize / 2**20
    if free < MIN_SHARED_MEMORY_MIB:
        return Finding(
            "missing",
            "/dev/shm",
            f"{free:.0f} MiB free, {MIN_SHARED_MEMORY_MIB} needed: remove leftovers or enlarge it",
        )
    return Finding("ok", "/dev/shm", f"{free:.0f} MiB free")


def _port(name: str, port: int) -> Finding:
    try:
        ensure_port_free(DEFAULT_ADDRESS, port, f"--{name.lower()}-port" if name == "gRPC" else f"--{name.lower()}")
    except TritonmindError as error:
        return Finding("note", f"{name} port", str(error))
    return Finding("ok", f"{name} port", f"{port} is free")


def register(subparsers: Any) -> None:
    """Add `check_env` to the subparsers of `tritonmind`."""
    parser = subparsers.add_parser(
        "check_env",
        help="show what this machine has for serving and what is missing",
        description="Show versions, devices, memory and ports. Exit code 1 when serving is impossible here.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 1 when something that serving needs is missing."""
    report = list(findings())
    width = max(len(finding.topic) for finding in report)
    for finding in report:
        print(f"{finding.level:7}  {finding.topic:{width}}  {finding.text}")
    missing = [finding.topic for finding in report if finding.level == "missing"]
    if missing:
        print(f"\nServing is impossible here: see {', '.join(missing)} above.")
        return 1
    print("\nThis machine can serve.")
    return 0
