"""The CPU serving path: what reference.py computes, arranged for few torch calls and few copies.

A torch call costs 2 to 5 us and a decoder step makes hundreds: small batches pay for calls, large ones for copies. What
shares the batch moves a row's result by rounding only, as it does in the matrix products around these functions.
Arguments are the launchers', checked there; each function writes to `out` when there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tritonmind.kernels.head_norms import HeadNorms
from tritonmind.kernels.kv_quant import KVScales, LayerScales, dequantise, quantise, quantise_tokens

# K and V gathered at a time: what a core's L2 holds, between too many calls and copies that fall out of the cache.
GATHER_BYTES = 4 << 20
# Queries of one attention call in a prompt: a causal mask wastes half a tile of work, more calls cost more.
QUERY_TILE = 256
# From here on scattering K and V with one index is cheaper than a copy a token.
MIN_INDEXED_TOKENS = 3


class Pools(NamedTuple):
    """A layer's KV cache; dtype: of what is read from it."""

    k: torch.Tensor
    v: torch.Tensor
    scales: KVScales | None
    dtype: torch.dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """See norm.rms_norm."""
    if x.dtype == torch.float32 and out is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    normed = F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)
    return torch.mul(normed, weight, out=out)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See norm.add_rms_norm."""
    residual += x.sum(0) if x.dim() == 3 else x
    return rms_norm(residual, weight, eps=eps, out=out), residual


def silu_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """See activation.silu_mul."""
    gate, up = x.float().chunk(2, dim=-1)
    product = F.silu(gate).mul_(up)
    return product.to(x.dtype) if out is None else out.copy_(product)


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
    norms: HeadNorms | None = None,
    query_scales: torch.Tensor | None = None,
    scales: KVScales | None = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See rotary.rotary_kv_write."""
    if qkv.dim() == 3:
        qkv = qkv.sum(0).to(dtype or k_cache.dtype)
    num_tokens, half = len(qkv), head_dim // 2
    heads = qkv.view(num_tokens, -1, head_dim)
    cos, sin = cos_sin.index_select(0, positions).view(num_tokens, 1, 2, half).unbind(2)
    turned = heads[:, : num_heads + num_kv_heads]
    if norms is not None:
        q, k = turned.split((num_heads, num_kv_heads), dim=1)
        turned = torch.cat((rms_norm(q, norms.q, eps=norms.eps), rms_norm(k, norms.k, eps=norms.eps)), dim=1)
    first, second = turned.float().split(half, dim=2)
    rotated = qkv.new_empty((num_tokens, num_heads + num_kv_heads, head_dim), dtype=torch.float32)
    rotated_first, rotated_second = rotated.split(half, dim=2)
    torch.mul(first, cos, out=rotated_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=rotated_second).addcmul_(first, sin)
    v = heads[:, num_heads + num_kv_heads :]
    _write(k_cache, v_cache, rotated[:, num_heads:], v, slot_mapping, scales)
    q = rotated[:, :num_heads]
    if query_scales is not None:
        q *= query_scales.index_select(0, positions).view(-1, 1, 1)
    return q.to(qkv.dtype).contiguous() if out is None else out.copy_(q)


def _write(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor,
    scales: KVScales | None,
) -> None:  # fmt: skip
    """Write k and v [T, num_kv_heads, D] to their slots, as bytes where there are scales; those of slot -1 nowhere."""
    if isinstance(scales, LayerScales):
        k, v = quantise(k, scales.k_scale, scales.k_zero), quantise(v, scales.v_scale, scales.v_zero)
    elif scales is not None:
        k, k_scales = quantise_tokens(k)
        v, v_scales = quantise_tokens(v)
        _write_slots((*scales, k_cache, v_cache), (k_scales, v_scales, k, v), slot_mapping)
        return
    _write_slots((k_cache, v_cache), (k, v), slot_mapping)


def _write_slots(pools: Sequence[torch.Tensor], values: Sequence[torch.Tensor], slot_mapping: torch.Tensor) -> None:
    """Write values [T, num_kv_heads, ...] to the slots of pools [num_blocks, num_kv_heads, block_size, ...]."""
    num_kv_heads, block_size = pools[0].shape[1:3]
    if len(values[0]) < MIN_INDEXED_TOKENS:
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                for pool, value in zip(pools, values, strict=True):
                    pool[slot // block_size, :, slot % block_size] = value[token]
        return
    if slot_mapping.min() < 0:
        kept = (slot_mapping >= 0).nonzero().flatten()
        slot_mapping, values = slot_mapping[kept], [value[kept] for value in values]
    # Row (block * num_kv_heads + head) * block_size + offset of the flattened pool.
    slots = slot_mapping.long()
    first_rows = slots + (slots // block_size) * ((num_kv_heads - 1) * block_size)
    rows = (first_rows.unsqueeze(1) + torch.arange(num_kv_heads) * block_size).flatten()
    for pool, value in zip(pools, values, strict=True):
        pool.flatten(0, 2).index_copy_(0, rows, value.flatten(0, 1).to(pool.dtype))


@functools.cache
def _head_numbers(num_kv_heads: int) -> torch.Tensor:
    return torch.arange(num_kv_heads, dtype=torch.int32).unsqueeze(1)


def _gather(pools: Pools, block_tables: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the first num_blocks pages of R sequences, [R, num_kv_heads, num_blocks * block_size, D] each."""
    total, num_kv_heads, block_size, head_dim = pools.k.shape
    tables = block_tables[:, None, :num_blocks]
    rows = torch.add(_head_numbers(num_kv_heads), tables, alpha=num_kv_heads).flatten()

    def pages(pool: torch.Tensor) -> torch.Tensor:
        return pool.view(total * num_kv_heads, -1).index_select(0, rows)

    k, v, scales = pages(pools.k), pages(pools.v), pools.scales
    if isinstance(scales, LayerScales):
        k = dequantise(k, scales.k_scale, scales.k_zero).to(pools.dtype)
        v = dequantise(v, scales.v_scale, scales.v_zero).to(pools.dtype)
    elif scales is not None:
        k = dequantise(k.view(-1, block_size, head_dim), pages(scales.k).unsqueeze(-1)).to(pools.dtype)
        v = dequantise(v.view(-1, block_size, head_dim), pages(scales.v).unsqueeze(-1)).to(pools.dtype)
    shape = (len(block_tables), num_kv_heads, -1, head_dim)
    return k.view(shape), v.view(shape)


def _decode_one(
    q: torch.Tensor, pools: Pools, block_tables: torch.Tensor, context_len: int, softmax_scale: float, window: int
) -> torch.Tensor:
    """Decode attention of one sequence, q [1, H, D]."""
    _, num_kv_heads, block_size, head_dim = pools.k.shape
    start, num_blocks = max(context_len - window, 0) if window else 0, -(-context_len // block_size)
    first = start // block_size
    k, v = _gather(pools, block_tables[:, first:], num_blocks - first)
    seen = slice(start - first * block_size, context_len - first * block_size)
    grouped = q.view(1, num_kv_heads, -1, head_dim)
    return F.scaled_dot_product_attention(grouped, k[:, :, seen], v[:, :, seen], scale=softmax_scale).view_as(q)


def _decode_many(
    q: torch.Tensor, pools: Pools, block_tables: torch.Tensor, context_lens: torch.Tensor, num_blocks: int,
    softmax_scale: float,
) -> torch.Tensor:  # fmt: skip
    """Decode attention of sequences of at most num_blocks pages, padded to that many, q [R, H, D]."""
    _, num_kv_heads, block_size, head_dim = pools.k.shape
    lengths = context_lens.unsqueeze(1)
    # A table says nothing past a sequence's pages; its first page stands in there.
    used = torch.arange(num_blocks, dtype=torch.int32) * block_size < lengths
    tables = torch.where(used, block_tables[:, :num_blocks], block_tables[:, :1])
    k, v = _gather(pools, tables, num_blocks)
    visible = (torch.arange(num_blocks * block_size, dtype=torch.int32) < lengths)[:, None, None]
    grouped = q.view(len(q), num_kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(grouped, k, v, visible, scale=softmax_scale)
    if out.sum().isnan():
        # Unused slots hold anything. A weight of zero silences what is finite; the rest must go.
        hidden = ~visible.transpose(2, 3)
        k, v = k.masked_fill_(hidden, 0), v.masked_fill_(hidden, 0)
        out = F.scaled_dot_product_attention(grouped, k, v, visible, scale=softmax_scale)
    return out.view_as(q)


def _groups(num_blocks: list[int], max_blocks: int) -> Iterator[list[int]]:
    """Rows with pages, shortest first, in groups whose padded pages stay within max_blocks (or of one row)."""
    group: list[int] = []
    for row in sorted(range(len(num_blocks)), key=num_blocks.__getitem__):
        if group and (len(group) + 1) * num_blocks[row] > max_blocks:
            yield group
            group = []
        if num_blocks[row]:
            group.append(row)
    if group:
        yield group


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    softmax_scale: float,
    window: int = 0,
    scales: KVScales | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See attention.paged_decode_attention."""
    pools = Pools(k_cache, v_cache, scales, q.dtype)
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    lengths = context_lens.tolist()
    if out is None and len(lengths) == 1 and lengths[0]:
        return _decode_one(q, pools, block_tables, lengths[0], softmax_scale, window)
    out = torch.zeros_like(q) if out is None else out.zero_()
    num_blocks = [-(-length // block_size) for length in lengths]
    block_bytes = 2 * num_kv_heads * block_size * head_dim * q.element_size()
    for group in _groups(num_blocks, GATHER_BYTES // block_bytes):
        first, last = group[0], group[-1]
        if first == last or (window and max(lengths) > window):
            for row in (slice(index, index + 1) for index in group):
                out[row] = _decode_one(q[row], pools, block_tables[row], lengths[row.start], softmax_scale, window)
            continue
        adjacent = group == list(range(first, last + 1))
        rows = slice(first, last + 1) if adjacent else torch.tensor(group)
        out[rows] = _decode_many(
            q[rows], pools, block_tables[rows], context_lens[rows], num_blocks[last], softmax_scale
        )
    return out


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    softmax_scale: float,
    window: int = 0,
    scales: KVScales | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See attention.paged_prefill_attention."""
    pools = Pools(k_cache, v_cache, scales, q.dtype)
    starts = cu_seqlens_q.tolist()
    if out is None:
        out = torch.zeros_like(q)
    else:
        out[starts[0] :].zero_()
    block_size = k_cache.shape[2]
    for row, context_len in enumerate(context_lens.tolist()):
        start, end = max(starts[row], starts[row + 1] - context_len), starts[row + 1]
        if start >= end:
            continue
        k, v = _gather(pools, block_tables[row : row + 1], -(-context_len // block_size))
        for tile in range(start, end, QUERY_TILE):
            tile_end = min(tile + QUERY_TILE, end)
            num_queries, num_visible = tile_end - tile, context_len - (end - tile_end)
            # What lies before the first query's window none of them sees.
            first = max(num_visible - num_queries + 1 - window, 0) if window else 0
            seen = slice(first, num_visible)
            visible = torch.ones(num_queries, num_visible - first, dtype=torch.bool)
            visible.tril_(num_visible - first - num_queries)
            if window:
                visible.triu_(num_visible - first - num_queries + 1 - window)
            out[tile:tile_end] = F.scaled_dot_product_attention(
                q[None, tile:tile_end].transpose(1, 2),
                k[:, :, seen],
                v[:, :, seen],
                visible,
                scale=softmax_scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
    return out
