"""The tensors of one step, as the model sees them. Decode rows come first, then the chunks of the prefills."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tritonmind.kernels.decode_plan import DecodePlan


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """Where each token's K and V go, and what it attends to.

    The first `num_decodes` tokens are one token each of that many sequences; the others are chunks of prompts.
    """

    num_decodes: int
    slot_mapping: torch.Tensor  # [num_tokens] int32, -1 writes nothing
    decode_block_tables: torch.Tensor  # [num_decodes, max_blocks] int32
    decode_context_lens: torch.Tensor  # [num_decodes] int32, the new token included
    prefill_block_tables: torch.Tensor  # [num_prefills, max_blocks] int32
    prefill_context_lens: torch.Tensor  # [num_prefills] int32, the chunk included
    prefill_cu_seqlens_q: torch.Tensor  # [num_prefills + 1] int32
    max_query_len: int  # longest chunk, 0 without prefills
    decode_plan: DecodePlan | None = None  # of the decodes on a GPU; the model adds it


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One step: which tokens, at which positions, and which rows need logits."""

    token_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    logits_rows: torch.Tensor | None  # [num_samples] int32, last token of each sampling sequence; None: every row
    attention: AttentionMetadata
