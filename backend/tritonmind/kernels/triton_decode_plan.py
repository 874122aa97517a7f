"""The plan of decode attention: pieces of about equal length into which the sequences of a step are cut, longest first.

It is made on the device, once a step, so that a CUDA graph serves any lengths.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels import pdl, tuning
from tritonmind.kernels.decode_plan import DecodePlan
from tritonmind.kernels.tile_table import Tile

# Shorter pieces cost more to add up than they save.
MIN_PIECE_TOKENS = 128
# Where pieces of this length are so many that they outnumber the programs that run at once, the card is evenly busy.
MAX_PIECE_TOKENS = 1024
# Pieces beyond programs_per_sm into which long sequences are cut, times as many.
MAX_OVERSUBSCRIPTION = 4
# Sequences that the plan looks at together.
PLAN_BLOCK = 256


@triton.jit
def first_tile(context_len, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a window of the last WINDOW tokens; the first of all where WINDOW is 0."""
    first = context_len * 0
    if WINDOW:
        first = tl.maximum(context_len - WINDOW, 0) // BLOCK_N
    return first


@triton.jit
def count_tiles(context_len, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Those from first_tile to the context's last."""
    return tl.cdiv(context_len, BLOCK_N) - first_tile(context_len, WINDOW, BLOCK_N)


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
    WINDOW: tl.constexpr,
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
        total += tl.sum(count_tiles(context_len, WINDOW, BLOCK_N))
    piece_tiles = tl.minimum(tl.cdiv(total, min_wanted), max_piece_tiles)
    piece_tiles = tl.maximum(tl.maximum(piece_tiles, tl.cdiv(total, max_wanted)), min_piece_tiles)
    longest = 0
    for start in range(0, num_seqs, BLOCK):
        context_len = tl.load(context_lens_ptr + start + lane, mask=start + lane < num_seqs, other=0)
        num_tiles = count_tiles(context_len, WINDOW, BLOCK_N)
        longest = tl.maximum(longest, tl.max(tl.cdiv(num_tiles, _count_pieces(num_tiles, piece_tiles))))

    first = 0
    for is_short in tl.static_range(2):
        for start in range(0, num_seqs, BLOCK):
            seq = start + lane
            context_len = tl.load(context_lens_ptr + seq, mask=seq < num_seqs, other=0)
            num_tiles = count_tiles(context_len, WINDOW, BLOCK_N)
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


def plan_decode(
    context_lens: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    itemsize: int,
    window: int,
    num_programs: int,
) -> DecodePlan:
    """Launch on checked arguments; see attention.plan_decode. itemsize: see decode_plan.decode_itemsize."""
    num_seqs, device = len(context_lens), context_lens.device
    tile = decode_tile(num_seqs, num_heads // num_kv_heads, head_dim, block_size, itemsize, device)
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
        NUM_KV_HEADS=num_kv_heads, WINDOW=window, BLOCK_N=tile.block_n, BLOCK=PLAN_BLOCK, PDL=use_pdl,
        num_warps=4, launch_pdl=use_pdl,
    )  # fmt: skip
    return plan


def decode_tile(num_seqs: int, group: int, head_dim: int, block_size: int, itemsize: int, device: torch.device) -> Tile:
    """Of the plan and of the attention that follows it: a tile of the latter lies inside one page."""
    tile = tuning.tile(
        "decode_attention",
        device,
        rows=num_seqs,
        head_dim=head_dim,
        group=group,
        block_size=block_size,
        itemsize=itemsize,
    )
    return tile._replace(block_n=min(tile.block_n, block_size))
