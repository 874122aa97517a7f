"""An 8-bit weight, W[n, k] = level * scale[n], and how the kernel of int8_linear.py holds it.

Levels are -127 to 127, symmetric around 0. Words: int32 [N / 32, K / 64, 32, 16], blocks of 32 rows (output features)
by 64 of K, filled up with zeros. Word i of a row has the levels of k = 2 i, 2 i + 1, 32 + 2 i and 33 + 2 i, each a byte
and 128 more than it is: two bytes side by side are neighbours along K, a register of the tensor cores' left operand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from tritonmind.kernels.dispatch import check_ndim

BLOCK_ROWS, BLOCK_K = 32, 64
MAX_LEVEL = 127
BYTE_BIAS = 128
ROWS_AT_ONCE = 4096  # of a weight that is rounded, so that what it takes meanwhile stays small


class Int8Weight(NamedTuple):
    """A weight [n, k] for products with rows of its former type. scales: [n] fp32."""

    words: torch.Tensor
    scales: torch.Tensor
    n: int
    k: int


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """Round weight [N, K] to the nearest level, scale = max |w| / 127 of each row; rows of zeros have a scale of 1."""
    check_ndim("weight", weight, 2)
    n, k = weight.shape
    size = -(-n // BLOCK_ROWS), -(-k // BLOCK_K), BLOCK_ROWS, BLOCK_K // 4
    words = torch.zeros(size, dtype=torch.int32, device=weight.device)
    scales = torch.empty(n, dtype=torch.float32, device=weight.device)
    for first in range(0, n, ROWS_AT_ONCE):
        rows = weight[first : first + ROWS_AT_ONCE].float()
        scale = rows.abs().amax(1) / MAX_LEVEL
        scale = torch.where(scale > 0, scale, 1.0)
        levels = (rows / scale[:, None]).round().clamp(-MAX_LEVEL, MAX_LEVEL) + BYTE_BIAS
        levels = F.pad(levels, (0, -k % BLOCK_K, 0, -len(rows) % BLOCK_ROWS), value=BYTE_BIAS).to(torch.uint8)
        blocks = levels.view(-1, BLOCK_ROWS, size[1], 2, BLOCK_K // 4, 2).permute(0, 2, 1, 4, 3, 5)
        block = first // BLOCK_ROWS
        words[block : block + len(blocks)] = blocks.flatten(-2).contiguous().view(torch.int32).squeeze(-1)
        scales[first : first + len(rows)] = scale
    return Int8Weight(words, scales, n, k)


def dequantize_int8(weight: Int8Weight) -> torch.Tensor:
    """The weight [n, k] in fp32."""
    num_rows, num_columns = (weight.words.shape[0] * BLOCK_ROWS, weight.words.shape[1] * BLOCK_K)
    levels = weight.words.unsqueeze(-1).view(torch.uint8).unflatten(-1, (2, 2)).permute(0, 2, 1, 4, 3, 5)
    levels = levels.reshape(num_rows, num_columns)[: weight.n, : weight.k]
    return (levels.float() - BYTE_BIAS) * weight.scales[:, None]
