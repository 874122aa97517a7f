"""Attention over the paged KV cache: writes the new K and V, then attends, decodes and prompt chunks apart."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from tritonmind.kernels import paged_decode_attention, paged_prefill_attention, plan_decode, rotary_kv_write
from tritonmind.model_inputs import AttentionMetadata, ModelInputs


def with_decode_plan(
    inputs: ModelInputs, kv_cache: tuple[torch.Tensor, torch.Tensor], *, num_heads: int
) -> ModelInputs:
    """The inputs with a plan for their decodes, which all layers follow. kv_cache: any layer's."""
    metadata = inputs.attention
    if not metadata.num_decodes:
        return inputs
    _, num_kv_heads, block_size, head_dim = kv_cache[0].shape
    plan = plan_decode(
        metadata.decode_context_lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        block_size=block_size, dtype=kv_cache[0].dtype,
    )  # fmt: skip
    if plan is None:
        return inputs
    return dataclasses.replace(inputs, attention=dataclasses.replace(metadata, decode_plan=plan))


class Attention(nn.Module):
    """Grouped-query attention of one layer. Holds no weights; the cache is passed in."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.softmax_scale = head_dim**-0.5

    def forward(
        self,
        qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        cos_sin: torch.Tensor,  # [max_model_len, head_dim] fp32
        positions: torch.Tensor,  # [num_tokens]
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """-> [num_tokens, num_heads * head_dim]"""
        k_cache, v_cache = kv_cache
        q = rotary_kv_write(
            qkv, cos_sin, positions, metadata.slot_mapping, k_cache, v_cache,
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
        )  # fmt: skip
        num_decodes, num_tokens = metadata.num_decodes, q.shape[0]
        if num_decodes == num_tokens:
            return self._decode(q, kv_cache, metadata, None).view(num_tokens, -1)
        out = torch.empty_like(q)
        if num_decodes:
            self._decode(q[:num_decodes], kv_cache, metadata, out[:num_decodes])
        paged_prefill_attention(
            q[num_decodes:], k_cache, v_cache, metadata.prefill_block_tables, metadata.prefill_cu_seqlens_q,
            metadata.prefill_context_lens, max_query_len=metadata.max_query_len, softmax_scale=self.softmax_scale,
            out=out[num_decodes:],
        )  # fmt: skip
        return out.view(num_tokens, -1)

    def _decode(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        metadata: AttentionMetadata,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        return paged_decode_attention(
            q, *kv_cache, metadata.decode_block_tables, metadata.decode_context_lens,
            softmax_scale=self.softmax_scale, plan=metadata.decode_plan, out=out,
        )  # fmt: skip
