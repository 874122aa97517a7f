"""Scales of input channels moved into what comes before: the layer computes the same, its linears quantise better.

A linear's input channel j gets the weights w[:, j] * s[j], and what makes the channel is divided by s[j].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tritonmind_tools.lite.decoder_layer import QKV, W1, W2, WO, DecoderLayer

SMOOTHING_ALPHA = 0.5
# Least magnitude that a scale is made of: of a channel that is always 0, any scale would do.
MIN_MAGNITUDE = 1e-4


def foldable_inputs(layer: DecoderLayer) -> tuple[str, ...]:
    """The linear inputs of which the channels can be scaled.

    That of wo only where a head of v feeds one head of q: shared by several, a channel of v would need several scales.
    """
    shared = layer.model.num_kv_heads != layer.model.num_heads
    return tuple(name for name in (QKV, WO, W1, W2) if not (shared and name == WO))


def linears_of(layer: DecoderLayer, name: str) -> torch.Tensor:
    """The weights that read input `name`, [all their outputs, in], in the order q, k, v and gate, up."""
    return {
        QKV: lambda: layer.w_qkv,
        WO: lambda: layer.wo,
        W1: lambda: torch.cat((layer.w1, layer.w3)),
        W2: lambda: layer.w2,
    }[name]()


def fold(layer: DecoderLayer, scales: Mapping[str, torch.Tensor]) -> DecoderLayer:
    """The layer with the input channels of some of foldable_inputs scaled by scales[name] [in]."""
    assert scales.keys() <= set(foldable_inputs(layer))
    if QKV in scales:
        s = scales[QKV]
        layer = layer.replace(attention_norm=layer.attention_norm / s, w_qkv=layer.w_qkv * s)
    if WO in scales:
        v = slice(sum(layer.qkv_sizes[:2]), None)
        w_qkv = layer.w_qkv.clone()
        w_qkv[v] /= scales[WO].unsqueeze(1)
        bias = layer.qkv_bias
        if bias is not None:
            bias = bias.clone()
            bias[v] /= scales[WO]
        layer = layer.replace(w_qkv=w_qkv, qkv_bias=bias, wo=layer.wo * scales[WO])
    if W1 in scales:
        s = scales[W1]
        layer = layer.replace(ffn_norm=layer.ffn_norm / s, w1=layer.w1 * s, w3=layer.w3 * s)
    if W2 in scales:
        s = scales[W2]
        layer = layer.replace(w3=layer.w3 / s.unsqueeze(1), w2=layer.w2 * s)
    return layer


def normalised(scales: torch.Tensor) -> torch.Tensor:
    """Scales [in] whose least and greatest are each other's inverse, so that what is divided by them keeps its size."""
    return scales / (scales.max() * scales.min()).sqrt()


def smoothing_scales(weight: torch.Tensor, absmax: torch.Tensor, group_size: int) -> torch.Tensor:
    """The tutorial's scales [in], without a search: the square root of activations over weights.

    A channel's weight is the mean over the rows of weight [out, in] of |w| over the largest |w| of its group in the
    row; its activation is `absmax` [in].
    """
    groups = weight.abs().unflatten(1, (-1, group_size))
    relative = groups / groups.amax(-1, keepdim=True).clamp(min=MIN_MAGNITUDE)
    magnitude = relative.mean(0).flatten().clamp(min=MIN_MAGNITUDE)
    return normalised((absmax.clamp(min=MIN_MAGNITUDE) / magnitude) ** SMOOTHING_ALPHA)
