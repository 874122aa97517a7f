"""What tests of the W4A16 kernels share: weights with all levels, and an interpreter that can run their PTX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.kernels.kernel_cases import Target
from tritonmind.kernels.awq_format import AwqWeight, dequantize, pack_nibbles
from tritonmind.kernels.w4_layout import PackedWeight, pack


class Weight(NamedTuple):
    """dense: [n, k] fp32, what it stands for, gate before up."""

    packed: PackedWeight
    dense: torch.Tensor


def random_awq(n: int, k: int, group_size: int, device: str = "cpu") -> AwqWeight:
    """Levels and zero points from 0 to 15, scales that differ by up to four times, values of about k^-0.5."""
    levels, zeros = (torch.randint(16, (rows, n), device=device) for rows in (k, k // group_size))
    scales = (0.05 + 0.15 * torch.rand(k // group_size, n, device=device)) / k**0.5
    return AwqWeight(pack_nibbles(levels), pack_nibbles(zeros), scales.half())


def random_weight(n: int, k: int, group_size: int, target: Target, *, gated: bool = False) -> Weight:
    parts = [random_awq(n, k, group_size, target.device) for _ in range(2 if gated else 1)]
    return Weight(pack(parts, target.dtype), torch.cat([dequantize(part) for part in parts]))


def _halves(words: np.ndarray) -> np.ndarray:
    """[..] 32-bit words as [.., 2] fp32 of the fp16 in them."""
    return np.ascontiguousarray(words.astype(np.uint32)).view(np.float16).reshape(*words.shape, 2).astype(np.float32)


def run_ptx(text: str, words: np.ndarray, params: np.ndarray | None = None) -> np.ndarray:
    """What the fp16 texts of triton_w4_linear.py and triton_int8_linear.py compute, rounded as on a card: [.., 2]."""
    if params is None:
        selector = int(text.partition("prmt.b32 t, $2, 0x64646464, ")[2][:6], 16)
        own = [words.astype(np.uint32) >> (8 * place) & 0xFF for place in range(4)]
        sources = np.stack([*own, np.full_like(own[0], 0x64)], -1)
        picked = [sources[..., selector >> (4 * place) & 15].astype(np.uint32) for place in range(4)]
        return (_halves(sum(byte << (8 * place) for place, byte in enumerate(picked))) - 1152).astype(np.float16)
    is_high = "0x00f000f0" in text
    mask = np.uint32(0x00F000F0 if is_high else 0x000F000F)
    value = _halves((words.astype(np.uint32) & mask) | np.uint32(0x64006400))
    half = _halves(params)
    zero = half[..., 1:]
    if is_high:
        zero = (zero + np.float32(960)).astype(np.float16).astype(np.float32)
        value = value * np.float32(1 / 16)
    value = (value + zero).astype(np.float16)
    return (value * half[..., :1].astype(np.float16)).astype(np.float16) if "mul.rn.f16x2" in text else value


@pytest.fixture
def emulated_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter run the kernels as a card would, PTX and all."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from tritonmind.kernels import triton_w4_linear

    class Results(NamedTuple):
        value: np.ndarray

        def get_result(self, index: int) -> TensorHandle:
            return TensorHandle(np.ascontiguousarray(self.value[..., index]), tl.float16)

    def create(self: Any, text: str, constraints: str, values: list[Any], *_: object) -> Results:
        return Results(run_ptx(text, *(value.data for value in values)))

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create, raising=False)
    uses_asm: Callable[[], bool] = lambda: True  # noqa: E731
    monkeypatch.setattr(triton_w4_linear, "uses_asm", uses_asm)
