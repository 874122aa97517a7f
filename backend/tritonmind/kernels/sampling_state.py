"""How requests sample, a row each: what sampling.py, its CPU twin and its kernels share."""

from typing import NamedTuple

import torch

# Bit of a token count that says that the token is in the prompt; the bits below count how often it was generated.
PROMPT_FLAG = 1 << 30
# Below it only exact ties with the largest logit are left to chance.
MIN_TEMPERATURE = 1e-6


class SamplingState(NamedTuple):
    """Parameters by slot. The neutral ones: temperature 1, top_k 0, top_p 1, min_p 0, penalties 1, 0 and 0."""

    temperature: torch.Tensor  # [S] fp32; 0 takes the likeliest token
    top_k: torch.Tensor  # [S] int32; 0 keeps all
    top_p: torch.Tensor  # [S] fp32, in (0, 1]
    min_p: torch.Tensor  # [S] fp32, in [0, 1]
    repetition_penalty: torch.Tensor  # [S] fp32, above 0
    presence_penalty: torch.Tensor  # [S] fp32
    frequency_penalty: torch.Tensor  # [S] fp32
    seed: torch.Tensor  # [S] int64 with the bits of an uint64
    token_counts: torch.Tensor  # [S, V] int32; read and written only for a slot with a penalty
