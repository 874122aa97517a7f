"""What cases of `tritonmind bench kernels` are made of: the model and where it computes, a size, and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tritonmind_tools.bench.shapes import Shape

BLOCK_SIZE = 64
EPS = 1e-5
KV_SUFFIX = " kv8"  # of the names of kernels over an int8 KV cache


class Setting(NamedTuple):
    """The model and where it computes."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device


class Point(NamedTuple):
    """`num_seqs` sequences with `query_len` new tokens each, after which each has `context` tokens."""

    num_seqs: int
    query_len: int
    context: int

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.query_len

    def __str__(self) -> str:
        return f"B={self.num_seqs} L={self.context}" if self.query_len == 1 else f"{self.num_seqs}x{self.query_len}"


class Case(NamedTuple):
    """num_bytes: read and written at least, per call. make: new inputs, and the call on them."""

    num_bytes: float
    num_flops: float
    make: Callable[[], Callable[[], object]]


class Kernel(NamedTuple):
    """launcher: the name in tritonmind.kernels that a case measures."""

    name: str
    launcher: str
    decode: bool
    prefill: bool
    case: Callable[[Setting, Point], Case]

    @property
    def weight_precision(self) -> str | None:
        """Of a weight that is not in the type that is computed in."""
        return {"w4_linear": "w4", "w4_gate_up": "w4", "int8_linear": "w8"}.get(self.launcher)

    def can_run(self, setting: Setting) -> bool:
        """On a GPU weights of few bits are multiplied in 16; a CPU has none."""
        return self.weight_precision is None or setting.device.type == "cpu" or setting.dtype.itemsize == 2


def kv_precision(name: str) -> str:
    """What a kernel of this name adds to the name of a precision."""
    return "+kv8" if name.endswith(KV_SUFFIX) else ""


def random(setting: Setting, *size: int) -> torch.Tensor:
    """Normally distributed, of the setting's type."""
    return torch.randn(size, dtype=setting.dtype, device=setting.device)


def indices(setting: Setting, count: int) -> torch.Tensor:
    """0, 1, 2 ..., int32."""
    return torch.arange(count, dtype=torch.int32, device=setting.device)


def block_tables(setting: Setting, point: Point) -> torch.Tensor:
    """Pages in random order, as they are after a while of serving."""
    blocks_each = -(-point.context // BLOCK_SIZE)
    order = torch.randperm(point.num_seqs * blocks_each, device=setting.device)
    return order.to(torch.int32).view(point.num_seqs, blocks_each)


def context_lens(setting: Setting, point: Point) -> torch.Tensor:
    """Of each sequence, int32."""
    return torch.full((point.num_seqs,), point.context, dtype=torch.int32, device=setting.device)
