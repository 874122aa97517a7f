"""What decode attention prepares once a step and follows in every layer."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DecodePlan(NamedTuple):
    """The pieces into which the sequences of a step are cut, and the memory in which pieces of a sequence meet.

    Valid for the context_lens that it was made of, on the stream on which it was made, for one layer after the other.
    """

    pieces: torch.Tensor  # [max_pieces, 4] int32: sequence or -1, index and number of its pieces, context_len
    sequences: torch.Tensor  # [B, 2] int32: first piece and number of pieces
    arrivals: torch.Tensor  # [B, Hkv] int32, pieces that have ended
    partial: torch.Tensor  # [max_pieces, H, D] fp32, outputs of pieces
    lse: torch.Tensor  # [max_pieces, H] fp32, their log-sum-exps


def decode_itemsize(dtype: torch.dtype, int8_kv: bool) -> int:
    """Bytes of an element, by which decode attention has its tile: 1 for int8 pages.

    dtype: that attention computes in. fp32 decides for int8 pages too: what it multiplies is as large as without.
    """
    return 1 if int8_kv and dtype.itemsize < 4 else dtype.itemsize
