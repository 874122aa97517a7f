"""The int8 KV cache's formulas and constants, for whoever calibrates, writes or reads one.

A value x is stored as the byte round((x - zero) / scale) + BIAS, ties to even, clamped to 0 .. 255, and read back as
(byte - BIAS) * scale + zero. K is quantised after its rotary embedding. Two sources of scales:

    calibrated (quant_policy 4): a scale and a zero of each of K and V for a whole layer, from what a calibration saw;
    per token (quant_policy 8): the scale is the largest |x| of a token's head over MAX_LEVEL, the zero is 0.

The arithmetic is in fp32. Triton's kernels repeat it; tests hold them to this page.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BIAS = 128
MAX_BYTE = 255
MAX_LEVEL = 127  # largest stored magnitude of symmetric scales
# Least scale: of values that are all alike, or all zero, which it gives back exactly.
MIN_SCALE = 1e-20


class LayerScales(NamedTuple):
    """Calibrated scales of a layer, in the order in which a workspace's tensors hold them."""

    k_scale: float
    k_zero: float
    v_scale: float
    v_zero: float


class TokenScales(NamedTuple):
    """Pools of scales of each token and head, [num_blocks, num_kv_heads, block_size] fp32 each."""

    k: torch.Tensor
    v: torch.Tensor


KVScales = LayerScales | TokenScales


def asymmetric_scale(minimum: torch.Tensor, maximum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero, fp32, that spread the bytes over [minimum, maximum]: scale = (max - min) / 255, zero the middle.

    The error is half a step at most, at both ends too.
    """
    minimum, maximum = minimum.float(), maximum.float()
    return ((maximum - minimum) / MAX_BYTE).clamp(min=MIN_SCALE), (maximum + minimum) / 2


def symmetric_scale(absmax: torch.Tensor) -> torch.Tensor:
    """The fp32 scale of values up to `absmax` in magnitude whose zero is 0: absmax / 127."""
    return (absmax.float() / MAX_LEVEL).clamp(min=MIN_SCALE)


def quantise(x: torch.Tensor, scale: torch.Tensor | float, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
    """The bytes of x, uint8 of its shape; scale and zero broadcast against it. NaN gives any byte."""
    return (((x.float() - zero) / scale).round() + BIAS).clamp(0, MAX_BYTE).to(torch.uint8)


def dequantise(stored: torch.Tensor, scale: torch.Tensor | float, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
    """What bytes stand for, fp32; scale and zero broadcast against them."""
    return (stored.float() - BIAS) * scale + zero


def quantise_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [..., D] and fp32 scales [...] of x [..., D], each row with its own scale."""
    scale = symmetric_scale(x.abs().amax(-1))
    return quantise(x, scale.unsqueeze(-1)), scale
