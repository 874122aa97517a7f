"""Causal attention over the paged KV cache: o = softmax(softmax_scale * q K^T) V, heads in groups of one KV head.

Two launchers: one query token a sequence (decode), and several (prefill, a chunk of it, or draft tokens).
"""

import torch

from tritonmind.kernels import cpu
from tritonmind.kernels.dispatch import (
    FLOAT_DTYPES,
    check_block_tables,
    check_kv_pools,
    check_ndim,
    check_tensor,
    use_triton,
)

# Larger heads spill registers in the tiles of triton_attention.py.
MAX_HEAD_DIM = 128
# A max_query_len for each variant of the prefill kernel: what a warm-up must run.
PREFILL_VARIANTS = (16, 64, 128)


def decode_variants(max_num_seqs: int, num_kv_heads: int, max_blocks: int, device: torch.device) -> list[int]:
    """A batch size for each variant of the decode kernel that batches of up to `max_num_seqs` use on a GPU.

    max_blocks: columns of the block tables. A CPU has one variant.
    """
    if device.type == "cpu":
        return [max_num_seqs]
    from tritonmind.kernels import triton_attention

    by_splits = {
        triton_attention.choose_num_splits(size, num_kv_heads, max_blocks, device): size
        for size in range(1, max_num_seqs + 1)
    }
    return sorted(by_splits.values())


def _check(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
    context_lens: torch.Tensor, out: torch.Tensor | None,
) -> None:  # fmt: skip
    check_ndim("q", q, 3)
    shape, dtype, device = tuple(q.shape), q.dtype, q.device
    check_tensor("q", q, shape, FLOAT_DTYPES, device)
    check_kv_pools(k_cache, v_cache, dtype, device)
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


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    softmax_scale: float,
    num_splits: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with one query token a sequence to the first context_len tokens of its pages.

    q: [B, H, D] fp32, fp16 or bf16, contiguous. k_cache, v_cache: [num_blocks, Hkv, block_size, D], dtype of q.
    block_tables: [B, max_blocks] int32, last stride 1. context_lens: [B] int32; a row of 0 gives zeros.
    num_splits: programs that share a sequence's pages, 0 chooses by batch and heads (fixed for a CUDA graph).
    out: [B, H, D]. Returns out. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    _check(q, k_cache, v_cache, block_tables, context_lens, out)
    if q.shape[0] != context_lens.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows, expected {context_lens.shape[0]}, one a sequence")
    if not use_triton(q):
        return cpu.paged_decode_attention(
            q, k_cache, v_cache, block_tables, context_lens, softmax_scale=softmax_scale, out=out
        )
    from tritonmind.kernels import triton_attention

    return triton_attention.paged_decode_attention(
        q, k_cache, v_cache, block_tables, context_lens, softmax_scale, num_splits,
        torch.empty_like(q) if out is None else out,
    )  # fmt: skip


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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally with the last tokens of S sequences, whose K and V are in the pages already.

    q: [T, H, D], the queries of sequence s at rows cu_seqlens_q[s] to cu_seqlens_q[s + 1]; the last of them sits at
    position context_lens[s] - 1. cu_seqlens_q: [S + 1] int32. context_lens: [S] int32. block_tables: [S, max_blocks]
    int32. max_query_len: at least the longest query run. Other arguments as for paged_decode_attention.
    Returns out [T, H, D]. Rows beyond cu_seqlens_q[-1] (padding) are zeros on the CPU and unspecified on a GPU.
    Raises ValueError for a wrong shape, dtype, device or layout.
    """
    _check(q, k_cache, v_cache, block_tables, context_lens, out)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (context_lens.shape[0] + 1,), torch.int32, q.device)
    if max_query_len < 1:
        raise ValueError(f"max_query_len is {max_query_len}, expected at least 1")
    if not use_triton(q):
        return cpu.paged_prefill_attention(
            q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, softmax_scale=softmax_scale, out=out
        )
    from tritonmind.kernels import triton_attention

    return triton_attention.paged_prefill_attention(
        q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, max_query_len, softmax_scale,
        torch.empty_like(q) if out is None else out,
    )  # fmt: skip
