"""Rotary position embedding tables (RoFormer, Su et al. 2021), with the scalings of Hugging Face checkpoints.

The kernels rotate halves: pair (i, i + head_dim / 2) of position p turns by p * inv_freq[i].
"""

from __future__ import annotations

import math

import torch

from tritonmind.config import ModelConfig, RopeScaling
from tritonmind.errors import ConfigError


def inverse_frequencies(model: ModelConfig, max_model_len: int) -> torch.Tensor:
    """Angle per position of each pair, [head_dim / 2] fp32, scaling applied."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.int64).float() / model.head_dim
    inv_freq = 1.0 / (model.rope_theta**exponents)
    scaling = model.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(inv_freq, scaling)
    if scaling.rope_type == "dynamic":
        # Dynamic NTK changes nothing up to the trained length.
        if max_model_len <= model.max_position_embeddings:
            return inv_freq
        raise ConfigError(
            f"session_len={max_model_len} is beyond max_position_embeddings={model.max_position_embeddings}, where "
            f"rope_scaling 'dynamic' would act; this version does not do that: "
            f"set session_len to at most {model.max_position_embeddings}"
        )
    raise ConfigError(
        f"rope_scaling type {scaling.rope_type!r} is not supported; supported are linear, llama3, dynamic"
    )


def cos_sin_table(model: ModelConfig, max_model_len: int, device: torch.device) -> torch.Tensor:
    """[max_model_len, head_dim] fp32: cosines in the first half of a row, sines in the second."""
    inv_freq = inverse_frequencies(model, max_model_len)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device)


def _llama3(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    if low is None or high is None or original is None:
        raise ConfigError(
            "rope_scaling 'llama3' needs low_freq_factor, high_freq_factor and original_max_position_embeddings"
        )
    wavelengths = 2 * math.pi / inv_freq
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
