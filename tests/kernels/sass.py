"""What a compiled kernel is made of, read from its machine code by the disassembler in Triton's wheel."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+?)(?:\s+(.*?))?\s*;", re.M)
_INSTRUCTION_BYTES = 16
_EXECUTABLE = 4  # ELF's SHF_EXECINSTR
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
# The tensor cores' instructions: a warp's, and a warp group's.
MATRIX_PRODUCTS = ("HMMA", "HGMMA")
# To and from local memory.
SPILLS = ("STL", "LDL")

Instruction = tuple[str, str, str]  # address in hexadecimal, opcode, operands


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


def read_all(cubins: list[bytes], capability: tuple[int, int]) -> list[Code]:
    """Take kernels of an architecture apart, one a cubin.

    All in one run of the disassembler, which needs half a second for itself whatever it is given.
    """
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "code"

        def run(tool: str, *options: str, content: bytes) -> str:
            path.write_bytes(content)
            return subprocess.run([tools / tool, *options, path], capture_output=True, text=True, check=True).stdout

        resources = [run("cuobjdump", "-res-usage", content=cubin) for cubin in cubins]
        codes = [machine_code(cubin) for cubin in cubins]
        architecture = "SM{}{}".format(*capability)
        listing = run("nvdisasm", "-ndf", "-b", architecture, content=b"".join(codes))
    every = instructions(listing)
    assert len(every) * _INSTRUCTION_BYTES == sum(map(len, codes)), f"not each instruction in {listing[:500]!r}"
    rest = iter(every)
    bodies = [list(itertools.islice(rest, len(code) // _INSTRUCTION_BYTES)) for code in codes]
    return [parse(usage, body) for usage, body in zip(resources, bodies, strict=True)]


def instructions(listing: str) -> list[Instruction]:
    """What `nvdisasm` has printed."""
    return _INSTRUCTION.findall(listing)


def machine_code(cubin: bytes) -> bytes:
    """The one section of an ELF file of 64 bits that is executable."""
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + index * size) for index in range(count)]
    (code,) = (cubin[begin : begin + length] for _, _, flags, _, begin, length in headers if flags & _EXECUTABLE)
    return code


def parse(usage: str, listing: list[Instruction]) -> Code:
    """usage: what `cuobjdump -res-usage` says."""
    resources = _RESOURCES.search(usage)
    assert resources, f"no resources in {usage[:500]!r}"
    code = [(int(address, 16), opcode, operands) for address, opcode, operands in listing]
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
