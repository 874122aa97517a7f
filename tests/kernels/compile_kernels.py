"""Compile the kernels for cards that are not there, with what their launchers pass, and say what came out.

Run as a program, without TRITON_INTERPRET: prints one JSON object a line. test_compile.py reads them. With --one each
kernel is compiled once an architecture, for the first of its cases in compile_cases.py; else for all of them.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, mangle_type

from tests.kernels import sass
from tests.kernels.compile_cases import cases, target_cards
from tritonmind import kernels
from tritonmind.kernels import pdl, tuning
from tritonmind.kernels.tile_table import Card


class Job(NamedTuple):
    """One compilation. options: num_warps and the like."""

    kernel: str
    case: str
    source: ASTSource
    constants: dict[str, Any]
    options: dict[str, Any]


class Recorder:
    """Stands in for the kernels of a module: a launch is written down instead."""

    def __init__(self) -> None:
        self.case = ""
        self.jobs: dict[str, Job] = {}

    def replace(self, module: ModuleType, name: str) -> None:
        setattr(module, name, _Launchable(getattr(module, name), self.add))

    def add(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = {param.name for param in kernel.params}
        options = {name: value for name, value in kwargs.items() if name not in names}
        constexprs = {name: value for name, value in kwargs.items() if name in names}
        source = source_of(kernel, inspect.signature(kernel.fn).bind(*args, **constexprs).arguments)
        name = kernel.fn.__name__
        # Cases differ in what reaches some kernels only.
        same = f"{name} {source.signature} {source.constants} {source.attrs} {options}"
        constants = {kernel.arg_names[index]: value for (index,), value in source.constants.items()}
        self.jobs.setdefault(same, Job(name, self.case, source, constants, options))


class _Launchable(NamedTuple):
    kernel: JITFunction
    add: Callable[[JITFunction, tuple[Any, ...], dict[str, Any]], None]

    def __getitem__(self, grid: Any) -> Callable[..., None]:  # type: ignore[override]
        return lambda *args, **kwargs: self.add(self.kernel, args, kwargs)


def source_of(kernel: JITFunction, values: dict[str, Any]) -> ASTSource:
    """What Triton would compile for these arguments, whose tensors begin at multiples of 16 bytes."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[param.name] = "constexpr"
            constants[param.name] = value
            continue
        signature[param.name] = mangle_type(value)
        if isinstance(value, torch.Tensor):
            is_aligned = not param.do_not_specialize_on_alignment
        else:
            is_aligned = special and type(value) is int and value % 16 == 0
        if is_aligned:
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)


def record(card: Card) -> list[Job]:
    """What the launchers would compile on `card`, the first case of each kernel in front of its others."""
    tuning.card = lambda device: card
    tuning.tile.cache_clear()
    for module in _modules():
        if hasattr(module, "use_pdl"):
            module.use_pdl = lambda device: card.capability >= pdl.FIRST_CAPABILITY
    recorder.jobs = {}
    for label, launch in cases(card):
        recorder.case = label
        launch()
    return list(recorder.jobs.values())


def _modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
    return [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]


def compile_one(index: int) -> tuple[dict[str, Any], bytes]:
    """Compile work[index]. Returns what to say about it, and its cubin."""
    card, job = work[index]
    major, minor = card.capability
    compiled = triton.compile(job.source, target=GPUTarget("cuda", 10 * major + minor, 32), options=job.options)
    report = {
        "kernel": job.kernel,
        "case": job.case,
        "capability": card.capability,
        "triton": triton.__version__,
        "constants": job.constants,
        "options": job.options,
        "shared": compiled.metadata.shared,
        "waits": compiled.asm["ptx"].count("griddepcontrol.wait"),
    }
    return report, compiled.asm["cubin"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", action="store_true", help="one case a kernel")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    args = parser.parse_args()
    for card in target_cards():
        seen = set()
        for job in record(card):
            if not (args.one and job.kernel in seen):
                work.append((card, job))
            seen.add(job.kernel)
    compiled: dict[tuple[int, int], list[tuple[dict[str, Any], bytes]]] = {}
    # Forked, because jit functions cannot be sent to a process; the long ones first.
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        for report, cubin in pool.imap_unordered(compile_one, range(len(work))):
            compiled.setdefault(report["capability"], []).append((report, cubin))
    for capability, found in compiled.items():
        for (report, _), code in zip(found, sass.read_all([cubin for _, cubin in found], capability), strict=True):
            print(json.dumps({**report, **code._asdict()}))


work: list[tuple[Card, Job]] = []
recorder = Recorder()
for _module in _modules():
    for _name, _value in list(vars(_module).items()):
        if isinstance(_value, JITFunction) and _name.endswith("_kernel") and _value.__module__ == _module.__name__:
            recorder.replace(_module, _name)

if __name__ == "__main__":
    sys.exit(main())
