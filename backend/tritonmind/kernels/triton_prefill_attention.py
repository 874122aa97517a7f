"""The prefill kernel behind attention.py: each program gives a block of queries of one head its attention.

Programs are dealt out heads first, and the last block of queries, which sees most, before the first: what is left at
the end is short. A sequence's blocks are found in the prefix sums of the query lengths, so that the grid follows from
the number of tokens alone.

Online softmax over KV tiles that lie inside one page, in the exp2 domain.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import math

import torch
import triton
import triton.language as tl

from tritonmind.kernels import pdl, tuning
from tritonmind.kernels.dispatch import MIN_TILE
from tritonmind.kernels.tile_table import LONG_RUN_BLOCK_M, MIN_LONG_RUN, takes_long_runs


@triton.jit
def _attend_tile(
    q,  # [BLOCK_M, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D] fp32, output so far, times row_sum
    row_max,  # [BLOCK_M] fp32, finite
    row_sum,  # [BLOCK_M] fp32
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,  # this sequence's row
    kv_head,
    tile,
    visible,  # [BLOCK_M] tokens that a row may see; read when MASKED
    context_len,
    qk_scale,  # softmax scale * log2(e)
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    offset = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    start = tile * BLOCK_N
    block = tl.load(block_table_ptr + start // BLOCK_SIZE).to(tl.int64)
    # One 64-bit address a tile; what follows is the same in each tile, and left out of the loop.
    first = ((block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE) * HEAD_DIM
    element = offset[:, None] * HEAD_DIM + dim[None, :]
    if HEAD_DIM == BLOCK_D:
        k = tl.load(k_cache_ptr + first + element)
    else:
        k = tl.load(k_cache_ptr + first + element, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    # fp32 must not become tf32: the fp32 path is the exact one.
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        seen = (start + offset)[None, :] < visible[:, None]
        if WINDOW:
            seen = seen & ((start + offset)[None, :] >= visible[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * qk_scale)
    weights = tl.exp2(scores * qk_scale - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    if MASKED:
        # The rest of a last page may hold NaN, which a weight of zero would not silence.
        inside = (start + offset < context_len)[:, None] & (dim < HEAD_DIM)[None, :]
        v = tl.load(v_cache_ptr + first + element, mask=inside, other=0.0)
    elif HEAD_DIM == BLOCK_D:
        v = tl.load(v_cache_ptr + first + element)
    else:
        v = tl.load(v_cache_ptr + first + element, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_max, row_sum * shrink + tl.sum(weights, axis=1)


@triton.jit
def _sequence_of(block, cu_seqlens_q_ptr, num_seqs, BLOCK_M: tl.constexpr):
    """The last sequence that begins at or before this block of queries, if each begins with a block of its own.

    Sequence s begins at block cu_seqlens_q[s] // BLOCK_M + s: early enough for the blocks of those before it.
    """
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q_ptr + middle) // BLOCK_M + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit(
    do_not_specialize=["block_table_stride", "num_seqs"],
    do_not_specialize_on_alignment=["block_tables_ptr", "cu_seqlens_q_ptr", "context_lens_ptr"],
)
def _prefill_kernel(
    q_ptr,  # [T, NUM_HEADS, HEAD_DIM]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,
    block_tables_ptr,
    block_table_stride,
    cu_seqlens_q_ptr,  # [S + 1], of which the first may be more than 0
    context_lens_ptr,  # [S]
    num_seqs,
    out_ptr,  # [T, NUM_HEADS, HEAD_DIM]
    qk_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    pdl.wait(PDL)
    seq = _sequence_of(block, cu_seqlens_q_ptr, num_seqs, BLOCK_M)
    start = tl.load(cu_seqlens_q_ptr + seq)
    query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - start
    first_query = (block - start // BLOCK_M - seq) * BLOCK_M
    if (first_query < 0) | (first_query >= query_len):
        return

    context_len = tl.load(context_lens_ptr + seq)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    query = first_query + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    element = ((start.to(tl.int64) + query)[:, None] * NUM_HEADS + head) * HEAD_DIM + dim[None, :]
    inside = (query < query_len)[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + element, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    # A query sees the tokens up to its own. Tiles that even the first query sees whole need no mask.
    visible = context_len - query_len + query + 1
    first_visible = context_len - query_len + first_query + 1
    last_visible = tl.minimum(first_visible + BLOCK_M - 1, context_len)
    num_full = tl.maximum(first_visible, 0) // BLOCK_N
    num_tiles = tl.cdiv(tl.maximum(last_visible, 0), BLOCK_N)
    begin = 0
    if WINDOW:
        # Before all queries' windows nothing is read; tiles that the last query does not see whole need a mask too.
        begin = tl.maximum(first_visible - WINDOW, 0) // BLOCK_N
        begin_full = tl.cdiv(tl.maximum(first_visible + BLOCK_M - 1 - WINDOW, 0), BLOCK_N)
        begin_full = tl.minimum(begin_full, num_full)
    block_table_ptr = block_tables_ptr + seq.to(tl.int64) * block_table_stride
    if WINDOW:
        for tile in range(begin, begin_full):
            acc, row_max, row_sum = _attend_tile(
                q, acc, row_max, row_sum, k_cache_ptr, v_cache_ptr, block_table_ptr, kv_head, tile, visible,
                context_len, qk_scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, WINDOW, True,
            )  # fmt: skip
        begin = begin_full
    for tile in range(begin, num_full):
        acc, row_max, row_sum = _attend_tile(
            q, acc, row_max, row_sum, k_cache_ptr, v_cache_ptr, block_table_ptr, kv_head, tile, visible, context_len,
            qk_scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, WINDOW, False,
        )  # fmt: skip
    for tile in range(num_full, num_tiles):
        acc, row_max, row_sum = _attend_tile(
            q, acc, row_max, row_sum, k_cache_ptr, v_cache_ptr, block_table_ptr, kv_head, tile, visible, context_len,
            qk_scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, WINDOW, True,
        )  # fmt: skip
    pdl.let_next_start(PDL)
    acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    tl.store(out_ptr + element, acc.to(out_ptr.dtype.element_ty), mask=inside)


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    softmax_scale: float,
    window: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch on checked arguments; see attention.paged_prefill_attention."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_seqs = len(context_lens)
    if not num_tokens or not num_seqs:
        return out
    group, itemsize = num_heads // num_kv_heads, q.element_size()
    sizes = {"head_dim": head_dim, "group": group, "block_size": block_size, "itemsize": itemsize}
    takes_long = takes_long_runs(tuning.card(q.device), sizes)
    # The kernel for long runs knows no window.
    rows = min(max_query_len, MIN_LONG_RUN - 1) if takes_long and window else max_query_len
    tile = tuning.tile("prefill_attention", q.device, rows=rows, **sizes)
    if tile.block_m == LONG_RUN_BLOCK_M and takes_long and not window:
        from tritonmind.kernels import gluon_prefill_attention

        return gluon_prefill_attention.paged_prefill_attention(
            q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, softmax_scale, out, tile.num_stages
        )
    use_pdl = pdl.use_pdl(q.device)
    # Each sequence fills its last block up, and no more.
    _prefill_kernel[(num_heads, num_tokens // tile.block_m + num_seqs)](
        q, k_cache, v_cache, block_tables, block_tables.stride(0), cu_seqlens_q, context_lens, num_seqs, out,
        softmax_scale * math.log2(math.e),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_D=max(MIN_TILE, triton.next_power_of_2(head_dim)), BLOCK_SIZE=block_size, BLOCK_M=tile.block_m,
        BLOCK_N=min(tile.block_n, block_size), WINDOW=window, PDL=use_pdl, num_warps=tile.num_warps,
        num_stages=tile.num_stages, launch_pdl=use_pdl,
    )  # fmt: skip
    return out
