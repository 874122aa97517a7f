"""One decoder layer to 4 bits: round to nearest, the tutorial's smoothing, or AWQ's searches."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from tritonmind.kernels.awq_format import AwqWeight, quantize, quantize_groups
from tritonmind_tools.lite.awq_search import ScaleSearch, group_products, search_clip, search_scales
from tritonmind_tools.lite.decoder_layer import LINEAR_INPUTS, QKV, W1, W2, WO, DecoderLayer
from tritonmind_tools.lite.folding import fold, foldable_inputs, linears_of, smoothing_scales
from tritonmind_tools.lite.statistics import ABSMAX, ABSMEAN

Scaling = Literal["search", "smooth", "none"]


class LayerInputs(NamedTuple):
    """What a layer's linears read, by LINEAR_INPUTS: [samples, T, in] each, fp32."""

    values: dict[str, torch.Tensor]

    def tokens(self, name: str) -> torch.Tensor:
        """[samples * T, in]."""
        return self.values[name].flatten(0, 1)


class QuantisedLayer(NamedTuple):
    """A layer whose linears are 4-bit. layer: norms and biases, scales folded in. alphas: of the search, by input."""

    layer: DecoderLayer
    q: AwqWeight
    k: AwqWeight
    v: AwqWeight
    wo: AwqWeight
    w1: AwqWeight
    w3: AwqWeight
    w2: AwqWeight
    alphas: dict[str, float]


def run_layer(layer: DecoderLayer, hidden: torch.Tensor, device: torch.device) -> LayerInputs:
    """Send hidden [samples, T, hidden_size] through the layer, in place. Returns what its linears read, on `device`."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in LINEAR_INPUTS}

    def observe(name: str, value: torch.Tensor) -> None:
        if name in seen:
            seen[name].append(value)

    for sample in range(len(hidden)):
        hidden[sample] = layer.forward(hidden[sample].to(device), observe).to(hidden.device)
    return LayerInputs({name: torch.stack(values) for name, values in seen.items()})


def quantise_layer(
    layer: DecoderLayer,
    statistics: Mapping[str, Mapping[str, torch.Tensor]],
    inputs: LayerInputs | None,
    *,
    group_size: int,
    scaling: Scaling,
) -> QuantisedLayer:
    """Quantise the layer's linears in groups of group_size.

    statistics: of each of LINEAR_INPUTS, by kind, on the layer's device. inputs: needed for "search" alone.
    """
    scales: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    if scaling == "search":
        assert inputs is not None
        for name in foldable_inputs(layer):
            found = _search(layer, name, statistics[name][ABSMEAN], inputs, group_size)
            scales[name], alphas[name] = found.scales, found.alpha
    elif scaling == "smooth":
        for name in foldable_inputs(layer):
            scales[name] = smoothing_scales(linears_of(layer, name), statistics[name][ABSMAX], group_size)
    layer = fold(layer, scales)

    @functools.cache
    def products_of(name: str) -> torch.Tensor:
        assert inputs is not None
        x = inputs.tokens(name)
        return group_products(x / scales[name] if name in scales else x, group_size)

    def to_awq(weight: torch.Tensor, name: str, clip: bool = True) -> AwqWeight:
        if scaling != "search" or not clip:
            return quantize(weight, group_size)
        return quantize_groups(weight, *search_clip(weight, products_of(name), group_size))

    # What clipping q or k does to the attention weights, the error of their own outputs does not show.
    q, k, v = layer.w_qkv.split(layer.qkv_sizes)
    return QuantisedLayer(
        layer=layer,
        q=to_awq(q, QKV, clip=False),
        k=to_awq(k, QKV, clip=False),
        v=to_awq(v, QKV),
        wo=to_awq(layer.wo, WO),
        w1=to_awq(layer.w1, W1),
        w3=to_awq(layer.w3, W1),
        w2=to_awq(layer.w2, W2),
        alphas=alphas,
    )


def _search(layer: DecoderLayer, name: str, absmean: torch.Tensor, inputs: LayerInputs, group_size: int) -> ScaleSearch:
    """By the output of the block: attention for q, k and v, feed-forward for gate and up, else the linear itself."""
    x = inputs.values[name]
    output = WO if name in (QKV, WO) else W2
    weight, bias = (layer.wo, layer.o_bias) if output == WO else (layer.w2, None)
    expected = [F.linear(value, weight, bias) for value in inputs.values[output]]

    def block(sample: torch.Tensor, tried: torch.Tensor) -> torch.Tensor:
        if name == QKV:
            return layer.replace(w_qkv=tried).attention(sample)
        if name == W1:
            w1, w3 = tried.chunk(2)
            return layer.replace(w1=w1, w3=w3).feed_forward(sample)
        return F.linear(sample, tried, bias)

    def loss(tried: torch.Tensor) -> float:
        errors = [(block(sample, tried) - want).square().mean() for sample, want in zip(x, expected, strict=True)]
        return float(torch.stack(errors).mean())

    return search_scales(linears_of(layer, name), absmean, group_size, loss)
