"""What the kernels that read and write int8 pages share: numbers into bytes and back, as kv_quant.py says."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import os
from typing import Any

import triton
import triton.language as tl

from tritonmind.kernels import kv_quant
from tritonmind.kernels.kv_quant import KVScales, LayerScales

BIAS = tl.constexpr(kv_quant.BIAS)
MAX_BYTE = tl.constexpr(kv_quant.MAX_BYTE)
MAX_LEVEL = tl.constexpr(kv_quant.MAX_LEVEL)
MIN_SCALE = tl.constexpr(kv_quant.MIN_SCALE)
# Added to a small fp32 number, it leaves no bits for a fraction: the sum is rounded to a whole number, ties to even.
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23


def use_asm() -> bool:
    """Whether kernels may hold assembly, which the interpreter does not understand."""
    return os.environ.get("TRITON_INTERPRET") != "1"


def kind_of(scales: KVScales | None) -> str | None:
    """What kernels call them: one a layer, or one a token and head."""
    if scales is None:
        return None
    return "layer" if isinstance(scales, LayerScales) else "token"


def scale_arguments(scales: KVScales | None) -> tuple[Any, Any, Any, Any]:
    """k_scale, v_scale, k_zero and v_zero as a kernel takes them: numbers of a layer, or pools and no zeros."""
    if isinstance(scales, LayerScales):
        return scales.k_scale, scales.v_scale, scales.k_zero, scales.v_zero
    return (None, None, None, None) if scales is None else (*scales, None, None)


@triton.jit
def quantise(x, per_step):
    """The bytes of x, whose zero is taken off, per_step being 1 / scale."""
    steps = tl.clamp(x * per_step, -(BIAS + 1.0), BIAS + 1.0)
    level = (steps + ROUNDER) - ROUNDER
    return tl.clamp(level + BIAS, 0.0, MAX_BYTE).to(tl.uint8)


@triton.jit
def dequantise(stored, scale, zero):
    """What bytes stand for, fp32."""
    return (stored.to(tl.float32) - BIAS) * scale + zero


@triton.jit
def unpack_pairs(x, dtype: tl.constexpr, ASM: tl.constexpr):
    """The low bytes of int16 numbers x, and the high ones, less BIAS each, as `dtype`, fp16 or fp32.

    In assembly a byte becomes the low half of an fp16 number whose high half is that of 1024, which gives 1024 + byte.
    """
    if ASM and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 k1024, k1152;
            mov.b32 k1024, 0x64646464;
            mov.b32 k1152, 0x64806480;
            prmt.b32 $0, $2, k1024, 0x4240;
            prmt.b32 $1, $2, k1024, 0x4341;
            sub.f16x2 $0, $0, k1152;
            sub.f16x2 $1, $1, k1152;
            }""",
            "=&r,=r,r",
            args=[x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = ((x & 0xFF).to(tl.float32) - BIAS).to(dtype)
        high = (((x >> 8) & 0xFF).to(tl.float32) - BIAS).to(dtype)
    return low, high
