"""What normalises each head of q and k before its rotation, as Qwen3 does."""

from __future__ import annotations

from typing import NamedTuple

import torch


class HeadNorms(NamedTuple):
    """RMSNorm over the head_dim channels of a head: weights of q and of k, [head_dim] each, dtype of the queries."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float
