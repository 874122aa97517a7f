"""The decode kernels behind attention.py: a plan of the step's work, and the attention of one layer that follows it.

The plan cuts long sequences into pieces of about equal length and lists the pieces, longest first; it is made on the
device, once a step, so that a CUDA graph serves any lengths. Attention runs a program for each piece and KV head, whose
query heads share a tile. Pieces of one sequence leave their outputs and log-sum-exps in memory, and the program that
ends last adds them up, in their order: results do not depend on which one that was.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import math

import torch
import triton
import triton.language as tl

from tritonmind.kernels import pdl, tuning
from tritonmind.kernels.decode_plan import DecodePlan
from tritonmind.kernels.tile_table import MIN_ROWS, Tile

# Shorter pieces cost more to add up than they save.
MIN_PIECE_TOKENS = 128
# Where pieces of this length are so many that they outnumber the programs that run at once, the card is evenly busy.
MAX_PIECE_TOKENS = 1024
# Pieces beyond programs_per_sm into which long sequences are cut, times as many.
MAX_OVERSUBSCRIPTION = 4
# Sequences that the plan looks at together.
PLAN_BLOCK = 256
# Elements of partial outputs that are added up together.
COMBINE_ELEMENTS = 4096
# Rows of partial outputs that the last program of a sequence adds up; more are faster in a kernel of their own.
MAX_ROWS_INSIDE = 64


@triton.jit
def _count_pieces(num_tiles, piece_tiles):
    """How many pieces of about piece_tiles tiles; a sequence without any has one piece too, which writes its zeros."""
    return tl.maximum((num_tiles + piece_tiles // 2) // piece_tiles, 1)


@triton.jit(
    do_not_specialize=["num_seqs", "max_pieces", "min_wanted", "max_wanted", "min_piece_tiles", "max_piece_tiles"],
    do_not_specialize_on_alignment=["context_lens_ptr"],
)
def _plan_kernel(
    context_lens_ptr,  # [num_seqs]
    num_seqs,
    pieces_ptr,  # [max_pieces, 4]: sequence or -1, index and number of its pieces, context_len
    max_pieces,
    sequences_ptr,  # [num_seqs, 2]: first piece, number of pieces
    arrivals_ptr,  # [num_seqs, NUM_KV_HEADS]
    min_wanted,
    max_wanted,
    min_piece_tiles,
    max_piece_tiles,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.wait(PDL)
    pdl.let_next_start(PDL)
    lane = tl.arange(0, BLOCK)
    total = 0
    for start in range(0, num_seqs, BLOCK):
        context_len = tl.load(context_lens_ptr + start + lane, mask=start + lane < num_seqs, other=0)
        total += tl.sum(tl.cdiv(context_len, BLOCK_N))
    piece_tiles = tl.minimum(tl.cdiv(total, min_wanted), max_piece_tiles)
    piece_tiles = tl.maximum(tl.maximum(piece_tiles, tl.cdiv(total, max_wanted)), min_piece_tiles)
    longest = 0
    for start in range(0, num_seqs, BLOCK):
        context_len = tl.load(context_lens_ptr + start + lane, mask=start + lane < num_seqs, other=0)
        num_tiles = tl.cdiv(context_len, BLOCK_N)
        longest = tl.maximum(longest, tl.max(tl.cdiv(num_tiles, _count_pieces(num_tiles, piece_tiles))))

    first = 0
    for is_short in tl.static_range(2):
        for start in range(0, num_seqs, BLOCK):
            seq = start + lane
            context_len = tl.load(context_lens_ptr + seq, mask=seq < num_seqs, other=0)
            num_tiles = tl.cdiv(context_len, BLOCK_N)
            num_pieces = _count_pieces(num_tiles, piece_tiles)
            listed = ((2 * tl.cdiv(num_tiles, num_pieces) < longest) == (is_short == 1)) & (seq < num_seqs)
            num_pieces = tl.where(listed, num_pieces, 0)
            row = first + tl.cumsum(num_pieces) - num_pieces
            tl.store(sequences_ptr + 2 * seq, row, mask=listed)
            tl.store(sequences_ptr + 2 * seq + 1, num_pieces, mask=listed)
            for index in range(0, tl.max(num_pieces)):
                inside = index < num_pieces
                entry = pieces_ptr + 4 * (row + index)
                tl.store(entry, seq, mask=inside)
                tl.store(entry + 1, tl.zeros_like(seq) + index, mask=inside)
                tl.store(entry + 2, num_pieces, mask=inside)
                tl.store(entry + 3, context_len, mask=inside)
            first += tl.sum(num_pieces)
    for start in range(first, max_pieces, BLOCK):
        tl.store(pieces_ptr + 4 * (start + lane), tl.full((BLOCK,), -1, tl.int32), mask=start + lane < max_pieces)
    for start in range(0, num_seqs * NUM_KV_HEADS, BLOCK):
        inside = start + lane < num_seqs * NUM_KV_HEADS
        tl.store(arrivals_ptr + start + lane, tl.zeros((BLOCK,), tl.int32), mask=inside)


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
    seq = tl.load(pieces_ptr + 4 * piece).to(tl.int64)
    if seq < 0:
        return
    index = tl.load(pieces_ptr + 4 * piece + 1)
    num_pieces = tl.load(pieces_ptr + 4 * piece + 2)
    context_len = tl.load(pieces_ptr + 4 * piece + 3)
    num_tiles = tl.cdiv(context_len, BLOCK_N)
    first_tile = num_tiles * index // num_pieces
    end_tile = num_tiles * (index + 1) // num_pieces

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
    out_row_ptr = out_ptr + first_head * HEAD_DIM
    if num_pieces == 1:
        tl.store(out_row_ptr + element, acc.to(out_ptr.dtype.element_ty), mask=inside)
        return
    part = (piece * NUM_KV_HEADS + kv_head) * GROUP
    tl.store(partial_ptr + part.to(tl.int64) * HEAD_DIM + element, acc, mask=inside)
    tl.store(lse_ptr + part + row, row_max + tl.log2(row_sum), mask=row < GROUP)
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


def plan_decode(
    context_lens: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    num_programs: int,
) -> DecodePlan:
    """Launch on checked arguments; see attention.plan_decode."""
    num_seqs, device = len(context_lens), context_lens.device
    tile = _tile(num_seqs, num_heads // num_kv_heads, head_dim, block_size, dtype, device)
    min_piece_tokens = 1 if num_programs else MIN_PIECE_TOKENS
    min_wanted = triton.cdiv(num_programs or tile.programs_per_sm * tuning.card(device).num_sms, num_kv_heads)
    max_wanted = min_wanted if num_programs else min_wanted * MAX_OVERSUBSCRIPTION
    # Each sequence rounds its number of pieces up by one at most.
    max_pieces = num_seqs + max_wanted
    plan = DecodePlan(
        pieces=torch.empty((max_pieces, 4), dtype=torch.int32, device=device),
        sequences=torch.empty((num_seqs, 2), dtype=torch.int32, device=device),
        arrivals=torch.empty((num_seqs, num_kv_heads), dtype=torch.int32, device=device),
        partial=torch.empty((max_pieces, num_heads, head_dim), dtype=torch.float32, device=device),
        lse=torch.empty((max_pieces, num_heads), dtype=torch.float32, device=device),
    )
    use_pdl = pdl.use_pdl(device)
    _plan_kernel[(1,)](
        context_lens, num_seqs, plan.pieces, max_pieces, plan.sequences, plan.arrivals, min_wanted, max_wanted,
        triton.cdiv(min_piece_tokens, tile.block_n), triton.cdiv(MAX_PIECE_TOKENS, tile.block_n),
        NUM_KV_HEADS=num_kv_heads, BLOCK_N=tile.block_n, BLOCK=PLAN_BLOCK, PDL=use_pdl,
        num_warps=4, launch_pdl=use_pdl,
    )  # fmt: skip
    return plan


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    plan: DecodePlan,
    softmax_scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch on checked arguments; see attention.paged_decode_attention."""
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    tile = _tile(num_seqs, group, head_dim, block_size, q.dtype, q.device)
    block_d, block_group = triton.next_power_of_2(head_dim), triton.next_power_of_2(group)
    add_up = adds_up_inside(num_seqs, group, len(plan.pieces) - num_seqs)
    use_pdl = pdl.use_pdl(q.device)
    _decode_kernel[(num_kv_heads, len(plan.pieces))](
        q, k_cache, v_cache, block_tables, block_tables.stride(0), plan.pieces, plan.arrivals, plan.partial, plan.lse,
        out, softmax_scale * math.log2(math.e),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_SIZE=block_size,
        BLOCK_N=tile.block_n, ROWS=max(MIN_ROWS, block_group), BLOCK_GROUP=block_group,
        BLOCK_PIECES=max(1, COMBINE_ELEMENTS // (block_group * block_d)), ADD_UP=add_up, PDL=use_pdl,
        num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=use_pdl,
    )  # fmt: skip
    if not add_up:
        _combine_kernel[(num_heads, num_seqs)](
            plan.partial, plan.lse, plan.sequences, out,
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_PIECES=COMBINE_ELEMENTS // block_d,
            PDL=use_pdl, num_warps=4, launch_pdl=use_pdl,
        )  # fmt: skip
    return out


def adds_up_inside(num_seqs: int, group: int, max_wanted: int) -> bool:
    """Whether the last program of a sequence adds its pieces up: they are few if the sequences are alike."""
    return group * triton.cdiv(max_wanted, num_seqs) <= MAX_ROWS_INSIDE


def _tile(num_seqs: int, group: int, head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device) -> Tile:
    tile = tuning.tile(
        "decode_attention",
        device,
        rows=num_seqs,
        head_dim=head_dim,
        group=group,
        block_size=block_size,
        itemsize=dtype.itemsize,
    )
    return tile._replace(block_n=min(tile.block_n, block_size))  # a tile lies inside one page
