"""The tensors of one step, as the model sees them. Decode rows come first, then the chunks of the prefills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tritonmind.kernels.decode_plan import DecodePlan
from tritonmind.kernels.flat_pages import FlatPages
from tritonmind.kernels.kv_quant import KVScales


class KVCache(NamedTuple):
    """K and V pools of one layer, [num_blocks, num_kv_heads, block_size, head_dim] each. K is stored after RoPE.

    scales: of pools of bytes, else None. scratch: pages of K and of V in the model's type through which prompts go over
    pools of bytes on a GPU, one for all layers.
    """

    k: torch.Tensor
    v: torch.Tensor
    scales: KVScales | None = None
    scratch: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """Where each token's K and V go, and what it attends to.

    The first `num_decodes` tokens are one token each of that many sequences; the others are chunks of prompts. In a
    step for a graph all sizes are upper limits: decodes beyond the step's have context length 0, and their tokens are
    those of prompts; prefills beyond have no tokens; and tokens of nobody follow.
    """

    num_decodes: int
    slot_mapping: torch.Tensor  # [num_tokens] int32, -1 writes nothing
    decode_block_tables: torch.Tensor  # [num_decodes, max_blocks] int32
    decode_context_lens: torch.Tensor  # [num_decodes] int32, the new token included
    prefill_block_tables: torch.Tensor  # [num_prefills, max_blocks] int32
    prefill_context_lens: torch.Tensor  # [num_prefills] int32, the chunk included
    prefill_cu_seqlens_q: torch.Tensor  # [num_prefills + 1] int32, where each one's tokens begin in the step
    max_query_len: int  # at least the longest chunk, 0 without prefills
    prefill_lens: list[tuple[int, int]] | None  # query_len and context_len of each prefill, as far as the host knows
    decode_plan: DecodePlan | None = None  # of the decodes on a GPU; the model adds it
    flat_pages: FlatPages | None = None  # of the prefills over int8 pages on a GPU; the model adds it
    out: torch.Tensor | None = None  # of attention, in each layer the same, where there is padding; the model adds it


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One step: which tokens, at which positions, and which rows need logits."""

    token_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    logits_rows: torch.Tensor | None  # [num_samples] int32, last token of each sampling sequence; None: every row
    attention: AttentionMetadata
