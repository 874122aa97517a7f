"""Attention over the paged KV cache: writes the new K and V, then attends, decodes and prompt chunks apart."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from tritonmind.kernels import (
    HeadNorms,
    paged_decode_attention,
    paged_prefill_attention,
    plan_decode,
    plan_flat_pages,
    rotary_kv_write,
)
from tritonmind.layers.norm import RMSNorm
from tritonmind.layers.rotary import RotaryTable
from tritonmind.model_inputs import AttentionMetadata, KVCache, ModelInputs


def with_attention_plans(
    inputs: ModelInputs, kv_cache: KVCache, *, num_heads: int, window: int, dtype: torch.dtype
) -> ModelInputs:
    """The inputs with the plans that all layers follow. kv_cache: any layer's. window, dtype: the model's."""
    metadata = inputs.attention
    if metadata.num_decodes:
        _, num_kv_heads, block_size, head_dim = kv_cache.k.shape
        plan = plan_decode(
            metadata.decode_context_lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            block_size=block_size, dtype=dtype, int8_kv=kv_cache.scales is not None, window=window,
        )  # fmt: skip
        metadata = dataclasses.replace(metadata, decode_plan=plan)
    num_tokens = len(inputs.token_ids)
    if metadata.max_query_len and kv_cache.scratch is not None:
        flat_pages = plan_flat_pages(
            *kv_cache.scratch, metadata.prefill_block_tables, metadata.prefill_cu_seqlens_q,
            metadata.prefill_context_lens, lens=metadata.prefill_lens, num_tokens=num_tokens, written=True,
        )  # fmt: skip
        metadata = dataclasses.replace(metadata, flat_pages=flat_pages)
    if metadata.prefill_lens is None:
        # Nobody writes the rows of padding: they stay finite.
        out = torch.zeros((num_tokens, num_heads, kv_cache.k.shape[3]), dtype=dtype, device=kv_cache.k.device)
        metadata = dataclasses.replace(metadata, out=out)
    return dataclasses.replace(inputs, attention=metadata)


class Attention(nn.Module):
    """Grouped-query attention of one layer. Of weights it holds the norms of q and k, if any; the cache is passed in.

    window: how many tokens a query sees, its own included; 0 is all. norm_eps: of the norms, 0 for a model without.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int = 0,
        norm_eps: float = 0.0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.window = window
        self.norms: HeadNorms | None = None
        if norm_eps:
            self.q_norm = RMSNorm(head_dim, eps=norm_eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm(head_dim, eps=norm_eps, dtype=dtype, device=device)
            self.norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, norm_eps)
        self.dtype = dtype
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.softmax_scale = head_dim**-0.5

    def forward(
        self,
        qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        table: RotaryTable,
        positions: torch.Tensor,  # [num_tokens]
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """-> [num_tokens, num_heads * head_dim]"""
        q = rotary_kv_write(
            qkv, table.cos_sin, positions, metadata.slot_mapping, kv_cache.k, kv_cache.v,
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, norms=self.norms,
            query_scales=table.query_scales, scales=kv_cache.scales, flat=metadata.flat_pages, dtype=self.dtype,
        )  # fmt: skip
        num_decodes, num_tokens = metadata.num_decodes, q.shape[0]
        if not metadata.max_query_len:
            return self._decode(q, kv_cache, metadata, None).view(num_tokens, -1)
        out = torch.empty_like(q) if metadata.out is None else metadata.out
        # First, because it writes zeros for its padding, where prompts may have their tokens.
        if num_decodes:
            self._decode(q[:num_decodes], kv_cache, metadata, out[:num_decodes])
        window, lens = self.window, metadata.prefill_lens
        if window and lens is not None and max(context_len for _, context_len in lens) <= window:
            window = 0  # no context is longer: it changes nothing, and the fastest kernel knows none
        paged_prefill_attention(
            q, kv_cache.k, kv_cache.v, metadata.prefill_block_tables, metadata.prefill_cu_seqlens_q,
            metadata.prefill_context_lens, max_query_len=metadata.max_query_len, softmax_scale=self.softmax_scale,
            window=window, scales=kv_cache.scales, flat=metadata.flat_pages, out=out,
        )  # fmt: skip
        return out.view(num_tokens, -1)

    def _decode(
        self,
        q: torch.Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        return paged_decode_attention(
            q, kv_cache.k, kv_cache.v, metadata.decode_block_tables, metadata.decode_context_lens,
            softmax_scale=self.softmax_scale, window=self.window, scales=kv_cache.scales, plan=metadata.decode_plan,
            out=out,
        )  # fmt: skip
