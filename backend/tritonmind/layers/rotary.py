"""Rotary position embedding tables (RoFormer, Su et al. 2021), with the scalings of Hugging Face checkpoints.

The kernels rotate halves: pair (i, i + head_dim / 2) of position p turns by p * inv_freq[i].

Some scalings depend on a sequence's length: dynamic NTK, and longrope, which has two sets of factors. All tokens of a
sequence must be rotated alike, so its frequencies are those of the least of `rope_limits` that it does not exceed. A
sequence that grows beyond is computed again with those of the next. For dynamic NTK the limits are the trained length
times powers of two: Qwen's own rule, of which the formula for lengths in between is a refinement that would let no two
requests share a prefix.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch

from tritonmind.config import ModelConfig, RopeScaling

logger = logging.getLogger(__name__)


class RotaryTable(NamedTuple):
    """By row: of position p of a sequence with the frequencies of limit number k, p plus the limits before it.

    cos_sin: [rows, head_dim] fp32, cosines in the first half of a row, sines in the second. query_scales: [rows] fp32,
    what queries are multiplied by, None where it is always 1.
    """

    cos_sin: torch.Tensor
    query_scales: torch.Tensor | None


def rope_limits(model: ModelConfig, max_model_len: int) -> tuple[int, ...]:
    """The longest sequences that each set of frequencies is for, ascending; the last is max_model_len."""
    scaling, limits = model.rope_scaling, []
    if scaling is not None and scaling.rope_type == "longrope":
        assert scaling.original_max_position_embeddings is not None
        limits = [scaling.original_max_position_embeddings]
    elif scaling is not None and scaling.rope_type == "dynamic":
        limits = [model.max_position_embeddings]
        while 2 * limits[-1] < max_model_len:
            limits.append(2 * limits[-1])
    return (*(limit for limit in limits if limit < max_model_len), max_model_len)


def longest_known(model: ModelConfig) -> float:
    """Tokens up to which the model, with its scaling, was trained or is stretched; infinite for dynamic NTK."""
    scaling = model.rope_scaling
    if scaling is None or scaling.rope_type in ("llama3", "longrope"):  # trained for the length that they have
        return model.max_position_embeddings
    if scaling.rope_type == "dynamic":
        return math.inf
    return scaling.factor * (scaling.original_max_position_embeddings or model.max_position_embeddings)


def rotary_table(model: ModelConfig, max_model_len: int, device: torch.device) -> RotaryTable:
    """What the model needs for sequences of up to max_model_len tokens. Warns of more than it knows."""
    scaling = model.rope_scaling
    if max_model_len > (known := longest_known(model)):
        remedy = "" if scaling else ", or turn on dynamic NTK with rope_scaling_factor = 1.0 in config.ini"
        logger.warning(
            "session_len=%d is more than the %d tokens that the model knows, beyond which answers are poor: lower it%s",
            max_model_len, known, remedy,
        )  # fmt: skip
    factor = 1.0 if scaling is None else scaling.attention_factor
    tables = []
    for limit in rope_limits(model, max_model_len):
        angles = torch.outer(torch.arange(limit, dtype=torch.float32), inverse_frequencies(model, limit))
        tables.append(factor * torch.cat((angles.cos(), angles.sin()), dim=1))
    query_scales = None
    if model.use_logn_attn and max_model_len > model.max_position_embeddings:
        lengths = torch.cat([torch.arange(1, len(table) + 1, dtype=torch.float32) for table in tables])
        query_scales = (lengths.log() / math.log(model.max_position_embeddings)).clamp(min=1).to(device)
    return RotaryTable(torch.cat(tables).to(device), query_scales)


def inverse_frequencies(model: ModelConfig, length: int) -> torch.Tensor:
    """Angle per position of each pair for sequences of `length` tokens, [head_dim / 2] fp32, scaling applied."""
    scaling, dim = model.rope_scaling, model.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inv_freq = 1.0 / (model.rope_theta**exponents)
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(inv_freq, scaling)
    if scaling.rope_type == "yarn":
        return _yarn(inv_freq, scaling, model.rope_theta)
    if scaling.rope_type == "longrope":
        assert scaling.original_max_position_embeddings is not None
        is_long = length > scaling.original_max_position_embeddings
        return inv_freq / torch.tensor(scaling.long_factor if is_long else scaling.short_factor)
    # Dynamic NTK, as Transformers has it: nothing changes up to the trained length.
    trained = model.max_position_embeddings
    times = 1 << max(math.ceil(math.log2(length / trained)), 0)
    theta = model.rope_theta * (scaling.factor * times - (scaling.factor - 1)) ** (dim / (dim - 2))
    return 1.0 / (theta**exponents)


def _llama3(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None and high is not None and original is not None
    wavelengths = 2 * math.pi / inv_freq
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq


def _yarn(inv_freq: torch.Tensor, scaling: RopeScaling, theta: float) -> torch.Tensor:
    """YaRN (Peng et al. 2023): pairs that turn often within the original length are kept, those that turn little are
    divided by `factor`, with a linear blend by number of the pair between.
    """
    original, num_pairs = scaling.original_max_position_embeddings, len(inv_freq)
    assert original is not None

    def pair_of(num_turns: float) -> float:
        """The pair, a fraction, that turns so often."""
        return num_pairs * math.log(original / (num_turns * 2 * math.pi)) / math.log(theta)

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    blend = ((torch.arange(num_pairs, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq * (1 - blend) + inv_freq / scaling.factor * blend
