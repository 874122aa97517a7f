"""The two searches of AWQ (Lin et al., "AWQ: Activation-aware Weight Quantization", 2023), on calibration activations.

Scales: of the input channels of linears that share an input, s = mean|x|^alpha, the alpha out of a grid with which the
block's output is nearest to that of the unquantised weights. Alpha 0 is no scaling, so the search is never worse than
rounding to nearest on what it looks at. Clipping: how much narrower than its weights each group's range is, by the
error of what the group adds to the linear's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tritonmind.kernels.awq_format import dequantize_levels, group_params, quantize_levels
from tritonmind_tools.lite.folding import MIN_MAGNITUDE, normalised

NUM_ALPHAS = 20
# A group's range is narrowed in steps of 1/20, to half at most.
CLIP_STEP, NUM_CLIPS = 0.05, 10
# Rows of a weight that are tried together: 32 MiB in fp32.
_PIECE_ELEMENTS = 8 << 20


class ScaleSearch(NamedTuple):
    """The best scales [in], their alpha, and the loss at every alpha of the grid."""

    scales: torch.Tensor
    alpha: float
    losses: list[float]


def search_scales(
    weight: torch.Tensor, absmean: torch.Tensor, group_size: int, loss: Callable[[torch.Tensor], float]
) -> ScaleSearch:
    """Search the scales of weight [out, in] with inputs of mean magnitude absmean [in].

    loss: the error that a weight instead of this one makes. What is tried is rounded scaled and divided again, which
    is what folding the scales does.
    """
    best = ScaleSearch(torch.ones_like(absmean), 0.0, [])
    for step in range(NUM_ALPHAS):
        alpha = step / NUM_ALPHAS
        scales = normalised(absmean.clamp(min=MIN_MAGNITUDE) ** alpha)
        found = loss(rounded(weight * scales, group_size) / scales)
        if not best.losses or found < min(best.losses):
            best = ScaleSearch(scales, alpha, best.losses)
        best.losses.append(found)
    return best


def rounded(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """weight [out, in] after quantising to the nearest level and back, fp32."""
    groups = weight.unflatten(1, (-1, group_size))
    params = group_params(groups.amin(-1), groups.amax(-1))
    return dequantize_levels(quantize_levels(weight, params), params)


def group_products(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Mean of x x^T within each group of channels, over the tokens of x [T, in]: [in // g, g, g].

    The mean square of what an error e of a group's weights adds to the output is e^T P e, for any number of tokens.
    """
    groups = x.unflatten(1, (-1, group_size)).transpose(0, 1)
    return groups.transpose(1, 2) @ groups / x.shape[0]


def search_clip(weight: torch.Tensor, products: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The range, minimum and maximum [out, in // g], for quantising each group of weight [out, in].

    products: see group_products, of the linear's input.
    """
    rows = max(1, _PIECE_ELEMENTS // weight.shape[1])
    ranges = [_clip_rows(piece, products, group_size) for piece in weight.split(rows)]
    return torch.cat([minimum for minimum, _ in ranges]), torch.cat([maximum for _, maximum in ranges])


def _clip_rows(weight: torch.Tensor, products: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    absmax = groups.abs().amax(-1)
    best_minimum, best_maximum, best_error = low, high, torch.full_like(low, float("inf"))
    for step in range(NUM_CLIPS):
        bound = absmax * (1 - step * CLIP_STEP)
        minimum, maximum = torch.maximum(low, -bound), torch.minimum(high, bound)
        params = group_params(minimum, maximum)
        wrong = dequantize_levels(quantize_levels(weight, params), params).unflatten(1, (-1, group_size)) - groups
        # [groups, out, g] @ [groups, g, g], then the product with itself.
        error = ((wrong.transpose(0, 1) @ products).transpose(0, 1) * wrong).sum(-1)
        better = error < best_error
        best_minimum = torch.where(better, minimum, best_minimum)
        best_maximum = torch.where(better, maximum, best_maximum)
        best_error = torch.where(better, error, best_error)
    return best_minimum, best_maximum
