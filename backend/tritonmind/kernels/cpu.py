"""The CPU serving path: what reference.py computes, arranged for few torch calls and few copies.

Each function writes to `out` when there is one. A row's result does not depend on the other rows of the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """See norm.rms_norm."""
    normed = F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)
    return torch.mul(normed, weight, out=out)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See norm.add_rms_norm."""
    residual += x
    return rms_norm(residual, weight, eps=eps, out=out), residual


def silu_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """See activation.silu_mul."""
    gate, up = x.float().chunk(2, dim=-1)
    if out is None:
        return (F.silu(gate) * up).to(x.dtype)
    return out.copy_(F.silu(gate) * up)


def rotary_kv_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See rotary.rotary_kv_write."""
    half = head_dim // 2
    num_rotated = num_heads + num_kv_heads
    heads = qkv.view(-1, num_rotated + num_kv_heads, head_dim)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = heads[:, :num_rotated].float().split(half, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    keep = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping[keep].long()
    block, offset = slots // k_cache.shape[2], slots % k_cache.shape[2]
    k_cache[block, :, offset] = rotated[keep, num_heads:].to(k_cache.dtype)
    v_cache[block, :, offset] = heads[keep, num_rotated:]
    if out is None:
        return rotated[:, :num_heads].to(qkv.dtype).contiguous()
    return out.copy_(rotated[:, :num_heads])


def _gather(cache: torch.Tensor, blocks: torch.Tensor, context_len: int) -> torch.Tensor:
    """The first context_len tokens of the blocks, [1, num_kv_heads, context_len, D]."""
    _, num_kv_heads, _, head_dim = cache.shape
    pages = cache.index_select(0, blocks).transpose(0, 1)
    return pages.reshape(1, num_kv_heads, -1, head_dim)[:, :, :context_len]


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    softmax_scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See attention.paged_decode_attention."""
    cu_seqlens_q = torch.arange(len(q) + 1, dtype=torch.int32)
    return paged_prefill_attention(
        q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, softmax_scale=softmax_scale, out=out
    )


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    softmax_scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See attention.paged_prefill_attention."""
    out = torch.zeros_like(q) if out is None else out.zero_()
    block_size = k_cache.shape[2]
    starts = cu_seqlens_q.tolist()
    for row, context_len in enumerate(context_lens.tolist()):
        start, end = max(starts[row], starts[row + 1] - context_len), starts[row + 1]
        if start >= end:
            continue
        blocks = block_tables[row, : -(-context_len // block_size)]
        hidden = torch.ones(end - start, context_len, dtype=torch.bool).tril_(context_len - (end - start))
        out[start:end] = F.scaled_dot_product_attention(
            q[None, start:end].transpose(1, 2),
            _gather(k_cache, blocks, context_len),
            _gather(v_cache, blocks, context_len),
            attn_mask=hidden,
            scale=softmax_scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return out
