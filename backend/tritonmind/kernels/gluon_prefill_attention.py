"""The prefill kernel for long runs on Hopper, in Gluon: one warp fetches pages, two warp groups attend.

Each warp group has half of a block's queries. It lets the tensor cores multiply the weights of one tile by V while it
computes the weights of the next, and drifts apart from the other group, so that neither cores nor units for
exponentials wait. The fetching warp runs ahead by as many tiles as shared memory holds, into the next block too:
programs stay, one to an SM, and take blocks in turn, those that see most first.

Tiles of a block go from its last to its first, so that what needs a mask comes first.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tritonmind.kernels import pdl, tuning
from tritonmind.kernels.gluon_hopper import FETCH_REGISTERS, GROUP_REGISTERS, GROUP_WARPS, barrier, fetch_tile
from tritonmind.kernels.tile_table import LONG_RUN_BLOCK_M, LONG_RUN_BLOCK_N


@gluon.jit
def _sequence_of(block, cu_seqlens_q_ptr, num_seqs, BLOCK_M: gl.constexpr):
    """As in triton_prefill_attention.py."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if gl.load(cu_seqlens_q_ptr + middle) // BLOCK_M + middle <= block:
            low = middle
        else:
            high = middle
    return low


@gluon.jit
def _turn(turn):
    """What this program does in a turn: from one to the next their order is reversed, which evens out their shares."""
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    return turn * num_programs + gl.where(turn % 2 == 0, program, num_programs - 1 - program)


@gluon.jit
def _block_of(index, lengths, NUM_HEADS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Head, sequence, its first query's row, its number of queries, the block's first query, context_len and tiles.

    A block before or beyond a sequence's queries has no tiles, any other has one at least.
    """
    cu_seqlens_q_ptr, context_lens_ptr, num_seqs, num_blocks = lengths
    head = index % NUM_HEADS
    block = num_blocks - 1 - index // NUM_HEADS
    seq = _sequence_of(block, cu_seqlens_q_ptr, num_seqs, BLOCK_M)
    start = gl.load(cu_seqlens_q_ptr + seq)
    query_len = gl.load(cu_seqlens_q_ptr + seq + 1) - start
    first_query = (block - start // BLOCK_M - seq) * BLOCK_M
    context_len = gl.load(context_lens_ptr + seq)
    last_visible = gl.minimum(context_len - query_len + first_query + BLOCK_M, context_len)
    num_tiles = gl.maximum((last_visible + BLOCK_N - 1) // BLOCK_N, 1)
    num_tiles = gl.where((first_query >= 0) & (first_query < query_len), num_tiles, 0)
    return head, seq, start, query_len, first_query, context_len, num_tiles


@gluon.jit
def _fetch(
    k_desc, v_desc, tiles, block_tables_ptr, block_table_stride, lengths,
    NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, NUM_SLOTS: gl.constexpr,
):  # fmt: skip
    k_tiles, v_tiles, k_full, v_full, k_free, v_free = tiles
    tile_bytes: gl.constexpr = BLOCK_N * HEAD_DIM * k_desc.dtype.primitive_bitwidth // 8
    num_programs = gl.num_programs(0)
    total = lengths[3] * NUM_HEADS
    count = 0
    for turn in range(0, (total + num_programs - 1) // num_programs):
        index = _turn(turn)
        if index < total:
            head, seq, _, _, _, _, num_tiles = _block_of(index, lengths, NUM_HEADS, BLOCK_M, BLOCK_N)
            kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
            block_table_ptr = block_tables_ptr + seq.to(gl.int64) * block_table_stride
            for i in range(0, num_tiles):
                token = (num_tiles - 1 - i) * BLOCK_N
                page = gl.load(block_table_ptr + token // BLOCK_SIZE)
                row = (page * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE
                slot = count % NUM_SLOTS
                phase = (count // NUM_SLOTS) & 1
                mbarrier.wait(k_free.index(slot), phase ^ 1)
                mbarrier.expect(k_full.index(slot), tile_bytes)
                fetch_tile(k_desc, [row, 0], k_full.index(slot), k_tiles.index(slot))
                mbarrier.wait(v_free.index(slot), phase ^ 1)
                mbarrier.expect(v_full.index(slot), tile_bytes)
                fetch_tile(v_desc, [row, 0], v_full.index(slot), v_tiles.index(slot))
                count += 1


@gluon.jit
def _weights(scores, row_max, row_sum, tile, num_full, visible, qk_scale, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    if tile >= num_full:
        token = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        scores = gl.where(token[None, :] < visible[:, None], scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * qk_scale)
    weights = gl.exp2(scores * qk_scale - new_max[:, None])
    shrink = gl.exp2(row_max - new_max)
    return weights, new_max, row_sum * shrink + gl.sum(weights, axis=1), shrink


@gluon.jit
def _attend(
    half: gl.constexpr, q_ptr, out_ptr, tiles, lengths, qk_scale,
    NUM_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    NUM_SLOTS: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    num_programs = gl.num_programs(0)
    total = lengths[3] * NUM_HEADS
    count = 0
    for turn in range(0, (total + num_programs - 1) // num_programs):
        index = _turn(turn)
        if index < total:
            head, _, start, query_len, first_query, context_len, num_tiles = _block_of(
                index, lengths, NUM_HEADS, BLOCK_M, BLOCK_N
            )
            if num_tiles > 0:
                _attend_block(
                    q_ptr, out_ptr, tiles, count, start.to(gl.int64), query_len, first_query + half * (BLOCK_M // 2),
                    context_len, num_tiles, head, qk_scale, NUM_HEADS, HEAD_DIM, BLOCK_M // 2, BLOCK_N, NUM_SLOTS, S,
                )  # fmt: skip
            count += num_tiles


@gluon.jit
def _attend_block(
    q_ptr, out_ptr, tiles, count, start, query_len, first_query, context_len, num_tiles, head, qk_scale,
    NUM_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    NUM_SLOTS: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    k_tiles, v_tiles, k_full, v_full, k_free, v_free = tiles
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, HEAD_DIM, 16])  # noqa: E741
    Q: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q = _load_rows(q_ptr, start, query_len, first_query, head, NUM_HEADS, HEAD_DIM, ROWS, Q)
    # A query sees the tokens up to its own. Tiles that even the first query sees whole need no mask.
    visible = context_len - query_len + first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S)) + 1
    num_full = gl.maximum(context_len - query_len + first_query + 1, 0) // BLOCK_N
    row_max = gl.full([ROWS], -1e30, gl.float32, layout=gl.SliceLayout(1, S))
    row_sum = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, S))
    acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, layout=O)
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, layout=S)

    slot = count % NUM_SLOTS
    phase = (count // NUM_SLOTS) & 1
    mbarrier.wait(k_full.index(slot), phase)
    scores = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    barrier()
    mbarrier.arrive(k_free.index(slot), count=1)
    weights, row_max, row_sum, shrink = _weights(
        scores, row_max, row_sum, num_tiles - 1, num_full, visible, qk_scale, BLOCK_N, S
    )
    p = gl.convert_layout(weights.to(dtype), P)
    mbarrier.wait(v_full.index(slot), phase)
    _clear_unused(v_tiles.index(slot), context_len - (num_tiles - 1) * BLOCK_N, HEAD_DIM, BLOCK_N)
    for i in range(1, num_tiles):
        before = slot
        slot = (count + i) % NUM_SLOTS
        phase = ((count + i) // NUM_SLOTS) & 1
        mbarrier.wait(k_full.index(slot), phase)
        scores_token = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc_token = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores_token])
        weights, row_max, row_sum, shrink = _weights(
            scores, row_max, row_sum, num_tiles - 1 - i, num_full, visible, qk_scale, BLOCK_N, S
        )
        next_p = gl.convert_layout(weights.to(dtype), P)
        # Waiting for the next V here, a loop, keeps ptxas from moving the exponentials behind the end of the product.
        mbarrier.wait(v_full.index(slot), phase)
        acc, p, next_p = warpgroup_mma_wait(0, deps=[acc_token, p, next_p])
        barrier()
        mbarrier.arrive(k_free.index(slot), count=1)
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
        p = next_p
    acc = warpgroup_mma(p, v_tiles.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    barrier()
    mbarrier.arrive(v_free.index(slot), count=1)
    row_sum = gl.where(row_sum > 0, row_sum, 1.0)
    acc = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, O))[:, None]
    _store_rows(out_ptr, acc.to(dtype), start, query_len, first_query, head, NUM_HEADS, HEAD_DIM, ROWS, O)


@gluon.jit
def _load_rows(
    q_ptr, start, query_len, first_query, head, NUM_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    query = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    element = ((start + query)[:, None] * NUM_HEADS + head) * HEAD_DIM + dim[None, :]
    return gl.load(q_ptr + element, mask=(query < query_len)[:, None], other=0.0)


@gluon.jit
def _store_rows(
    out_ptr, rows, start, query_len, first_query, head, NUM_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    query = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    element = ((start + query)[:, None] * NUM_HEADS + head) * HEAD_DIM + dim[None, :]
    gl.store(out_ptr + element, rows, mask=(query < query_len)[:, None])


@gluon.jit
def _clear_unused(v_tile, num_used, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):
    """The rest of a last page may hold NaN, which a weight of zero would not silence. Both groups write the same."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [gl.num_warps(), 1], [1, 0])
    if num_used < BLOCK_N:
        used = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout)) < num_used
        values = v_tile.load(layout)
        v_tile.store(gl.where(used[:, None], values, 0.0).to(values.dtype))
        fence_async_shared()
        barrier()


@gluon.jit(
    do_not_specialize=["block_table_stride", "num_seqs", "num_blocks"],
    do_not_specialize_on_alignment=["block_tables_ptr", "cu_seqlens_q_ptr", "context_lens_ptr"],
)
def _long_prefill_kernel(
    q_ptr,  # [T, NUM_HEADS, HEAD_DIM]
    k_desc,  # [num_blocks * NUM_KV_HEADS * BLOCK_SIZE, HEAD_DIM], in tiles of [BLOCK_N, HEAD_DIM]
    v_desc,
    block_tables_ptr,
    block_table_stride,
    cu_seqlens_q_ptr,  # [S + 1], of which the first may be more than 0
    context_lens_ptr,  # [S]
    num_seqs,
    num_blocks,  # of BLOCK_M queries, at least as many as there are
    out_ptr,  # [T, NUM_HEADS, HEAD_DIM]
    qk_scale,  # softmax scale * log2(e)
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_SLOTS: gl.constexpr,
    PDL: gl.constexpr,
):
    pdl.wait(PDL)
    pdl.let_next_start(PDL)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    k_tiles = gl.allocate_shared_memory(dtype, [NUM_SLOTS, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [NUM_SLOTS, BLOCK_N, HEAD_DIM], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], barriers)
    v_full = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], barriers)
    k_free = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], barriers)
    v_free = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], barriers)
    for slot in gl.static_range(NUM_SLOTS):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        # Both groups let a tile go.
        mbarrier.init(k_free.index(slot), count=2)
        mbarrier.init(v_free.index(slot), count=2)
    fence_async_shared()
    barrier()
    tiles = (k_tiles, v_tiles, k_full, v_full, k_free, v_free)
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    lengths = (cu_seqlens_q_ptr, context_lens_ptr, num_seqs, num_blocks)
    gl.warp_specialize(
        [
            (_attend, (upper, q_ptr, out_ptr, tiles, lengths, qk_scale,
                       NUM_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, NUM_SLOTS)),
            (_attend, (lower, q_ptr, out_ptr, tiles, lengths, qk_scale,
                       NUM_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, NUM_SLOTS)),
            (_fetch, (k_desc, v_desc, tiles, block_tables_ptr, block_table_stride, lengths,
                      NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, NUM_SLOTS)),
        ],
        [4, 1],
        [GROUP_REGISTERS, FETCH_REGISTERS],
    )  # fmt: skip


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    num_slots: int,
) -> torch.Tensor:
    """Launch on checked arguments of sizes that tile_table.takes_long_runs; see attention.paged_prefill_attention."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_seqs = len(context_lens)
    # Each sequence fills its last block up, and no more.
    num_blocks = num_tokens // LONG_RUN_BLOCK_M + num_seqs
    element = gl.float16 if q.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for([LONG_RUN_BLOCK_N, head_dim], element)
    k_desc, v_desc = (
        TensorDescriptor.from_tensor(cache.view(-1, head_dim), [LONG_RUN_BLOCK_N, head_dim], layout)
        for cache in (k_cache, v_cache)
    )
    use_pdl = pdl.use_pdl(q.device)
    _long_prefill_kernel[(min(tuning.card(q.device).num_sms, num_blocks * num_heads),)](
        q, k_desc, v_desc, block_tables, block_tables.stride(0), cu_seqlens_q, context_lens, num_seqs, num_blocks, out,
        softmax_scale * math.log2(math.e),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        BLOCK_M=LONG_RUN_BLOCK_M, BLOCK_N=LONG_RUN_BLOCK_N, NUM_SLOTS=num_slots, PDL=use_pdl,
        num_warps=GROUP_WARPS, launch_pdl=use_pdl,
    )  # fmt: skip
    return out
