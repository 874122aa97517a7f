"""Rotary embedding of q and k fused with the write of k and v to the paged cache.

q'[i] = q[i] cos - q[i + D/2] sin and q'[i + D/2] = q[i + D/2] cos + q[i] sin for i < D/2, with the angles of the
token's position; k alike. K is cached after rotation, so attention never sees positions. Caches of bytes get k and v as
kv_quant.py says. Where a model has such, each head of q and k is normalised before, and q is scaled after.
"""

import torch

from tritonmind.kernels import cpu
from tritonmind.kernels.dispatch import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_kv_pools,
    check_ndim,
    check_tensor,
    check_values_or_partial_sums,
    use_triton,
)
from tritonmind.kernels.flat_pages import FlatPages
from tritonmind.kernels.head_norms import HeadNorms
from tritonmind.kernels.kv_quant import KVScales


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
    flat: FlatPages | None = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate q and k of every token and write its k and v to the page slot that slot_mapping names.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], rows [q | k | v], contiguous, dtype of the caches; or the
    partial sums of a product, [S, T, ...] fp32. cos_sin: [max_pos, head_dim]
    fp32, rows [cos | sin]. positions: [T] int64 or int32, below max_pos. slot_mapping: [T] int32, block * block_size +
    offset; -1 writes nothing. k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], updated in place.
    norms: of the heads of q and k. query_scales: [max_pos] fp32, what the queries of a position are multiplied by.
    scales: those of caches that are uint8; a token's own are written. flat: a plan for these tokens, of which those of
    prompts are written to its scratch too, as what is stored stands for; not on a CPU. dtype: of the queries, for
    partial sums over such caches. out: [T, num_heads, head_dim]. Returns out, the rotated queries.
    Raises ValueError for a wrong shape, dtype, device or layout; position and slot values are the caller's promise.
    """
    if qkv.dim() == 3:
        dtype = k_cache.dtype if dtype is None else dtype
    else:
        check_ndim("qkv", qkv, 2)
        dtype = qkv.dtype
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected {' or '.join(map(str, FLOAT_DTYPES))}: what the queries get")
    num_tokens, device = qkv.shape[-2], qkv.device
    width = (num_heads + 2 * num_kv_heads) * head_dim
    check_values_or_partial_sums("qkv", qkv, (num_tokens, width), dtype, device)
    check_ndim("cos_sin", cos_sin, 2)
    check_tensor("cos_sin", cos_sin, (cos_sin.shape[0], head_dim), torch.float32, device)
    check_tensor("positions", positions, (num_tokens,), INDEX_DTYPES, device)
    check_tensor("slot_mapping", slot_mapping, (num_tokens,), torch.int32, device)
    check_kv_pools(k_cache, v_cache, dtype, device, scales)
    if k_cache.shape[1] != num_kv_heads or k_cache.shape[3] != head_dim:
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)}, expected [num_blocks, {num_kv_heads}, block_size, {head_dim}]"
        )
    if flat is not None:
        check_tensor("flat.slots", flat.slots, (num_tokens,), torch.int32, device)
    if norms is not None:
        check_tensor("norms.q", norms.q, (head_dim,), dtype, device)
        check_tensor("norms.k", norms.k, (head_dim,), dtype, device)
    if query_scales is not None:
        check_tensor("query_scales", query_scales, (len(cos_sin),), torch.float32, device)
    if out is not None:
        check_tensor("out", out, (num_tokens, num_heads, head_dim), dtype, device)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    if not use_triton(qkv):
        return cpu.rotary_kv_write(
            qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, **heads, norms=norms, query_scales=query_scales,
            scales=scales, dtype=dtype, out=out,
        )  # fmt: skip
    from tritonmind.kernels import triton_rotary

    if out is None:
        out = qkv.new_empty((num_tokens, num_heads, head_dim), dtype=dtype)
    return triton_rotary.rotary_kv_write(
        qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, norms, query_scales, scales, flat, out
    )
