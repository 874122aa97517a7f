"""What the Gluon kernels for Hopper share: names that differ between releases of Triton, and tiles that TMA moves."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

GROUP_WARPS = 4
# Registers of a thread: two multiplying groups need many, the fetching warp leaves them its own.
GROUP_REGISTERS = gl.constexpr(240)
FETCH_REGISTERS = gl.constexpr(24)

# Their names in Triton up to 3.6, and after.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
fetch_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def store(out_desc, out_tile, values, row, column):
    """Have `values` stored from this group's memory for them."""
    # What was stored from there before must have left it.
    tma.store_wait(0)
    barrier()
    out_tile.store(values.to(out_desc.dtype))
    fence_async_shared()
    barrier()
    store_tile(out_desc, [row, column], out_tile)


@functools.cache
def tile_sizes(rows: int, columns: int, dtype: torch.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    """Size of the tiles that a tensor of 2-byte elements is moved in, and their layout in shared memory."""
    size = [rows, columns]
    return size, gl.NVMMASharedLayout.get_default_for(size, gl.float16 if dtype == torch.float16 else gl.bfloat16)
