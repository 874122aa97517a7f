"""What the Gluon kernels for Hopper share: names that differ between releases of Triton, and tiles that TMA moves."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GROUP_WARPS = 4
ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.int32: gl.int32}
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


def descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix that is moved in tiles of [rows, columns]; it and its rows begin at multiples of 16 bytes.

    What TensorDescriptor.from_tensor gives, whose checks of each tensor take the host longer than the launch.
    """
    found = object.__new__(TensorDescriptor)
    tile = _tile(rows, columns, tensor.dtype)
    found.__dict__ = {**tile, "base": tensor, "shape": tensor.shape, "strides": tensor.stride()}
    return found


@functools.cache
def _tile(rows: int, columns: int, dtype: torch.dtype) -> dict[str, object]:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], ELEMENTS[dtype])
    return vars(TensorDescriptor.from_tensor(torch.empty(rows, columns, dtype=dtype), [rows, columns], layout))
