"""`tritonmind check_env`: what this machine has for serving, what is missing and how to get it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
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
    """One line of the report. "missing" means that serving is impossible; "note" that something is limited."""

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
    yield _compiler()
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
    cpus = len(os.sched_getaffinity(0))
    yield Finding("ok", "CPU", f"{cpus} cores, {platform.machine()}")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        yield Finding("note", "GPU", "none answers to nvidia-smi: models run on the CPU")
        return
    for line in answer.strip().splitlines():
        yield Finding("ok", "GPU", f"{line} (name, memory, driver)")
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        yield Finding(
            "note", "GPU", f"PyTorch {torch.__version__} cannot use it: install a CUDA build that this driver supports"
        )


def _compiler() -> Finding:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return Finding("ok", "C compiler", found)
    return Finding(
        "note", "C compiler", "none: kernels in Triton need one on a GPU (Debian, Ubuntu: apt-get install gcc)"
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
