"""4-bit linear weights in the portable AWQ form: packing, the quantising formulas, and what the numbers mean.

    w[n, k] = (level[k, n] - zero[k // g, n]) * scale[k // g, n]        level, zero: 0 to 15; g: group_size

It is the form of AutoAWQ's "gemm" checkpoints and of a workspace. Eight neighbours along the output dimension N share
one int32: bits 4 i to 4 i + 3 hold column 8 c + NIBBLE_ORDER[i]. A kernel's own layout is made out of this at load.
Torch alone, on the device of the tensors that are given.
"""

from typing import NamedTuple

import torch

GROUP_SIZES = (32, 64, 128)
NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLES_PER_WORD = len(NIBBLE_ORDER)
MAX_LEVEL = 15

# The smallest positive fp16: the scale of a group of zeros, which any scale would describe.
_MIN_SCALE = 2.0**-24


class AwqWeight(NamedTuple):
    """A weight [N, K] in 4 bits: qweight [K, N // 8] int32, qzeros [K // g, N // 8] int32, scales [K // g, N] fp16."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    @property
    def group_size(self) -> int:
        return self.qweight.shape[0] // self.scales.shape[0]


class GroupParams(NamedTuple):
    """What turns the levels of a group into weights: scales [N, K // g] fp16, zeros [N, K // g] uint8."""

    scales: torch.Tensor
    zeros: torch.Tensor


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """Pack integers 0 to 15, [R, N], into words [R, N // 8] int32. Raises ValueError unless 8 divides N."""
    if values.dim() != 2 or values.shape[1] % NIBBLES_PER_WORD:
        raise ValueError(f"values {list(values.shape)} must be two-dimensional, the last a multiple of 8")
    words = torch.zeros(values.shape[0], values.shape[1] // NIBBLES_PER_WORD, dtype=torch.int32, device=values.device)
    for place, column in enumerate(NIBBLE_ORDER):
        words |= values[:, column::NIBBLES_PER_WORD].to(torch.int32) << 4 * place
    return words


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The integers in words [R, N // 8] int32, as [R, N] uint8."""
    if packed.dim() != 2 or packed.dtype != torch.int32:
        raise ValueError(f"packed is {packed.dtype}{list(packed.shape)}, must be two-dimensional int32")
    values = torch.empty(*packed.shape, NIBBLES_PER_WORD, dtype=torch.uint8, device=packed.device)
    for place, column in enumerate(NIBBLE_ORDER):
        values[:, :, column] = packed >> 4 * place & MAX_LEVEL
    return values.flatten(1)


def dequantize(weight: AwqWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [N, K], contiguous, exact in fp32 and rounded once to `dtype`."""
    levels = unpack_nibbles(weight.qweight).t()
    params = GroupParams(weight.scales.t(), unpack_nibbles(weight.qzeros).t())
    return dequantize_levels(levels, params).to(dtype).contiguous()


def quantize(weight: torch.Tensor, group_size: int) -> AwqWeight:
    """Round weight [N, K], of a floating type, to the nearest level between each group's least and greatest value.

    Raises ValueError for a group size that is not one of GROUP_SIZES or does not divide K, for N that is no multiple
    of 8, for values that are not finite.
    """
    groups = _groups(weight, group_size)
    return quantize_groups(weight, groups.amin(-1), groups.amax(-1))


def quantize_groups(weight: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor) -> AwqWeight:
    """Quantise weight [N, K] with the levels of each group between `minimum` and `maximum`, [N, K // g].

    What lies outside goes to the outermost level. Raises ValueError as `quantize` does.
    """
    params = group_params(minimum, maximum)
    levels = quantize_levels(weight, params)
    return AwqWeight(pack_nibbles(levels.t()), pack_nibbles(params.zeros.t()), params.scales.t().contiguous())


def group_params(minimum: torch.Tensor, maximum: torch.Tensor) -> GroupParams:
    """scale = (max - min) / 15, as fp16 rounds it, and zero = round(-min / scale), within 0 to 15.

    The range is widened to hold 0, which always is a level: the zero of a group of one sign would not fit. minimum,
    maximum: any shape, of a floating type. Raises ValueError for values that are not finite or beyond fp16.
    """
    minimum, maximum = minimum.float().clamp(max=0), maximum.float().clamp(min=0)
    scales = ((maximum - minimum) / MAX_LEVEL).clamp(min=_MIN_SCALE).half()
    if not torch.isfinite(scales).all():
        raise ValueError("the weight holds values that are not finite or too large for fp16 scales")
    zeros = (-minimum / scales.float()).round().clamp(0, MAX_LEVEL).to(torch.uint8)
    return GroupParams(scales, zeros)


def quantize_levels(weight: torch.Tensor, params: GroupParams) -> torch.Tensor:
    """level = round(w / scale) + zero, within 0 to 15: [N, K] uint8 for weight [N, K]."""
    groups = _groups(weight, weight.shape[1] // params.scales.shape[1])
    levels = (groups / params.scales.float().unsqueeze(-1)).round() + params.zeros.unsqueeze(-1)
    return levels.clamp(0, MAX_LEVEL).to(torch.uint8).flatten(1)


def dequantize_levels(levels: torch.Tensor, params: GroupParams) -> torch.Tensor:
    """w = (level - zero) * scale: [N, K] fp32 for levels [N, K] uint8."""
    groups = levels.unflatten(1, (params.scales.shape[1], -1))
    return ((groups.float() - params.zeros.unsqueeze(-1)) * params.scales.float().unsqueeze(-1)).flatten(1)


def _groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Weight [N, K] as [N, K // g, g] in fp32."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size={group_size} must be one of {', '.join(map(str, GROUP_SIZES))}")
    if weight.dim() != 2 or weight.shape[1] % group_size:
        raise ValueError(f"group_size={group_size} does not divide the input width of a weight {list(weight.shape)}")
    return weight.float().unflatten(1, (-1, group_size))
