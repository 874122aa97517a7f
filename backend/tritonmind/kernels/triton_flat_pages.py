"""The kernels behind flat_pages.py: where pages of a group go, and a layer's copy of them."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels import pdl
from tritonmind.kernels.kv_quant import KVScales
from tritonmind.kernels.triton_int8 import BIAS, kind_of, scale_arguments

PLAN_BLOCK = 256  # sequences, and entries of a table, that are looked at together
BLOCK_ELEMENTS = 4096  # of a page of K or V that a program copies at a time
MAX_COPY_PROGRAMS = 32  # that share the pages of a head: enough to fill a card, few where there is nothing to copy


@triton.jit(
    do_not_specialize=["block_table_stride", "num_seqs", "max_blocks", "written"],
    do_not_specialize_on_alignment=["block_tables_ptr", "cu_seqlens_q_ptr", "context_lens_ptr"],
)
def _plan_group_kernel(
    block_tables_ptr,  # [S, max_blocks]
    block_table_stride,
    cu_seqlens_q_ptr,  # [S + 1], of which the first may be more than 0
    context_lens_ptr,  # [S]
    num_seqs,
    max_blocks,
    written,  # 1: new tokens go to their slots; 0: pages of theirs are copied too
    num_copies_ptr,  # [1]
    blocks_ptr,  # [num_copies or more]
    pages_ptr,
    tables_ptr,  # [S, max_blocks]
    slots_ptr,  # of the step's tokens, found by cu_seqlens_q
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    seq = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    pdl.wait(PDL)
    pdl.let_next_start(PDL)
    first = 0  # page of the scratch
    copy = 0
    for start in range(0, seq, BLOCK):
        other = start + lane
        context_len = tl.load(context_lens_ptr + other, mask=other < seq, other=0)
        first += tl.sum(tl.cdiv(context_len, BLOCK_SIZE))
        end = tl.load(cu_seqlens_q_ptr + other + 1, mask=other < seq, other=0)
        num_new = end - tl.load(cu_seqlens_q_ptr + other, mask=other < seq, other=0)
        copy += tl.sum(tl.cdiv(context_len - num_new * written, BLOCK_SIZE))
    first_token = tl.load(cu_seqlens_q_ptr + seq)
    query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - first_token
    context_len = tl.load(context_lens_ptr + seq)
    num_pages = tl.cdiv(context_len, BLOCK_SIZE)
    num_copies = tl.cdiv(context_len - query_len * written, BLOCK_SIZE)
    for start in range(0, num_pages, BLOCK):
        column = start + lane
        is_copy = column < num_copies
        block = tl.load(block_tables_ptr + seq.to(tl.int64) * block_table_stride + column, mask=is_copy, other=0)
        tl.store(blocks_ptr + copy + column, block, mask=is_copy)
        tl.store(pages_ptr + copy + column, first + column, mask=is_copy)
        tl.store(tables_ptr + seq.to(tl.int64) * max_blocks + column, first + column, mask=column < num_pages)
    for start in range(0, query_len * written, BLOCK):
        token = start + lane
        slot = first * BLOCK_SIZE + context_len - query_len + token
        tl.store(slots_ptr + first_token + token, slot, mask=token < query_len)
    if seq == num_seqs - 1:
        tl.store(num_copies_ptr, copy + num_copies)


@triton.jit
def _flatten_kernel(
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM] uint8
    v_cache_ptr,
    k_scale,  # of the layer; with SCALES "token": pools [num_blocks, NUM_KV_HEADS, BLOCK_SIZE] fp32
    v_scale,
    k_zero,
    v_zero,
    num_copies_ptr,  # [1]
    blocks_ptr,  # [num_copies or more]
    pages_ptr,
    k_ptr,  # [capacity, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_ptr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    offset = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    element = offset[:, None] * HEAD_DIM + dim[None, :]
    inside = (dim < HEAD_DIM)[None, :] & (offset < BLOCK_SIZE)[:, None]
    pdl.wait(PDL)
    pdl.let_next_start(PDL)
    for copy in range(tl.program_id(1), tl.load(num_copies_ptr), tl.num_programs(1)):
        block = tl.load(blocks_ptr + copy).to(tl.int64)
        page = tl.load(pages_ptr + copy).to(tl.int64)
        row = (block * NUM_KV_HEADS + head) * BLOCK_SIZE
        k = tl.load(k_cache_ptr + row * HEAD_DIM + element, mask=inside, other=0).to(tl.float32) - BIAS
        v = tl.load(v_cache_ptr + row * HEAD_DIM + element, mask=inside, other=0).to(tl.float32) - BIAS
        if SCALES == "token":
            k = k * tl.load(k_scale + row + offset, mask=offset < BLOCK_SIZE, other=0.0)[:, None]
            v = v * tl.load(v_scale + row + offset, mask=offset < BLOCK_SIZE, other=0.0)[:, None]
        else:
            k = k * k_scale + k_zero
            v = v * v_scale + v_zero
        flat = (page * NUM_KV_HEADS + head) * BLOCK_SIZE * HEAD_DIM + element
        tl.store(k_ptr + flat, k.to(k_ptr.dtype.element_ty), mask=inside)
        tl.store(v_ptr + flat, v.to(v_ptr.dtype.element_ty), mask=inside)


def plan_group(
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
    max_copies: int,
    written: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """num_copies, blocks, pages and block_tables of a PromptGroup, of its sequences' own; fills their slots."""
    num_seqs, max_blocks = block_tables.shape
    # Each begins where memory is aligned, as kernels are compiled for.
    num_copies, blocks, pages = (
        torch.empty(size, dtype=torch.int32, device=block_tables.device) for size in (1, max_copies, max_copies)
    )
    tables = torch.empty((num_seqs, max_blocks), dtype=torch.int32, device=block_tables.device)
    use_pdl = pdl.use_pdl(block_tables.device)
    _plan_group_kernel[(num_seqs,)](
        block_tables, block_tables.stride(0), cu_seqlens_q, context_lens, num_seqs, max_blocks, int(written),
        num_copies, blocks, pages, tables, slots,
        BLOCK_SIZE=block_size, BLOCK=PLAN_BLOCK, PDL=use_pdl, num_warps=2, launch_pdl=use_pdl,
    )  # fmt: skip
    return num_copies, blocks, pages, tables


def flatten_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: KVScales,
    num_copies: torch.Tensor,
    blocks: torch.Tensor,
    pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Write what the first num_copies `blocks` of uint8 caches stand for to `pages` of k and v, in their dtype.

    The arguments are checked: by attention.paged_prefill_attention, and by flat_pages.plan_flat_pages.
    """
    _, num_kv_heads, block_size, head_dim = k.shape
    block_d = triton.next_power_of_2(head_dim)
    block_n = min(block_size, max(1, BLOCK_ELEMENTS // block_d))
    num_programs = min(len(blocks), MAX_COPY_PROGRAMS)
    if num_programs:
        use_pdl = pdl.use_pdl(k.device)
        _flatten_kernel[(num_kv_heads, num_programs, triton.cdiv(block_size, block_n))](
            k_cache, v_cache, *scale_arguments(scales), num_copies, blocks, pages, k, v,
            NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, BLOCK_D=block_d, BLOCK_N=block_n,
            SCALES=kind_of(scales), PDL=use_pdl, num_warps=4, launch_pdl=use_pdl,
        )  # fmt: skip
