"""Causal attention over the paged KV cache: o = softmax(softmax_scale * q K^T) V, heads in groups of one KV head.

Two launchers: one query token a sequence (decode), and several (prefill, a chunk of it, or draft tokens). The caches
are of the queries' dtype or, with scales, of bytes: see kv_quant.py. With a window a query sees the last `window`
tokens up to its own; pages before them are not read.
"""

from typing import NamedTuple

import torch

from tritonmind.kernels import cpu, tuning
from tritonmind.kernels.decode_plan import DecodePlan, decode_itemsize
from tritonmind.kernels.dispatch import (
    FLOAT_DTYPES,
    check_block_tables,
    check_kv_pools,
    check_ndim,
    check_tensor,
    use_triton,
)
from tritonmind.kernels.flat_pages import FlatPages
from tritonmind.kernels.kv_quant import KVScales

# Larger heads spill registers in the tiles of the Triton kernels.
MAX_HEAD_DIM = 128


class AttentionVariants(NamedTuple):
    """Sizes of steps that between them use every variant of the attention kernels, the largest first."""

    num_decodes: list[int]
    max_query_lens: list[int]


def attention_variants(
    max_num_seqs: int, max_query_len: int, *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int,
    dtype: torch.dtype, device: torch.device, int8_kv: bool = False,
) -> AttentionVariants:  # fmt: skip
    """What a warm-up must run for batches of up to `max_num_seqs` and query runs of up to `max_query_len`.

    dtype: of the queries. int8_kv: whether the KV cache is of bytes. A CPU has one variant of each.
    """
    if device.type == "cpu":
        return AttentionVariants([max_num_seqs], [max_query_len])
    sizes = {"head_dim": head_dim, "group": num_heads // num_kv_heads, "block_size": block_size}
    decodes = [
        rows
        for rows, _ in tuning.variants(
            "decode_attention", device, max_rows=max_num_seqs, **sizes, itemsize=decode_itemsize(dtype, int8_kv)
        )
    ]
    # Prompts attend over pages of their own type, whatever the cache's.
    prefills = [
        rows
        for rows, _ in tuning.variants(
            "prefill_attention", device, max_rows=max_query_len, **sizes, itemsize=dtype.itemsize
        )
    ]
    # With each tile, few sequences and many: they add their pieces up in different places.
    fewest = [rows + 1 for rows in decodes[1:]] + [1]
    return AttentionVariants(sorted({*decodes, *fewest}, reverse=True), prefills)


def _check(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
    context_lens: torch.Tensor, scales: KVScales | None, out: torch.Tensor | None,
) -> None:  # fmt: skip
    check_ndim("q", q, 3)
    shape, dtype, device = tuple(q.shape), q.dtype, q.device
    check_tensor("q", q, shape, FLOAT_DTYPES, device)
    check_kv_pools(k_cache, v_cache, dtype, device, scales)
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if shape[2] != head_dim or shape[1] % num_kv_heads:
        raise ValueError(f"q has shape {shape}, expected [.., k * {num_kv_heads}, {head_dim}] to match k_cache")
    if head_dim > MAX_HEAD_DIM and use_triton(q):
        raise ValueError(f"q has head_dim {head_dim}, expected at most {MAX_HEAD_DIM} on a GPU")
    check_ndim("context_lens", context_lens, 1)
    num_seqs = context_lens.shape[0]
    check_tensor("context_lens", context_lens, (num_seqs,), torch.int32, device)
    check_block_tables(block_tables, num_seqs, device)
    if out is not None:
        check_tensor("out", out, shape, dtype, device)


def plan_decode(
    context_lens: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    int8_kv: bool = False,
    window: int = 0,
    num_programs: int = 0,
) -> DecodePlan | None:
    """Cut the sequences of a step into pieces for paged_decode_attention, once for all layers; None on a CPU.

    context_lens: [B] int32, as paged_decode_attention gets them. dtype: of the queries. int8_kv: whether the KV cache
    is of bytes. window: as paged_decode_attention gets it. num_programs: about how many share the work; 0 chooses by
    card, and keeps pieces long enough to be worth their sum. The pieces follow from the whole batch: a row's result may
    differ between batches by the rounding of its sum, in one batch it is always the same. Raises ValueError for a wrong
    shape or dtype.
    """
    check_ndim("context_lens", context_lens, 1)
    check_tensor("context_lens", context_lens, tuple(context_lens.shape), torch.int32, context_lens.device)
    if not use_triton(context_lens):
        return None
    from tritonmind.kernels import triton_decode_plan

    return triton_decode_plan.plan_decode(
        context_lens, num_heads, num_kv_heads, head_dim, block_size, decode_itemsize(dtype, int8_kv), window,
        num_programs,
    )  # fmt: skip


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
    plan: DecodePlan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with one query token a sequence to the first context_len tokens of its pages.

    q: [B, H, D] fp32, fp16 or bf16, contiguous. k_cache, v_cache: [num_blocks, Hkv, block_size, D], dtype of q.
    block_tables: [B, max_blocks] int32, last stride 1. context_lens: [B] int32; a row of 0 gives zeros.
    window: how many tokens a query sees, its own included; 0 is all. scales: of caches that are uint8. plan: what
    plan_decode made of these context_lens and window; without one it is made here.
    out: [B, H, D]. Returns out. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    _check(q, k_cache, v_cache, block_tables, context_lens, scales, out)
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    if num_seqs != context_lens.shape[0]:
        raise ValueError(f"q has {num_seqs} rows, expected {context_lens.shape[0]}, one a sequence")
    if not use_triton(q):
        return cpu.paged_decode_attention(
            q, k_cache, v_cache, block_tables, context_lens, softmax_scale=softmax_scale, window=window, scales=scales,
            out=out,
        )  # fmt: skip
    from tritonmind.kernels import triton_decode_attention

    if out is None:
        out = torch.empty_like(q)
    if not num_seqs:
        return out
    if plan is None:
        plan = plan_decode(
            context_lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size,
            dtype=q.dtype, int8_kv=scales is not None, window=window,
        )  # fmt: skip
        assert plan is not None
    elif plan.arrivals.shape != (num_seqs, num_kv_heads) or plan.partial.shape[1:] != (num_heads, head_dim):
        raise ValueError(
            f"plan is for {plan.arrivals.shape[0]} sequences with {plan.arrivals.shape[1]} KV heads and outputs of "
            f"{tuple(plan.partial.shape[1:])}, expected {num_seqs}, {num_kv_heads} and {(num_heads, head_dim)}; call "
            "plan_decode for this batch"
        )
    return triton_decode_attention.paged_decode_attention(
        q, k_cache, v_cache, block_tables, plan, softmax_scale, window, scales, out
    )


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    max_query_len: int,
    softmax_scale: float,
    window: int = 0,
    scales: KVScales | None = None,
    flat: FlatPages | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally with the last tokens of S sequences, whose K and V are in the pages already.

    q: [T, H, D], the queries of sequence s at rows cu_seqlens_q[s] to cu_seqlens_q[s + 1]; the last of them sits at
    position context_lens[s] - 1. cu_seqlens_q: [S + 1] int32. context_lens: [S] int32. block_tables: [S, max_blocks]
    int32. max_query_len: at least the longest query run. flat: what plan_flat_pages made of these sequences, for caches
    that are uint8, on a GPU. Other arguments as for paged_decode_attention.
    Returns out [T, H, D]. Rows before cu_seqlens_q[0] are left as they are. Those beyond cu_seqlens_q[-1] (padding) are
    zeros on the CPU; on a GPU they are left as they are too.
    Raises ValueError for a wrong shape, dtype, device or layout.
    """
    _check(q, k_cache, v_cache, block_tables, context_lens, scales, out)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (context_lens.shape[0] + 1,), torch.int32, q.device)
    if max_query_len < 1:
        raise ValueError(f"max_query_len is {max_query_len}, expected at least 1")
    if not use_triton(q):
        return cpu.paged_prefill_attention(
            q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, softmax_scale=softmax_scale, window=window,
            scales=scales, out=out,
        )  # fmt: skip
    from tritonmind.kernels import triton_prefill_attention

    if out is None:
        out = torch.empty_like(q)
    if scales is None:
        return triton_prefill_attention.paged_prefill_attention(
            q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, max_query_len, softmax_scale, window, out
        )
    if flat is None or flat.k.dtype != q.dtype or flat.k.shape[1:] != k_cache.shape[1:]:
        found = None if flat is None else f"of {flat.k.dtype} {tuple(flat.k.shape)}"
        raise ValueError(
            f"flat is {found}, expected pages of {q.dtype} {tuple(k_cache.shape[1:])}; see plan_flat_pages"
        )
    from tritonmind.kernels import triton_flat_pages

    for group in flat.groups:
        copies = group.num_copies, group.blocks, group.pages
        triton_flat_pages.flatten_pages(k_cache, v_cache, scales, *copies, flat.k, flat.v)
        triton_prefill_attention.paged_prefill_attention(
            q, flat.k, flat.v, group.block_tables, group.cu_seqlens_q, group.context_lens,
            group.max_query_len or max_query_len, softmax_scale, window, out,
        )  # fmt: skip
    return out
