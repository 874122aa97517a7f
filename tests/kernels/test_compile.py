"""Every kernel compiles for A100, RTX 40 and H100 as its launchers ask, into code worth launching. Needs no GPU.

A case a kernel and architecture is compiled, with TRITONMIND_COMPILE=all each of them; by the installed Triton and,
where TRITONMIND_MEASURED_TRITON names the directory that holds it, by the one the figures were taken with. Each case
takes seconds, so where there are both, all of them are the latter's.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "backend" / "tritonmind" / "kernels"
# The release that docs/benchmarks was measured with; .ci/run installs it beside the other.
MEASURED_TRITON = "3.6.0"
MEASURED_TRITON_DIR = Path(directory).resolve() if (directory := os.environ.get("TRITONMIND_MEASURED_TRITON")) else None
MAX_SECONDS = 900
# Shared memory that a program may have, bytes.
MAX_SHARED = {(8, 0): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
MAX_REGISTERS = 64 << 10  # of all threads of a program
# What only Hopper has the instructions for.
HOPPER_KERNELS = {"_long_prefill_kernel", "_many_rows_kernel", "_w4_many_rows_kernel"}
# Kernels whose time goes into loops that must keep reading while they multiply.
PRODUCT_KERNELS = {
    "_decode_kernel",
    "_decode_int8_kernel",
    "_prefill_kernel",
    "_long_prefill_kernel",
    "_linear_kernel",
    "_gate_up_kernel",
    "_many_rows_kernel",
    "_w4_linear_kernel",
    "_w4_gate_up_kernel",
    "_w4_many_rows_kernel",
    "_int8_linear_kernel",
}
# Bytes that a thread may put aside outside of loops, once, which costs nothing that could be measured.
MAX_STACK = 16

pytestmark = pytest.mark.timeout(MAX_SECONDS)

Report = dict[str, Any]


def is_jit(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) in ("triton.jit", "gluon.jit")


@functools.cache
def kernels_on_disk() -> frozenset[str]:
    """Every jit function that is launched, read from the sources."""
    jitted, launched = set(), set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(map(is_jit, node.decorator_list)):
                jitted.add(node.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
    return frozenset(jitted & launched)


@functools.cache
def reports(directory: Path | None) -> list[Report]:
    """What compile_kernels.py says with the Triton in this directory, or the installed one.

    In a process of its own: this one's kernels are the interpreter's. It takes the cores that other tests leave.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    before = [] if directory is None else [str(directory)]
    environment["PYTHONPATH"] = os.pathsep.join([*before, str(ROOT / "backend"), str(ROOT)])
    one = os.environ.get("TRITONMIND_COMPILE", "one") == "one" or directory != MEASURED_TRITON_DIR
    command = ["nice", sys.executable, "-m", "tests.kernels.compile_kernels", *["--one"] * one]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=MAX_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(params=["installed", "measured"])
def compiled(request: pytest.FixtureRequest) -> list[Report]:
    """The reports of both releases of Triton."""
    if request.param == "installed":
        return reports(None)
    if MEASURED_TRITON_DIR is None:
        pytest.skip(f"TRITONMIND_MEASURED_TRITON names no directory with Triton {MEASURED_TRITON}")
    found = reports(MEASURED_TRITON_DIR)
    assert {report["triton"] for report in found} == {MEASURED_TRITON}
    return found


def title(report: Report) -> str:
    major, minor = report["capability"]
    settings = ", ".join(f"{name}={value}" for name, value in {**report["constants"], **report["options"]}.items())
    return f"{report['kernel']} ({report['case']}) for sm_{major}{minor} by Triton {report['triton']}: {settings}"


def complaints(report: Report) -> list[str]:
    """What is wrong with one kernel's code."""
    options, capability = report["options"], tuple(report["capability"])
    found = []
    if report["loop_spills"] or report["local"] or report["stack"] > MAX_STACK:
        found.append(f"spills: {report['stack']} bytes of stack, {report['loop_spills']} instructions in loops")
    threads = 32 * options["num_warps"]
    if report["registers"] * threads > MAX_REGISTERS:
        found.append(f"{report['registers']} registers for each of {threads} threads")
    if report["shared"] > MAX_SHARED[capability]:
        found.append(f"{report['shared']} bytes of shared memory, there are {MAX_SHARED[capability]}")
    if report["kernel"] in PRODUCT_KERNELS:
        found += product_complaints(report)
    early = options.get("launch_pdl", False)
    if early and capability < (9, 0):
        found.append("launched with PDL, which this architecture has not")
    if early != (report["waits"] > 0):
        found.append(f"launched {'with' if early else 'without'} PDL, waits {report['waits']} times")
    return found


def product_complaints(report: Report) -> list[str]:
    """What keeps a loop of matrix products from running at the speed of memory or of the tensor cores."""

    def has(opcodes: dict[str, int], *names: str) -> bool:
        return any(opcode.partition(".")[0] in names for opcode in opcodes)

    found = []
    if not report["product_loops"]:
        return ["no loop with products of the tensor cores"]
    for opcodes in report["product_loops"]:
        if not has(opcodes, "LDGSTS") and not report["bulk_loads"]:
            found.append("a loop whose reads do not go to shared memory ahead of their use")
        # Of 4-bit weights' scales, in tiles that are bound by arithmetic.
        in_groups = report["kernel"] == "_w4_many_rows_kernel"
        many_rows = in_groups or (report["kernel"].startswith("_w4_") and report["constants"]["BLOCK_M"] >= 128)
        if has(opcodes, "LDG") and not many_rows:
            found.append(f"a loop that waits for its reads: {[name for name in opcodes if name.startswith('LDG.')]}")
        # The weight is unpacked in registers, and multiplied with from there.
        if report["kernel"].startswith(("_w4_", "_int8_")) and has(opcodes, "STS"):
            found.append("a loop that writes to shared memory")
        if report["kernel"] == "_decode_int8_kernel" and (not has(opcodes, "PRMT") or has(opcodes, "I2F", "I2FP")):
            found.append("a loop that turns bytes into numbers one by one, not two by two with PRMT")
        is_prefill = report["kernel"].endswith("prefill_kernel")
        is_wide = report["kernel"].endswith("_many_rows_kernel") or (
            is_prefill and report["constants"]["BLOCK_M"] >= 64
        )
        if report["capability"] == [9, 0] and is_wide and not has(opcodes, "HGMMA"):
            found.append("a loop without the products of a group of warps (HGMMA)")
        if in_groups and 2 * opcodes.get("WARPGROUP.DEPBAR.LE", 0) > sum(
            count for opcode, count in opcodes.items() if opcode.startswith("HGMMA")
        ):
            found.append("a loop that unpacks nothing while it multiplies: each product is waited for")
    return found


USAGE = """
 Function kernel:
  REG:40 STACK:8 SHARED:0 LOCAL:0 TEXTURE:0
"""
LISTING = [
    ("0000", "STL", "[R1], R2"),
    ("0010", "LDG.E.128", "R4, desc[UR4][R2.64]"),
    ("0020", "LDGSTS.E.BYPASS.128", "[R9], desc[UR4][R2.64]"),
    ("0030", "HMMA.16816.F32", "R8, R4, R6, R8"),
    ("0040", "LDL.LU", "R3, [R1]"),
    ("0050", "BRA", "0x20"),
    ("0060", "EXIT", ""),
    ("0070", "BRA", "0x70"),
]


def test_code_is_read() -> None:
    from tests.kernels import sass

    code = sass.parse(USAGE, LISTING)
    assert (code.registers, code.stack, code.local, code.loop_spills, code.bulk_loads) == (40, 8, 0, 1, 0)
    body = {"LDGSTS.E.BYPASS.128": 1, "HMMA.16816.F32": 1, "LDL.LU": 1, "BRA": 1}
    assert code.product_loops == [body]
    # Without the loop: what lies between the products.
    unrolled = sass.parse(USAGE, [*LISTING[:5], ("0050", "HMMA.16816.F32", "R8, R4, R6, R8"), *LISTING[6:]])
    assert unrolled.product_loops == [{"HMMA.16816.F32": 2, "LDL.LU": 1}] and unrolled.loop_spills == 0


def test_instructions_are_found() -> None:
    from tests.kernels import sass

    lines = """
        /*0040*/                   STL [R1], R2 ;
        /*0050*/              @!P0 HMMA.16816.F32 R8, R4, R6, R8 ;
        /*12340*/              @P1 BRA 0x20 ;
        /*12350*/                  EXIT ;
"""
    assert sass.instructions(lines) == [
        ("0040", "STL", "[R1], R2"),
        ("0050", "HMMA.16816.F32", "R8, R4, R6, R8"),
        ("12340", "BRA", "0x20"),
        ("12350", "EXIT", ""),
    ]


def test_kernels_compile_into_good_code(compiled: list[Report]) -> None:
    bad = [f"{title(report)}: {'; '.join(found)}" for report in compiled if (found := complaints(report))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("capability", MAX_SHARED)
def test_every_kernel_is_compiled(compiled: list[Report], capability: tuple[int, int]) -> None:
    """A new kernel wants a case in compile_cases.py; a jit function that is launched is called something_kernel."""
    assert all(name.endswith("_kernel") for name in kernels_on_disk())
    expected = kernels_on_disk() if capability[0] == 9 else kernels_on_disk() - HOPPER_KERNELS
    assert {report["kernel"] for report in compiled if tuple(report["capability"]) == capability} == expected
