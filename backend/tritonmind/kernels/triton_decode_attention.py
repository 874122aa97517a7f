"""The decode kernels behind attention.py: the attention of one layer, which follows the plan of triton_decode_plan.py.

A program attends for a piece of a sequence and a KV head, whose query heads share a tile. Over int8 pages the kernel of
triton_decode_int8.py does.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import math

import torch
import triton
import triton.language as tl

from tritonmind.kernels import pdl
from tritonmind.kernels.decode_plan import DecodePlan, decode_itemsize
from tritonmind.kernels.dispatch import MIN_TILE
from tritonmind.kernels.kv_quant import KVScales
from tritonmind.kernels.tile_table import MIN_ROWS
from tritonmind.kernels.triton_decode_int8 import launch_int8
from tritonmind.kernels.triton_decode_pieces import COMBINE_ELEMENTS, adds_up_inside, combine, load_piece, write_piece
from tritonmind.kernels.triton_decode_plan import decode_tile


@triton.jit(do_not_specialize=["block_table_stride"], do_not_specialize_on_alignment=["block_tables_ptr"])
def _decode_kernel(
    q_ptr,  # [B, NUM_KV_HEADS * GROUP, HEAD_DIM]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,
    block_tables_ptr,
    block_table_stride,
    pieces_ptr,  # [max_pieces, 4], see _plan_kernel
    arrivals_ptr,  # [B, NUM_KV_HEADS], how many pieces have ended, a multiple of their number between launches
    partial_ptr,  # [max_pieces, heads, HEAD_DIM] fp32, written for sequences of several pieces
    lse_ptr,  # [max_pieces, heads] fp32, base 2
    out_ptr,  # [B, NUM_KV_HEADS * GROUP, HEAD_DIM]
    qk_scale,  # softmax scale * log2(e)
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    ADD_UP: tl.constexpr,  # pieces of one sequence here; else the combine kernel does
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    pdl.wait(PDL)
    pdl.let_next_start(PDL)
    seq, index, num_pieces, context_len, first_tile, end_tile = load_piece(pieces_ptr, piece, WINDOW, BLOCK_N)
    if seq < 0:
        return

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    offset = tl.arange(0, BLOCK_N)
    first_head = (seq * NUM_KV_HEADS + kv_head) * GROUP
    inside = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    element = row[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + first_head * HEAD_DIM + element, mask=inside, other=0.0)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    row_max = tl.full((ROWS,), -1e30, tl.float32)
    # Added up across a tile at the end only: a sum of rows has its warps wait for one another.
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    block_table_ptr = block_tables_ptr + seq * block_table_stride
    for tile in range(first_tile, end_tile):
        start = tile * BLOCK_N
        block = tl.load(block_table_ptr + start // BLOCK_SIZE).to(tl.int64)
        page_row = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE
        # What lies beyond the context is not read: it costs time, and may be NaN, which no weight of zero silences.
        used = start + offset < context_len
        if WINDOW:
            used = used & (start + offset >= context_len - WINDOW)
        mask = used[:, None] if HEAD_DIM == BLOCK_D else used[:, None] & (dim < HEAD_DIM)[None, :]
        page_element = offset[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(k_cache_ptr + page_row * HEAD_DIM + page_element, mask=mask, other=0.0)
        # fp32 must not become tf32: the fp32 path is the exact one.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(used[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * qk_scale)
        weights = tl.exp2(scores * qk_scale - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        v = tl.load(v_cache_ptr + page_row * HEAD_DIM + page_element, mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        sums = sums * shrink[:, None] + weights
        row_max = new_max
    row_sum = tl.sum(sums, axis=1)
    acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    write_piece(
        acc, row_max + tl.log2(row_sum), out_ptr, partial_ptr, lse_ptr, arrivals_ptr, seq, kv_head, piece, index,
        num_pieces, NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, ROWS, BLOCK_GROUP, BLOCK_PIECES, ADD_UP,
    )  # fmt: skip


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    plan: DecodePlan,
    softmax_scale: float,
    window: int,
    scales: KVScales | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch on checked arguments; see attention.paged_decode_attention."""
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    itemsize = decode_itemsize(q.dtype, int8_kv=scales is not None)
    tile = decode_tile(num_seqs, group, head_dim, block_size, itemsize, q.device)
    block_d, block_group = max(MIN_TILE, triton.next_power_of_2(head_dim)), triton.next_power_of_2(group)
    add_up = adds_up_inside(num_seqs, group, len(plan.pieces) - num_seqs)
    use_pdl = pdl.use_pdl(q.device)
    settings = {
        "NUM_KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size,
        "BLOCK_N": tile.block_n, "WINDOW": window, "ROWS": max(MIN_ROWS, block_group), "BLOCK_GROUP": block_group,
        "BLOCK_PIECES": max(1, COMBINE_ELEMENTS // (block_group * block_d)), "ADD_UP": add_up, "PDL": use_pdl,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages, "launch_pdl": use_pdl,
    }  # fmt: skip
    grid = (num_kv_heads, len(plan.pieces))
    qk_scale = softmax_scale * math.log2(math.e)
    if scales is None:
        _decode_kernel[grid](
            q, k_cache, v_cache, block_tables, block_tables.stride(0), plan.pieces, plan.arrivals, plan.partial,
            plan.lse, out, qk_scale, BLOCK_D=block_d, **settings,
        )  # fmt: skip
    else:
        launch_int8(grid, q, k_cache, v_cache, scales, block_tables, plan, qk_scale, out, settings)
    if not add_up:
        combine(plan, out)
    return out
