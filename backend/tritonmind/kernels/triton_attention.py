"""The kernels behind attention.py: online softmax over KV tiles that lie inside one page, in the exp2 domain.

Decode splits a sequence's tiles over programs and combines their partial outputs with their log-sum-exps; the query
heads of a KV head share one tile. Prefill gives each program a block of queries of one head.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import math

import torch
import triton
import triton.language as tl

# Rows of the smallest tile that the tensor cores take.
MIN_ROWS = 16
# KV tokens of a tile, or a page where that is smaller. fp32 is the exact path, without tensor cores: its tiles are
# small because ptxas takes minutes over large ones.
MAX_TILE_TOKENS = 64
MAX_FP32_TILE = 32
MAX_SPLITS = 32
# Partial outputs of more programs than this an SM only cost their combination.
PROGRAMS_PER_SM = 4


@triton.jit
def _attend_tile(
    q,  # [ROWS, BLOCK_D]
    acc,  # [ROWS, BLOCK_D] fp32, output so far, times row_sum
    row_max,  # [ROWS] fp32, finite
    row_sum,  # [ROWS] fp32
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,  # this sequence's row
    kv_head,
    tile,
    visible,  # [ROWS] tokens that a row may see; read when MASKED
    context_len,
    qk_scale,  # softmax scale * log2(e)
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    block = tl.load(block_table_ptr + tile * BLOCK_N // BLOCK_SIZE).to(tl.int64)
    row = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE
    element = row[:, None] * HEAD_DIM + dim[None, :]
    inside = (dim < HEAD_DIM)[None, :]
    k = tl.load(k_cache_ptr + element, mask=inside, other=0.0)
    # fp32 must not become tf32: the fp32 path is the exact one.
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    if MASKED:
        scores = tl.where(token[None, :] < visible[:, None], scores, float("-inf"))
        # The rest of a last page may hold NaN, which a weight of zero would not silence.
        inside = inside & (token < context_len)[:, None]
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    v = tl.load(v_cache_ptr + element, mask=inside, other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_max, row_sum * shrink + tl.sum(weights, axis=1)


@triton.jit(
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["block_tables_ptr", "context_lens_ptr"],
)
def _decode_kernel(
    q_ptr,  # [B, NUM_KV_HEADS * GROUP, HEAD_DIM]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,
    block_tables_ptr,
    block_table_stride,
    context_lens_ptr,  # [B]
    out_ptr,  # [B, NUM_KV_HEADS * GROUP, HEAD_DIM], written when NUM_SPLITS is 1
    partial_ptr,  # [B, heads, NUM_SPLITS, HEAD_DIM] fp32, else
    lse_ptr,  # [B, heads, NUM_SPLITS] fp32, base 2
    qk_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context_len = tl.load(context_lens_ptr + seq)
    num_tiles = tl.cdiv(context_len, BLOCK_N)
    tiles_per_split = tl.cdiv(num_tiles, NUM_SPLITS)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)
    # The combine kernel reads no split without tiles; with one split, a row without context still wants its zeros.
    if NUM_SPLITS > 1 and first_tile >= end_tile:
        return

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    head = (seq * NUM_KV_HEADS + kv_head) * GROUP + row
    inside = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + head[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    row_max = tl.full((ROWS,), -1e30, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    visible = tl.full((ROWS,), 0, tl.int32) + context_len
    for tile in range(first_tile, end_tile):
        acc, row_max, row_sum = _attend_tile(
            q, acc, row_max, row_sum, k_cache_ptr, v_cache_ptr, block_tables_ptr + seq * block_table_stride,
            kv_head, tile, visible, context_len, qk_scale,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True,
        )  # fmt: skip
    acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    if NUM_SPLITS == 1:
        tl.store(out_ptr + head[:, None] * HEAD_DIM + dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = head * NUM_SPLITS + split
        tl.store(partial_ptr + part[:, None] * HEAD_DIM + dim[None, :], acc, mask=inside)
        tl.store(lse_ptr + part, row_max + tl.log2(row_sum), mask=row < GROUP)


@triton.jit(do_not_specialize_on_alignment=["context_lens_ptr"])
def _combine_kernel(
    partial_ptr,  # [B, NUM_HEADS, NUM_SPLITS, HEAD_DIM] fp32
    lse_ptr,  # [B, NUM_HEADS, NUM_SPLITS] fp32
    context_lens_ptr,  # [B]
    out_ptr,  # [B, NUM_HEADS, HEAD_DIM]
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    head = seq * NUM_HEADS + tl.program_id(1)
    num_tiles = tl.cdiv(tl.load(context_lens_ptr + seq), BLOCK_N)
    num_used = tl.cdiv(num_tiles, tl.maximum(tl.cdiv(num_tiles, NUM_SPLITS), 1))
    split = tl.arange(0, BLOCK_SPLITS)
    dim = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + head * NUM_SPLITS + split, mask=split < num_used, other=-1e30)
    weight = tl.exp2(lse - tl.max(lse, axis=0))
    inside = (split < num_used)[:, None] & (dim < HEAD_DIM)[None, :]
    partial = tl.load(
        partial_ptr + (head * NUM_SPLITS + split)[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0
    )
    out = tl.sum(partial * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out_ptr + head * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit(
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["block_tables_ptr", "cu_seqlens_q_ptr", "context_lens_ptr"],
)
def _prefill_kernel(
    q_ptr,  # [T, NUM_HEADS, HEAD_DIM]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,
    block_tables_ptr,
    block_table_stride,
    cu_seqlens_q_ptr,  # [S + 1]
    context_lens_ptr,  # [S]
    out_ptr,  # [T, NUM_HEADS, HEAD_DIM]
    qk_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    query_block = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    start = tl.load(cu_seqlens_q_ptr + seq)
    query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - start
    first_query = query_block * BLOCK_M
    if first_query >= query_len:
        return

    context_len = tl.load(context_lens_ptr + seq)
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
    block_table_ptr = block_tables_ptr + seq * block_table_stride
    for tile in range(0, num_full):
        acc, row_max, row_sum = _attend_tile(
            q, acc, row_max, row_sum, k_cache_ptr, v_cache_ptr, block_table_ptr, kv_head, tile, visible, context_len,
            qk_scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, False,
        )  # fmt: skip
    for tile in range(num_full, num_tiles):
        acc, row_max, row_sum = _attend_tile(
            q, acc, row_max, row_sum, k_cache_ptr, v_cache_ptr, block_table_ptr, kv_head, tile, visible, context_len,
            qk_scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True,
        )  # fmt: skip
    acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    tl.store(out_ptr + element, acc.to(out_ptr.dtype.element_ty), mask=inside)


def choose_num_splits(batch_size: int, num_kv_heads: int, max_blocks: int, device: torch.device) -> int:
    """A power of two, so that few variants compile: enough programs for the GPU, no more splits than pages."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = min(PROGRAMS_PER_SM * num_sms // (batch_size * num_kv_heads), max_blocks, MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    softmax_scale: float,
    num_splits: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch on checked arguments; see attention.paged_decode_attention."""
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    if not num_seqs:
        return out
    num_splits = num_splits or choose_num_splits(num_seqs, num_kv_heads, block_tables.shape[1], q.device)
    group = num_heads // num_kv_heads
    block_d, block_n = triton.next_power_of_2(head_dim), tile_tokens(block_size, q.dtype)
    partial = lse = None
    if num_splits > 1:
        partial = torch.empty((num_seqs, num_heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((num_seqs, num_heads, num_splits), dtype=torch.float32, device=q.device)
    _decode_kernel[(num_seqs, num_kv_heads, num_splits)](
        q, k_cache, v_cache, block_tables, block_tables.stride(0), context_lens, out, partial, lse,
        softmax_scale * math.log2(math.e),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_SIZE=block_size,
        BLOCK_N=block_n, ROWS=max(MIN_ROWS, triton.next_power_of_2(group)), NUM_SPLITS=num_splits,
        num_warps=2, num_stages=2 if q.dtype == torch.float32 else 3,
    )  # fmt: skip
    if num_splits > 1:
        _combine_kernel[(num_seqs, num_heads)](
            partial, lse, context_lens, out,
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_N=block_n, NUM_SPLITS=num_splits,
            BLOCK_SPLITS=triton.next_power_of_2(num_splits), num_warps=2,
        )  # fmt: skip
    return out


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    softmax_scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch on checked arguments; see attention.paged_prefill_attention."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_seqs = len(context_lens)
    if not num_tokens or not num_seqs:
        return out
    block_m = prefill_block_m(max_query_len, q.dtype)
    _prefill_kernel[(triton.cdiv(max_query_len, block_m), num_heads, num_seqs)](
        q, k_cache, v_cache, block_tables, block_tables.stride(0), cu_seqlens_q, context_lens, out,
        softmax_scale * math.log2(math.e),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size, BLOCK_M=block_m, BLOCK_N=tile_tokens(block_size, q.dtype),
        num_warps=8 if block_m == 128 else 4, num_stages=2 if q.dtype == torch.float32 else 3,
    )  # fmt: skip
    return out


def tile_tokens(block_size: int, dtype: torch.dtype) -> int:
    """KV tokens of a tile: a page or an even part of it."""
    return min(block_size, MAX_FP32_TILE if dtype == torch.float32 else MAX_TILE_TOKENS)


def prefill_block_m(max_query_len: int, dtype: torch.dtype) -> int:
    """Query rows of a program: as few as hold max_query_len, within what registers allow."""
    if max_query_len <= 16:
        return 16
    if dtype == torch.float32:
        return MAX_FP32_TILE
    return 64 if max_query_len <= 64 else 128
