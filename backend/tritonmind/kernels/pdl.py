"""Programmatic dependent launch (PDL): a kernel starts while the one before it still runs, and waits where it must.

A launch with PDL overlaps its start with the end of the kernel before. Every kernel of such a chain calls `wait` before
it reads or writes anything that another kernel may have written or still read, and `let_next_start` as soon as all of
its programs may share the card with the next kernel's. One kernel without `wait` would break the chain: the kernel
after it could start before what lies two kernels back has ended. What is launched without PDL, as kernels of libraries
are, starts when all before it has ended.

Weights are read before `wait`: they were written while the model was loaded, by kernels that ended before any of a
step's began.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

VARIABLE = "TRITONMIND_PDL"
FIRST_CAPABILITY = (9, 0)


@functools.cache
def use_pdl(device: torch.device) -> bool:
    """Whether kernels on `device` are launched with PDL: on cards that have it, unless TRITONMIND_PDL=0."""
    wanted = os.environ.get(VARIABLE, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={wanted!r} must be 0 (off) or 1 (on where the card has it)")
    return wanted == "1" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernel before has ended, and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Once every program has come here or ended, the next kernel's programs may start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
