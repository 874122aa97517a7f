"""Which implementation a launcher runs, and the argument checks that all launchers share.

CUDA tensors run the Triton kernel, CPU tensors the torch twin. Triton is imported only when a kernel runs, so a CPU
installation needs none. Tests run the kernels on CPU tensors inside `force_triton()`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tritonmind.kernels.kv_quant import KVScales, TokenScales

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)
MIN_TILE = 16

_forced = False


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on `tensor` runs the Triton kernel (else the torch twin)."""
    return tensor.is_cuda or _forced


@contextmanager
def force_triton() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors too. Needs the interpreter, chosen by TRITON_INTERPRET=1 at start.

    bf16 is not for the interpreter: its arithmetic there is silently wrong.
    """
    global _forced
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("force_triton needs TRITON_INTERPRET=1 in the environment before Python starts")
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Raise ValueError unless `tensor` is contiguous and has this shape, (one of) this dtype and this device."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    check_dtype(name, tensor, dtype)
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} with strides {tensor.stride()} is not contiguous; call .contiguous()")


def check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype | Sequence[torch.dtype]) -> None:
    """Raise ValueError unless the dtype of `tensor` is (one of) `dtype`."""
    if tensor.dtype is dtype:
        return
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, allowed))}")


def check_values_or_partial_sums(
    name: str, tensor: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError unless `tensor` is [*shape] of this dtype, or [S, *shape] fp32: partial sums of such values."""
    if tensor.dim() == 3 and tensor.shape[0]:
        check_tensor(name, tensor, (tensor.shape[0], *shape), torch.float32, device)
    else:
        check_tensor(name, tensor, shape, dtype, device)


def check_ndim(name: str, tensor: torch.Tensor, ndim: int) -> None:
    """Raise ValueError unless `tensor` has `ndim` dimensions."""
    if tensor.dim() != ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {ndim} dimensions")


def check_kv_pools(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    scales: KVScales | None = None,
) -> None:
    """Raise ValueError unless both are pools [num_blocks, num_kv_heads, block_size, head_dim] of one shape.

    They are of `dtype`, or of bytes where there are scales, whose pools must have the same sizes without head_dim.
    block_size is a power of two, and at least 16 for the Triton kernels, whose tiles are pages.
    """
    check_ndim("k_cache", k_cache, 4)
    shape = tuple(k_cache.shape)
    stored = dtype if scales is None else torch.uint8
    check_tensor("k_cache", k_cache, shape, stored, device)
    check_tensor("v_cache", v_cache, shape, stored, device)
    if isinstance(scales, TokenScales):
        check_tensor("scales.k", scales.k, shape[:3], torch.float32, device)
        check_tensor("scales.v", scales.v, shape[:3], torch.float32, device)
    block_size = shape[2]
    if block_size & (block_size - 1) or (block_size < MIN_TILE and use_triton(k_cache)):
        raise ValueError(f"k_cache has block_size {block_size}, expected a power of two, on a GPU at least {MIN_TILE}")


def check_block_tables(tensor: torch.Tensor, num_seqs: int, device: torch.device) -> None:
    """Raise ValueError unless `tensor` is int32 [num_seqs, max_blocks] with adjacent columns; rows may be strided."""
    check_ndim("block_tables", tensor, 2)
    if tensor.shape[0] != num_seqs:
        raise ValueError(f"block_tables has {tensor.shape[0]} rows, expected {num_seqs}, one a sequence")
    check_dtype("block_tables", tensor, torch.int32)
    if tensor.device != device:
        raise ValueError(f"block_tables is on {tensor.device}, expected {device}")
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ValueError(f"block_tables has strides {tensor.stride()}, expected a last stride of 1")
