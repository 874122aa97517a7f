"""What a compiled kernel is made of, read from its machine code by the disassembler in Triton's wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+?)(?:\s+(.*?))?\s*;", re.M)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
# The tensor cores' instructions: a warp's, and a warp group's.
MATRIX_PRODUCTS = ("HMMA", "HGMMA")
# To and from local memory.
SPILLS = ("STL", "LDL")


class Code(NamedTuple):
    """registers: a thread. stack, local: bytes a thread, where registers were too few.

    loop_spills: instructions of loops that go there. product_loops: for each innermost loop with matrix products, how
    often it has each instruction, with its suffixes; where loops are unrolled, what lies between the first product and
    the last. bulk_loads: fetches of whole tiles (TMA), by any warp.
    """

    registers: int
    stack: int
    local: int
    loop_spills: int
    product_loops: list[Counter[str]]
    bulk_loads: int


def read(cubin: bytes) -> Code:
    """Take a kernel apart."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-sass", "-res-usage", file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse(run.stdout + run.stderr)


def parse(text: str) -> Code:
    """What `cuobjdump -sass -res-usage` says."""
    resources = _RESOURCES.search(text)
    assert resources, f"no resources in {text[:500]!r}"
    code = [(int(address, 16), opcode, operands) for address, opcode, operands in _INSTRUCTION.findall(text)]
    assert code, f"no instructions in {text[:500]!r}"
    loops = []
    for address, opcode, operands in code:
        target = _TARGET.search(operands) if opcode.startswith("BRA") else None
        # What jumps to itself stands behind the code and is never reached.
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    innermost = [
        loop
        for loop in loops
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]
    products = [address for address, opcode, _ in code if opcode.partition(".")[0] in MATRIX_PRODUCTS]
    bodies = [(low, high) for low, high in innermost if any(low <= address <= high for address in products)]
    if products and not bodies:
        bodies = [(products[0], products[-1])]
    spills = [address for address, opcode, _ in code if opcode.partition(".")[0] in SPILLS]
    return Code(
        *map(int, resources.groups()),
        sum(any(low <= address <= high for low, high in loops) for address in spills),
        [Counter(opcode for address, opcode, _ in code if low <= address <= high) for low, high in bodies],
        sum(opcode.startswith("UTMALDG") for _, opcode, _ in code),
    )
