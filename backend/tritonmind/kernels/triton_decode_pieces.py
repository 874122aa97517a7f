"""Pieces of decode attention: what a program reads of the plan, and how the pieces of a sequence become one output.

They leave their outputs and log-sum-exps in memory, and the program that ends last adds them up, in their order:
results do not depend on which one that was. Where there are many, a kernel of their own adds them up.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels import pdl
from tritonmind.kernels.decode_plan import DecodePlan
from tritonmind.kernels.triton_decode_plan import count_tiles, first_tile

# Elements of partial outputs that are added up together.
COMBINE_ELEMENTS = 4096
# Rows of partial outputs that the last program of a sequence adds up; more are faster in a kernel of their own.
MAX_ROWS_INSIDE = 64


@triton.jit
def load_piece(
    pieces_ptr,  # [max_pieces, 4], see triton_decode_plan.py
    piece,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sequence (-1: none), index and number of its pieces, context_len, first tile and end of the piece's tiles."""
    seq = tl.load(pieces_ptr + 4 * piece).to(tl.int64)
    index = tl.load(pieces_ptr + 4 * piece + 1)
    num_pieces = tl.load(pieces_ptr + 4 * piece + 2)
    context_len = tl.load(pieces_ptr + 4 * piece + 3)
    first = first_tile(context_len, WINDOW, BLOCK_N)
    num_tiles = count_tiles(context_len, WINDOW, BLOCK_N)
    divisor = tl.maximum(num_pieces, 1)  # of no piece anything is left here
    begin, end = first + num_tiles * index // divisor, first + num_tiles * (index + 1) // divisor
    return seq, index, num_pieces, context_len, begin, end


@triton.jit
def write_piece(
    acc,  # [ROWS, BLOCK_D] fp32, divided by row_sum
    lse,  # [ROWS] fp32, base 2
    out_ptr,  # [B, NUM_KV_HEADS * GROUP, HEAD_DIM]
    partial_ptr,  # [max_pieces, heads, HEAD_DIM] fp32, written for sequences of several pieces
    lse_ptr,  # [max_pieces, heads] fp32
    arrivals_ptr,  # [B, NUM_KV_HEADS], how many pieces have ended, a multiple of their number between launches
    seq,
    kv_head,
    piece,
    index,
    num_pieces,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    ADD_UP: tl.constexpr,  # pieces of one sequence here; else the combine kernel does
):
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    inside = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    element = row[:, None] * HEAD_DIM + dim[None, :]
    out_row_ptr = out_ptr + (seq * NUM_KV_HEADS + kv_head) * GROUP * HEAD_DIM
    if num_pieces == 1:
        tl.store(out_row_ptr + element, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = (piece * NUM_KV_HEADS + kv_head) * GROUP
        tl.store(partial_ptr + part.to(tl.int64) * HEAD_DIM + element, acc, mask=inside)
        tl.store(lse_ptr + part + row, lse, mask=row < GROUP)
        if ADD_UP:
            # Each thread's part must be in memory before one of them says so.
            tl.debug_barrier()
            before = tl.atomic_add(arrivals_ptr + seq * NUM_KV_HEADS + kv_head, 1, sem="acq_rel", scope="gpu")
            if before % num_pieces == num_pieces - 1:
                first_part = ((piece - index) * NUM_KV_HEADS + kv_head) * GROUP
                _add_up(
                    partial_ptr, lse_ptr, first_part, num_pieces, out_row_ptr,
                    NUM_KV_HEADS * GROUP, GROUP, HEAD_DIM, BLOCK_D, BLOCK_GROUP, BLOCK_PIECES,
                )  # fmt: skip


@triton.jit
def _add_up(
    partial_ptr,
    lse_ptr,
    first_part,  # of the first piece, in rows of partial_ptr
    num_pieces,
    out_row_ptr,  # [GROUP, HEAD_DIM]
    PART_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    row = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_GROUP, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_GROUP,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_GROUP,), tl.float32)
    for start in range(0, num_pieces, BLOCK_PIECES):
        piece = start + tl.arange(0, BLOCK_PIECES)
        part = first_part + piece[:, None] * PART_STRIDE + row[None, :]
        inside = (piece < num_pieces)[:, None] & (row < GROUP)[None, :]
        lse = tl.load(lse_ptr + part, mask=inside, other=-1e30)
        partial = tl.load(
            partial_ptr + part[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=inside[:, :, None] & (dim < HEAD_DIM)[None, None, :],
            other=0.0,
        )
        new_max = tl.maximum(row_max, tl.max(lse, axis=0))
        weight = tl.exp2(lse - new_max[None, :])
        shrink = tl.exp2(row_max - new_max)
        acc = acc * shrink[:, None] + tl.sum(partial * weight[:, :, None], axis=0)
        row_sum = row_sum * shrink + tl.sum(weight, axis=0)
        row_max = new_max
    out = acc / row_sum[:, None]
    inside = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(out_row_ptr + row[:, None] * HEAD_DIM + dim[None, :], out.to(out_row_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combine_kernel(
    partial_ptr,  # [max_pieces, NUM_HEADS, HEAD_DIM] fp32
    lse_ptr,  # [max_pieces, NUM_HEADS] fp32, base 2
    sequences_ptr,  # [B, 2], see _plan_kernel
    out_ptr,  # [B, NUM_HEADS, HEAD_DIM]
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    pdl.wait(PDL)
    pdl.let_next_start(PDL)
    first_piece = tl.load(sequences_ptr + 2 * seq)
    num_pieces = tl.load(sequences_ptr + 2 * seq + 1)
    if num_pieces > 1:
        _add_up(
            partial_ptr, lse_ptr, first_piece * NUM_HEADS + head, num_pieces,
            out_ptr + (seq * NUM_HEADS + head) * HEAD_DIM, NUM_HEADS, 1, HEAD_DIM, BLOCK_D, 1, BLOCK_PIECES,
        )  # fmt: skip


def adds_up_inside(num_seqs: int, group: int, max_wanted: int) -> bool:
    """Whether the last program of a sequence adds its pieces up: they are few if the sequences are alike."""
    return group * triton.cdiv(max_wanted, num_seqs) <= MAX_ROWS_INSIDE


def combine(plan: DecodePlan, out: torch.Tensor) -> None:
    """Add the pieces of each sequence up to out [B, H, D], in a kernel of their own."""
    num_seqs, num_heads, head_dim = out.shape
    block_d, use_pdl = triton.next_power_of_2(head_dim), pdl.use_pdl(out.device)
    _combine_kernel[(num_heads, num_seqs)](
        plan.partial, plan.lse, plan.sequences, out,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_PIECES=COMBINE_ELEMENTS // block_d,
        PDL=use_pdl, num_warps=4, launch_pdl=use_pdl,
    )  # fmt: skip
