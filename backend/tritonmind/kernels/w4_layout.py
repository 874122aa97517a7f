"""How the W4A16 kernels hold a 4-bit weight, and the way there from the portable form of awq_format.py.

Words: int32 [N / 32, K / 128, 32, 16], blocks of 32 rows (output features) by 128 of K. Word i of a row has at bits 4 j
the level of k = 32 j + 2 i, and at bits 16 + 4 j that of its neighbour, j = 0 to 3: one mask over the word gives two
neighbours along K, a register of the tensor cores' left operand. Params: int32 [N / 32, K / 128, 128 / group, 32], in
the low half the fp16 scale of a group, in the high half what its zero point z becomes, -(1024 + z) in fp16 or
-(128 + z) in bf16: a level that is put into the low bits of the mantissa of 1024, or of 128, adds itself to that.
N and K are filled up to whole blocks with scales of 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from tritonmind.kernels.awq_format import MAX_LEVEL, AwqWeight, GroupParams, dequantize_levels, unpack_nibbles

BLOCK_ROWS = 32
BLOCK_K = 128
SLICES = 4  # of K in a block: the positions j
WORDS = BLOCK_K // (2 * SLICES)  # of a row, in a block
GATE_ROWS = 8  # of gate, then as many of up, in turn: a thread that has a row of the one has that of the other
# What a level is added to.
BIASES = {torch.float16: 1024, torch.bfloat16: 128}


class PackedWeight(NamedTuple):
    """A weight [n, k] as the kernels read it, for products with rows of `dtype`.

    is_gated: its rows are those of gate and up in turn, GATE_ROWS each; n counts both.
    """

    words: torch.Tensor
    params: torch.Tensor
    n: int
    k: int
    group_size: int
    dtype: torch.dtype
    is_gated: bool

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return self.words.nbytes + self.params.nbytes


def pack(parts: list[AwqWeight], dtype: torch.dtype) -> PackedWeight:
    """A weight for the kernels, out of one portable weight, or out of two of one shape: gate and up.

    dtype: of the rows that it will be multiplied with, fp16 or bf16. Raises ValueError for another one.
    """
    if dtype not in BIASES:
        raise ValueError(f"dtype={dtype} has no kernels for 4-bit weights: use torch.float16 or torch.bfloat16")
    assert len({(part.qweight.shape, part.scales.shape) for part in parts}) == 1 and len(parts) in (1, 2)
    k, group_size = parts[0].in_features, parts[0].group_size
    assert BLOCK_K % group_size == 0, f"group size {group_size}"
    levels = _whole_blocks(_in_turn([unpack_nibbles(part.qweight).t() for part in parts]), BLOCK_K)
    blocks = levels.view(-1, BLOCK_ROWS, levels.shape[1] // BLOCK_K, SLICES, WORDS, 2).transpose(1, 2)
    words = torch.zeros(*blocks.shape[:3], WORDS, dtype=torch.int32, device=levels.device)
    for place in range(SLICES):
        for half in range(2):
            words |= blocks[..., place, :, half].to(torch.int32) << (4 * place + 16 * half)
    params = _in_turn([_params(part, dtype).t() for part in parts])
    params = _whole_blocks(params, BLOCK_K // group_size)
    params = params.view(-1, BLOCK_ROWS, levels.shape[1] // BLOCK_K, BLOCK_K // group_size).permute(0, 2, 3, 1)
    n = sum(part.out_features for part in parts)
    return PackedWeight(words, params.contiguous(), n, k, group_size, dtype, len(parts) == 2)


def unpack(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [n, k] rounded to `dtype`, rows of gate before those of up."""
    num_k = weight.words.shape[1] * BLOCK_K
    places = [weight.words >> (4 * place + 16 * half) & MAX_LEVEL for place in range(SLICES) for half in range(2)]
    levels = torch.stack(places, -1).unflatten(-1, (SLICES, 2))  # [.., 32, WORDS, SLICES, 2]
    levels = levels.transpose(1, 2).transpose(-2, -3).reshape(-1, num_k)
    params = weight.params.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)  # [N, K / group]
    zeros = -(params >> 16).to(torch.int16).view(weight.dtype).float() - BIASES[weight.dtype]
    scales = params.to(torch.int16).view(torch.float16)
    dense = dequantize_levels(levels, GroupParams(scales, zeros))[: weight.n, : weight.k]
    if weight.is_gated:
        dense = dense.view(-1, 2, GATE_ROWS, weight.k).transpose(0, 1).reshape(weight.n, weight.k)
    return dense.to(dtype).contiguous()


def packed_bytes(n: int, k: int, group_size: int) -> int:
    """What a weight [n, k] takes on the device."""
    return -(-n // BLOCK_ROWS) * -(-k // BLOCK_K) * BLOCK_ROWS * (BLOCK_K // 2 + 4 * BLOCK_K // group_size)


def _params(part: AwqWeight, dtype: torch.dtype) -> torch.Tensor:
    """[K / group, N] int32"""
    biased = -(unpack_nibbles(part.qzeros).to(dtype) + BIASES[dtype])
    return part.scales.view(torch.int16).to(torch.int32) & 0xFFFF | biased.view(torch.int16).to(torch.int32) << 16


def _in_turn(parts: list[torch.Tensor]) -> torch.Tensor:
    """The rows of the one part, [N, ...], or GATE_ROWS rows of each of two in turn."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.unflatten(0, (-1, GATE_ROWS)) for part in parts], 1).flatten(0, 2)


def _whole_blocks(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """[N, C] with zeros up to whole blocks of BLOCK_ROWS by `columns`, contiguous."""
    num_rows, num_columns = rows.shape
    return F.pad(rows, (0, -num_columns % columns, 0, -num_rows % BLOCK_ROWS)).contiguous()
