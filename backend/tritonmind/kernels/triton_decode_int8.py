"""The decode kernel over int8 pages; see triton_decode_attention.py, whose pages are floating-point.

A pair of channels is read as one 16-bit number: its low byte is the even channel, its high byte the odd one. Half of a
product is over the even channels, half over the odd ones, so that a register of two such numbers, as the tensor cores
want them, turns into two registers of two values each, without a detour through shared memory.

Bytes are multiplied as the whole numbers that they stand for. The scale of K goes into the scores and that of V into
the weights; where a layer has one scale, K's goes into the softmax's and V's into the result. The zero of K adds the
same to all scores of a row, which a softmax does not see; that of V is added once, as the weights add up to 1.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tritonmind.kernels import pdl
from tritonmind.kernels.decode_plan import DecodePlan
from tritonmind.kernels.kv_quant import KVScales
from tritonmind.kernels.triton_decode_pieces import load_piece, write_piece
from tritonmind.kernels.triton_int8 import kind_of, scale_arguments, unpack_pairs, use_asm

# Of the tensor cores' reduced dimension.
MIN_PAIRS = 16
# Weights reach 2^LIFT, not 1: times a scale of V, which is small, they would lose bits as fp16. Largest fp16 V / 127
# times this is still an fp16 number; a bf16 model's may not be, so it is cut off.
LIFT = tl.constexpr(6)
MAX_FP16 = tl.constexpr(65504.0)


@triton.jit(do_not_specialize=["block_table_stride"], do_not_specialize_on_alignment=["block_tables_ptr"])
def _decode_int8_kernel(
    q_ptr,  # [B, NUM_KV_HEADS * GROUP, HEAD_DIM]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM] uint8
    v_cache_ptr,
    k_scale,  # of the layer; with SCALES "token": pools [num_blocks, NUM_KV_HEADS, BLOCK_SIZE] fp32
    v_scale,
    k_zero,
    v_zero,
    block_tables_ptr,
    block_table_stride,
    pieces_ptr,  # [max_pieces, 4], see triton_decode_plan.py
    arrivals_ptr,  # see write_piece
    partial_ptr,
    lse_ptr,
    out_ptr,  # [B, NUM_KV_HEADS * GROUP, HEAD_DIM]
    qk_scale,  # softmax scale * log2(e)
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    ADD_UP: tl.constexpr,
    SCALES: tl.constexpr,  # "layer" or "token"
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = HEAD_DIM // 2
    # fp16 holds the whole numbers of bytes, bf16 does not.
    dtype: tl.constexpr = tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.float16
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    pdl.wait(PDL)
    pdl.let_next_start(PDL)
    seq, index, num_pieces, context_len, first_tile, end_tile = load_piece(pieces_ptr, piece, WINDOW, BLOCK_N)
    if seq < 0:
        return

    row = tl.arange(0, ROWS)
    pair = tl.arange(0, BLOCK_PAIRS)
    offset = tl.arange(0, BLOCK_N)
    q_pair_ptr = q_ptr + ((seq * NUM_KV_HEADS + kv_head) * GROUP + row[:, None]) * HEAD_DIM + 2 * pair[None, :]
    inside = (row < GROUP)[:, None] & (pair < PAIRS)[None, :]
    q_even = _as(tl.load(q_pair_ptr, mask=inside, other=0.0), dtype)
    q_odd = _as(tl.load(q_pair_ptr + 1, mask=inside, other=0.0), dtype)
    even = tl.zeros((ROWS, BLOCK_PAIRS), tl.float32)
    odd = tl.zeros((ROWS, BLOCK_PAIRS), tl.float32)
    row_max = tl.full((ROWS,), -1e30, tl.float32)
    # Added up across a tile at the end only: a sum of rows has its warps wait for one another.
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    block_table_ptr = block_tables_ptr + seq * block_table_stride
    k_pairs_ptr = k_cache_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    v_pairs_ptr = v_cache_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    for tile in range(first_tile, end_tile):
        start = tile * BLOCK_N
        block = tl.load(block_table_ptr + start // BLOCK_SIZE).to(tl.int64)
        page_row = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE
        # What lies beyond the context is not read: it costs time, and its scales may be NaN.
        used = start + offset < context_len
        if WINDOW:
            used = used & (start + offset >= context_len - WINDOW)
        mask = used[:, None] if PAIRS == BLOCK_PAIRS else used[:, None] & (pair < PAIRS)[None, :]
        page_element = offset[:, None] * PAIRS + pair[None, :]
        k_even, k_odd = unpack_pairs(
            tl.load(k_pairs_ptr + page_row * PAIRS + page_element, mask=mask, other=0), dtype, ASM
        )
        # fp32 must not become tf32: the fp32 path is the exact one.
        scores = tl.dot(q_even, tl.trans(k_even), input_precision="ieee")
        scores = tl.dot(q_odd, tl.trans(k_odd), scores, input_precision="ieee")
        if SCALES == "token":
            scores = scores * (tl.load(k_scale + page_row + offset, mask=used, other=0.0) * qk_scale)[None, :]
        else:
            scores = scores * (k_scale * qk_scale)
        scores = tl.where(used[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - (new_max - LIFT)[:, None])
        shrink = tl.exp2(row_max - new_max)
        sums = sums * shrink[:, None] + weights
        row_max = new_max
        if SCALES == "token":
            weights = weights * tl.load(v_scale + page_row + offset, mask=used, other=0.0)[None, :]
            if q_ptr.dtype.element_ty == tl.bfloat16:
                weights = tl.minimum(weights, MAX_FP16)
        v_even, v_odd = unpack_pairs(
            tl.load(v_pairs_ptr + page_row * PAIRS + page_element, mask=mask, other=0), dtype, ASM
        )
        weights = weights.to(dtype)
        even = tl.dot(weights, v_even, even * shrink[:, None], input_precision="ieee")
        odd = tl.dot(weights, v_odd, odd * shrink[:, None], input_precision="ieee")
    row_sum = tl.sum(sums, axis=1)
    acc = tl.reshape(tl.join(even, odd), (ROWS, 2 * BLOCK_PAIRS)) / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    if SCALES == "layer":
        acc = acc * v_scale + tl.where(row_sum > 0, v_zero, 0.0)[:, None]
    write_piece(
        acc, row_max - LIFT + tl.log2(row_sum), out_ptr, partial_ptr, lse_ptr, arrivals_ptr, seq, kv_head, piece, index,
        num_pieces, NUM_KV_HEADS, GROUP, HEAD_DIM, 2 * BLOCK_PAIRS, ROWS, BLOCK_GROUP, BLOCK_PIECES, ADD_UP,
    )  # fmt: skip


@triton.jit
def _as(q, dtype: tl.constexpr):
    """bf16 reaches further than fp16."""
    if q.dtype == tl.bfloat16:
        q = tl.clamp(q.to(tl.float32), -MAX_FP16, MAX_FP16)
    return q.to(dtype)


def launch_int8(
    grid: tuple[int, int],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: KVScales,
    block_tables: torch.Tensor,
    plan: DecodePlan,
    qk_scale: float,
    out: torch.Tensor,
    settings: dict[str, Any],
) -> None:
    """For triton_decode_attention.paged_decode_attention, which has made the settings that both kernels share."""
    _decode_int8_kernel[grid](
        q, k_cache, v_cache, *scale_arguments(scales), block_tables,
        block_tables.stride(0), plan.pieces, plan.arrivals, plan.partial, plan.lse, out, qk_scale,
        BLOCK_PAIRS=max(MIN_PAIRS, triton.next_power_of_2(q.shape[2] // 2)), SCALES=kind_of(scales),
        ASM=use_asm(), **settings,
    )  # fmt: skip
